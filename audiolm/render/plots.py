"""Pictures as PNG bytes: spectrograms, curves, bars, shares, attention. No display.

wav is float32 mono at 16 kHz.  matplotlib (its Agg backend) is imported within functions; figures are objects, never
global state, so threads may draw at the same time.  Shapes: T samples, F frequencies or frames, L layers, S tokens,
R rows, C columns.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np

SAMPLE_RATE = 16_000
BLUE, ORANGE, GREY, INK = "#2f6db5", "#d9822b", "#9aa4b1", "#27313d"
COLOURS = (BLUE, ORANGE, "#3c9a6b", "#8a5bb5", "#c0504d", "#5b7b94")
DASHES = ("--", ":", "-.", (0, (6, 1)))  # baselines are all grey
LOG_SPAN = 50  # greatest over least value from which a curve is drawn on a logarithmic axis
MARKED_POINTS = 30  # fewer points are marked one by one
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}  # a legend outside the axes covers no curve


def _figure(height: float, title: str, x: str, y: str, width: float = 6.4):
    """(figure, axes), named. Inches at 110 dots per inch: 6.4 fit the page's column."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=8)
    _name(axes, title, x, y)
    return figure, axes


def _png(figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with io.BytesIO() as f:
        FigureCanvasAgg(figure).print_png(f)
        return f.getvalue()


def _grid(axes) -> None:
    """Level lines behind the curves."""
    axes.grid(axis="y", color="#e5e9ee", linewidth=0.7)
    axes.set_axisbelow(True)


def _level(axes, value: float, label: str) -> None:
    """A dashed line across the axes with a label at its right end."""
    axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
    axes.annotate(label, (1.0, value), xycoords=("axes fraction", "data"), fontsize=7, color=INK, ha="right", va="bottom")


def _legend(axes, **where) -> None:
    axes.legend(fontsize=7, frameon=False, **where)


def _name(axes, title: str, x: str, y: str) -> None:
    """Title and axes' labels. A title may hold a clip's name, so `$` starts no formula."""
    axes.set_title(title, fontsize=10, color=INK, loc="left", parse_math=False)
    axes.set_xlabel(x, fontsize=8, color=INK)
    axes.set_ylabel(y, fontsize=8, color=INK)


def spectrogram(wav: np.ndarray, title: str, prompt_s: float | None = None, sample_rate: int = SAMPLE_RATE) -> bytes:
    """Log-power spectrogram, 0 to half the sample rate, 80 dB below its peak; a line marks a prompt's end."""
    wav = np.asarray(wav, dtype=np.float32).reshape(-1)
    n_fft, hop = 512, max(128, len(wav) // 1200)  # about as many columns as the picture has pixels
    padded = np.pad(wav, (n_fft // 2, n_fft))
    starts = np.arange(0, len(wav) + 1, hop)  # a short-time Fourier transform, centred, Hann window
    frames_TN = padded[starts[:, None] + np.arange(n_fft)] * np.hanning(n_fft).astype(np.float32)
    power_TF = np.abs(np.fft.rfft(frames_TN, axis=1)) ** 2
    db_TF = 10 * np.log10(np.maximum(power_TF, 1e-12))
    top = float(db_TF.max())
    figure, axes = _figure(2.1, title, "seconds", "kHz")
    axes.imshow(db_TF.T, origin="lower", aspect="auto", cmap="magma", vmin=top - 80, vmax=top, interpolation="nearest",
                extent=(0, len(wav) / sample_rate, 0, sample_rate / 2000))
    if prompt_s:
        axes.axvline(prompt_s, color="white", linestyle="--", linewidth=1)
    return _png(figure)


def curves(steps: Sequence[float], values: Mapping[str, Sequence[float | None]], title: str, y: str = "loss",
           baselines: Mapping[str, float] | None = None) -> bytes:
    """Curves over training steps (None where one has no value) and dashed baselines."""
    figure, axes = _figure(2.8, title, "step", y)
    log = False
    for i, (name, ys) in enumerate(values.items()):
        points = [(s, v) for s, v in zip(steps, ys, strict=True) if v is not None and np.isfinite(v)]
        if not points:
            continue
        xs, vs = zip(*points, strict=True)
        log = log or (min(vs) > 0 and max(vs) / min(vs) > LOG_SPAN)
        axes.plot(xs, vs, label=name, color=COLOURS[i % len(COLOURS)], linewidth=1.4,
                  marker="o" if len(points) < MARKED_POINTS else None, markersize=3)
    for i, (name, value) in enumerate((baselines or {}).items()):  # they may lie close together: named in the legend
        axes.axhline(value, color=GREY, linestyle=DASHES[i % len(DASHES)], linewidth=1, label=f"{name}, {value:.3f}")
    if log:
        axes.set_yscale("log")
    _grid(axes)
    if values:
        _legend(axes, **BESIDE)
    return _png(figure)


def codebook_use(levels: Sequence[int], perplexity: Sequence[float], used: Sequence[float], vocab: int | None = None,
                 title: str = "Codebook use") -> bytes:
    """Bars for each quantizer level: codes used at all, and perplexity, the number of equally frequent codes that it is
    worth."""
    figure, axes = _figure(2.6, title, "quantizer level", "codes")
    at = np.arange(len(levels))
    axes.bar(at - 0.2, used, 0.38, color="#bcd0e8", label="codes used")
    axes.bar(at + 0.2, perplexity, 0.38, color=BLUE, label="perplexity")
    if vocab:
        _level(axes, vocab, f"all {vocab}")
    axes.set_xticks(at, [str(level) for level in levels])
    _legend(axes, **BESIDE)
    return _png(figure)


def rate_quality(series: Mapping[str, Sequence[tuple[float, float]]], title: str, y: str) -> bytes:
    """Quality over bit rate: a line through each codec's (kb/s, score), in order of rate."""
    figure, axes = _figure(2.8, title, "kb/s", y)
    for i, (name, points) in enumerate(series.items()):
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, label=name, color=COLOURS[i % len(COLOURS)], linewidth=1.4, marker="o", markersize=4)
    axes.set_xlim(left=0)
    _grid(axes)
    _legend(axes, **BESIDE)
    return _png(figure)


def bars(labels: Sequence[str], values: Sequence[float], title: str, x: str) -> bytes:
    """Horizontal bars from top to bottom, each with its value."""
    figure, axes = _figure(0.9 + 0.34 * max(1, len(labels)), title, x, "")
    at = np.arange(len(labels))
    axes.barh(at, values, 0.62, color=BLUE)
    axes.set_yticks(at, [str(label) for label in labels])
    axes.invert_yaxis()
    for i, v in enumerate(values):
        axes.annotate(f" {v:.3g}", (v, i), va="center", fontsize=8, color=INK)
    if len(values) and max(values) > 0:
        axes.set_xlim(0, 1.12 * max(values))
    return _png(figure)


def layers(rows: Sequence[Mapping]) -> bytes:
    """ABX error by layer, within and across speaker: features as lines with their intervals, centroids as marks, the rows
    without a layer (a floor) as level lines."""
    figure, axes = _figure(3.0, "ABX on held-out speakers", "layer", "error, %")
    for mode, colour in (("within", BLUE), ("across", ORANGE)):
        features = sorted((r for r in rows if r["layer"] is not None and r["k"] is None), key=lambda r: r["layer"])
        below = [r[mode] - r[f"interval_{mode}"][0] for r in features]
        above = [r[f"interval_{mode}"][1] - r[mode] for r in features]
        axes.errorbar([r["layer"] for r in features], [r[mode] for r in features], [below, above], color=colour,
                      linewidth=1.4, marker="o", markersize=3, capsize=2, label=f"features, {mode}")
        for i, k in enumerate(sorted({r["k"] for r in rows if r["k"]})):
            some = [r for r in rows if r["k"] == k]
            axes.scatter([r["layer"] for r in some], [r[mode] for r in some], marker="sD^v*P"[i % 6], s=26, facecolors="none",
                         edgecolors=colour, label=f"centroids K = {k}, {mode}")
        for row in (r for r in rows if r["layer"] is None):
            axes.axhline(row[mode], color=colour, linestyle="--", linewidth=1, label=f"MFCC, {mode}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _grid(axes)
    _legend(axes, **BESIDE)
    return _png(figure)


def shares(share_RC: np.ndarray, rows: Sequence[str], title: str, x: str) -> bytes:
    """A picture of shares from 0 (white) to 1, with its rows' names."""
    figure, axes = _figure(1.2 + 0.125 * len(rows), title, x, "", width=8.0)
    image = axes.imshow(share_RC, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(np.arange(len(rows)), list(rows))
    axes.tick_params(axis="y", labelsize=6, length=0)
    figure.colorbar(image, ax=axes, shrink=0.5, pad=0.01).ax.tick_params(labelsize=7)
    return _png(figure)


def ranked(series: Mapping[str, np.ndarray], title: str) -> bytes:
    """Each series' shares in falling order; the dashed line is even use of all."""
    figure, axes = _figure(2.6, title, "rank", "share of frames")
    for i, (name, share) in enumerate(series.items()):
        falling = np.sort(share[share > 0])[::-1]
        axes.plot(np.arange(1, len(falling) + 1), falling, label=name.replace("_", " "), color=COLOURS[i], linewidth=1.4)
        _level(axes, 1 / len(share), "even use")
    axes.set_yscale("log")
    _legend(axes, loc="lower left")  # shares fall: this corner is empty
    return _png(figure)


def lengths(series: Mapping[str, np.ndarray], title: str, x: str) -> bytes:
    """Shares by length from 1, series side by side; the last bar holds longer ones too."""
    figure, axes = _figure(2.6, title, x, "share of runs")
    for i, (name, share) in enumerate(series.items()):
        at = np.arange(1, len(share) + 1) + 0.4 * (i - (len(series) - 1) / 2)
        axes.bar(at, share, 0.38, label=name.replace("_", " "), color=COLOURS[i])
        ticks = [1, *range(5, len(share), 5)]
        axes.set_xticks([*ticks, len(share)], [*map(str, ticks), f"{len(share)}+"])
    axes.set_yscale("log")
    _legend(axes)
    return _png(figure)


def attention(share_LFS: np.ndarray, spans_S2: np.ndarray, title: str) -> bytes:
    """Attention of each layer to S tokens over F frames of 20 ms. The dashed line marks when each token is spoken
    (spans in seconds): the attention follows it in a layer that reads what it speaks."""
    from matplotlib.figure import Figure

    layers, frames, tokens = share_LFS.shape
    columns = min(layers, 4)
    figure = Figure(figsize=(2.4 * columns, 0.5 + 2.1 * -(-layers // columns)), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=10, color=INK, parse_math=False)
    for i, share_FS in enumerate(share_LFS):
        axes = figure.add_subplot(-(-layers // columns), columns, i + 1)
        share_FS = share_FS / np.maximum(share_FS.max(1, keepdims=True), 1e-9)  # each frame's darkest is its most
        axes.imshow(share_FS.T, origin="lower", aspect="auto", cmap="Blues", interpolation="nearest",
                    extent=(0, frames / 50, 0, tokens))
        spoken_S = np.append(spans_S2[:, 0], spans_S2[-1:, 1])
        axes.plot(spoken_S, np.arange(tokens + 1), color=ORANGE, linestyle="--", linewidth=0.8)
        axes.tick_params(colors=INK, labelsize=6)
        _name(axes, f"layer {i + 1}", "seconds of sound" if i >= layers - columns else "", "" if i % columns else "token")
    return _png(figure)
