"""Table I of the paper (2209.03143, III-B): phonetic discriminability and sound quality of acoustic and semantic tokens.

ABX error in %, within and across speakers, with 95 % intervals.  It is measured on the sums of the vectors that the tokens
stand for: the quantizer's at 50 Hz, the centroids at 25 Hz.  ViSQOL, PESQ, STOI and mel distance score the audio that is
decoded from the same tokens alone.  wav_T: mono float32 at 16 kHz; codes_TQ as in tokenizers.base.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audiolm.config.semantic import KMeansConfig
from audiolm.dag.run_index import no_step, steps_of
from audiolm.eval.codec_quality import COARSE_BITS_PER_S, bits_per_s, decode, encode, quality_notes
from audiolm.eval.metrics import abx, audio_quality
from audiolm.eval.metrics.audio_quality import Scorers
from audiolm.eval.metrics.frame_rate import Extract, at_multiple
from audiolm.eval.metrics.stats import text_table
from audiolm.eval.results import Result, not_measured
from audiolm.eval.steps import layers
from audiolm.eval.suites.base import SuiteContext
from audiolm.eval.test_sets import items_and_audio, wav_of
from audiolm.tokenizers import semantic
from audiolm.tokenizers.acoustic import AcousticTokenizer
from audiolm.tokenizers.base import SAMPLE_RATE, Codec, Tokenizer
from audiolm.tokenizers.codec_lookup import open_codec
from audiolm.tokenizers.extractor import window_of
from audiolm.tokenizers.residual import ResidualTokenizer, load_residual
from audiolm.tokenizers.vocoder import SemanticCodec, load_vocoder

BUILDS = {"codec": "codec", "tokenizer": "kmeans", "residual": "residual", "vocoder": "semantic_vocoder"}  # option: step
Log = Callable[[str], object]
Features = tuple[str, int | None, Any, float]  # name, step of a checkpoint, features by file, rate in Hz


@dataclass(frozen=True)
class Side:
    """One kind of token. `levels`: the numbers of levels to measure; `vectors`: codes_TQ, any prefix of the levels, to (T, D),
    None where they cannot be had; `codec`: decodes the tokens, None where there is no decoder."""

    name: str
    tokenizer: Tokenizer
    levels: Sequence[int]
    vectors: Callable[[torch.Tensor], torch.Tensor] | None
    codec: Codec | None


def acoustic_side(codec: Codec) -> Side:
    """The codec with its coarse levels (2 kb/s) and with all levels. An imported codec gives no vectors."""
    coarse = round(COARSE_BITS_PER_S / bits_per_s(codec, 1))
    levels = sorted({min(max(coarse, 1), codec.spec.n_q), codec.spec.n_q})

    def vectors(codes_TQ: torch.Tensor) -> torch.Tensor:
        return codec.model.quantizer.decode(codes_TQ[None].to(codec.device))[0].T.float().cpu()

    return Side("acoustic", codec, levels, vectors if isinstance(codec, AcousticTokenizer) else None, codec)


def semantic_side(tokenizer: ResidualTokenizer, vocoder: SemanticCodec | None) -> Side:
    """The semantic tokens alone, and with all residual levels."""
    return Side("semantic", tokenizer, sorted({1, tokenizer.spec.n_q}), tokenizer.vectors_of, vocoder)


def find_builds(named: Mapping[str, str | None], run: str | None) -> dict[str, str | None]:
    """Path by option of BUILDS: the named one, else the one in the run's index. Raises ValueError where both are missing."""
    steps = steps_of(run) if run else {}
    builds = {option: named[option] or steps.get(step) for option, step in BUILDS.items()}
    if not builds["codec"] and not builds["tokenizer"]:
        raise ValueError(no_step(run, ["codec", "kmeans"]) if run else
                         "nothing to measure: give --codec, --tokenizer (with --vocoder), or --run")
    for option in ("residual", "vocoder"):
        if builds[option] and not builds["tokenizer"]:
            raise ValueError(f"--{option} needs the tokenizer it was made for: give --tokenizer")
    return builds


def load_sides(builds: Mapping[str, str | None], device: str) -> list[Side]:
    """The acoustic and the semantic side, as far as the builds (path by option) are given."""
    sides = [acoustic_side(open_codec(builds["codec"], device))] if builds["codec"] else []
    if builds["tokenizer"]:
        tokenizer = load_residual(builds["tokenizer"], builds["residual"], device)
        vocoder = load_vocoder(builds["vocoder"], tokenizer, device) if builds["vocoder"] else None
        sides.append(semantic_side(tokenizer, vocoder))
    return sides


def excerpts(paths: Sequence[str], n: int, seconds: float) -> list[np.ndarray]:
    """wav_T of the first `seconds` of at most n files, spread evenly over all paths."""
    if n < 1 or seconds <= 0:
        raise ValueError(f"{n} clips of {seconds} s: both numbers must be above 0")
    n = min(n, len(paths))
    return [wav_of(paths[i * len(paths) // n])[:round(seconds * SAMPLE_RATE)] for i in range(n)]


def table1(sides: Sequence[Side], items: abx.Items, read: Callable[[str], np.ndarray], wavs: Sequence[np.ndarray],
           scorers: Scorers, seed: int = 0, log: Log = lambda text: None) -> dict[str, Any]:
    """"rows": tokens, levels, bits_per_s, within, interval_within, across, interval_across, by_speaker_*, visqol, pesq, stoi,
    si_sdr_db, mel, scored (None where there is none); "items", "clips", "seconds", "visqol", "absent" and "remarks".

    `read` returns wav_T of an item's file; `wavs` are the clips to encode and decode; `log` gets lines of progress.
    Raises ValueError as eval.metrics.abx does, and where there is nothing to measure.
    """
    if not sides or not len(wavs):
        raise ValueError("Table I needs tokens of one kind at least, and clips to decode")
    rows, remarks = [], []
    for side in sides:
        # Each file is encoded once; fewer levels are a prefix of the same codes.
        item_codes = {} if side.vectors is None else _encode_items(side, items, read, log)
        clip_codes = encode(side.tokenizer, wavs)
        if side.vectors is None:
            remarks.append(f"ABX of {side.name} tokens is left out: the vectors of an imported codec are not at hand.")
        if side.codec is None:
            remarks.append(f"No sound of {side.name} tokens: no decoder was given (--vocoder).")
        for levels in side.levels:
            row = {"tokens": side.name, "levels": levels, "bits_per_s": bits_per_s(side.tokenizer, levels)}
            if side.vectors is not None:
                log(f"{side.name}, levels 1 to {levels}: ABX")
                row |= _abx(side, levels, item_codes, items, seed)
            if side.codec is not None and levels <= side.codec.spec.n_q:
                log(f"{side.name}, levels 1 to {levels}: sound of {len(wavs)} clips")
                decoded = (decode(side.codec, c[:, :levels], len(w)) for c, w in zip(clip_codes, wavs, strict=True))
                row |= audio_quality.measure(wavs, decoded, scorers.by_name)
            elif side.codec is not None:
                remarks.append(f"No sound of {levels} levels of {side.name} tokens: the decoder has {side.codec.spec.n_q}.")
            rows.append({**dict.fromkeys(key for key, _, _ in COLUMNS), "interval_within": None, "interval_across": None,
                         "scored": {}, **row})
    return {"rows": rows, "items": len(items.file), "clips": len(wavs), "seconds": sum(map(len, wavs)) / SAMPLE_RATE,
            "visqol": scorers.visqol, "absent": dict(scorers.absent), "remarks": remarks}


def _encode_items(side: Side, items: abx.Items, read: Callable[[str], np.ndarray], log: Log) -> dict[str, torch.Tensor]:
    """codes_TQ of each of the items' files, with all levels."""
    names, codes = sorted(set(items.file.tolist())), {}
    for i, name in enumerate(names):
        if i % max(1, len(names) // 10) == 0:  # ten lines of progress
            log(f"{side.name}: tokens of file {i + 1} of {len(names)}")
        codes[name], = encode(side.tokenizer, [read(name)])
    return codes


def _abx(side: Side, levels: int, codes: Mapping[str, torch.Tensor], items: abx.Items, seed: int) -> dict[str, Any]:
    def features(file: str) -> np.ndarray:
        return side.vectors(codes[file][:, :levels]).numpy()

    return abx.abx(features, items, side.tokenizer.spec.rate_hz, abx.Protocol(seed))


COLUMNS = (("tokens", "tokens", 0), ("levels", "levels", 0), ("bits_per_s", "b/s", 0), ("within", "ABX within %", 2),
           ("across", "ABX across %", 2), ("visqol", "ViSQOL", 2), ("pesq", "PESQ", 2), ("stoi", "STOI", 3),
           ("mel", "mel distance", 3))  # (field, title, digits)


def format_table(table: Mapping[str, Any]) -> str:
    """The rows of `table1` as aligned text, with remarks below."""
    lines = [[title for _, title, _ in COLUMNS]] + [[_cell(row, *c) for c in COLUMNS] for row in table["rows"]]
    return text_table(lines, _remarks(table))


def _cell(row: Mapping[str, Any], name: str, _: str, digits: int) -> str:
    value = row[name]
    if value is None:
        return "-"
    if name in abx.MODES:
        low, high = row[f"interval_{name}"]
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return value if isinstance(value, str) else f"{value:.{digits}f}"


def _remarks(table: Mapping[str, Any]) -> list[str]:
    titles = {name: title for name, title, _ in COLUMNS}
    lines = [f"ABX on {table['items']} triphones, with 95 % intervals over speakers; sound on clips: {table['clips']}, "
             f"{table['seconds']:.1f} s."]
    return [*lines, *quality_notes(table, titles), *table["remarks"]]


def load_extractor(kind: str, tokenizer: str | None, device: str, times: int = 1) -> tuple[Extract, float]:
    """(wav_T -> features (T, D), their rate in Hz) of a kind of eval.metrics.abx at `times` its rate, with a kmeans build
    where it needs one."""
    extract, rate_hz = abx.extractor(kind, semantic.load_semantic(tokenizer, device) if tokenizer else None)
    return at_multiple(extract, round(SAMPLE_RATE / rate_hz), times), rate_hz * times


def features_of_layer(model: str, layer: int, files: Mapping[str, str], device: str, checkpoints: bool,
                      times: int = 1) -> Iterator[Features]:
    """Features of a masked model's layer at `times` its rate, z-scored over all files; one entry for each checkpoint where
    `checkpoints`."""
    window = window_of(KMeansConfig().window_s, KMeansConfig().overlap_s)  # of the default config, as tokens are made
    models = layers.checkpoints(model, device) if checkpoints else [(None, semantic.load_extractor(model, device))]
    for step, net in models:
        name = f"layer {layer}" + ("" if step is None else f", step {step}")
        yield name, step, layers.zscored(layers.frames_of(files, net, layer, window, times)), layers.RATE_HZ * times


def abx_rows(sources: Iterable[Features], items: abx.Items, seed: int) -> list[dict[str, Any]]:
    """`eval.metrics.abx.abx` of each source, with "name", "step", "rate_hz" and "seconds"."""
    rows, began = [], time.monotonic()
    for name, step, features, rate_hz in sources:
        figures = abx.abx(features, items, rate_hz, abx.Protocol(seed))
        rows.append({"name": name, "step": step, "rate_hz": rate_hz, **figures,
                     "seconds": round(time.monotonic() - began, 1)})
        began = time.monotonic()
    return rows


def format_abx(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each row and mode, and one of the items."""
    lines = []
    for row, mode in ((row, mode) for row in rows for mode in abx.MODES):
        low, high = row[f"interval_{mode}"]
        lines.append(f"{row['name']} {mode} speaker: {row[mode]:.2f} % [{low:.2f}, {high:.2f}]  {row[f'triplets_{mode}']} "
                     f"triplets, {row[f'phone_pairs_{mode}']} phone pairs, {len(row[f'by_speaker_{mode}'])} speakers")
    last = rows[-1]
    return "\n".join([*lines, f"{last['items']} items ({last['dropped']} shorter than a frame left out) at "
                              f"{last['rate_hz']:g} Hz, {sum(r['seconds'] for r in rows):.1f} s"])


# Table I: b/s, ABX within, ABX across, ViSQOL, with few levels and with all. Its residual semantic tokens are w2v-BERT's too.
PAPER = {"semantic": ((250, 6.7, 7.6, 1.1), (6000, 5.6, 6.2, 1.4)),
         "acoustic": ((2000, 22.4, 28.7, 3.3), (6000, 17.8, 26.6, 3.9))}
BETWEEN_RATES = 3000  # b/s: between the codec's two


def _paper_values(row: Mapping[str, Any]) -> tuple[float, ...]:
    all_levels = row["levels"] > 1 if row["tokens"] == "semantic" else row["bits_per_s"] > BETWEEN_RATES
    return PAPER[row["tokens"]][all_levels]


def tokens_suite(context: SuiteContext) -> list[Result]:
    """ABX and quality of semantic and acoustic tokens, where the config names a triphone list (semantic.abx)."""
    config, abx_set = context.config, context.config.semantic.abx
    if abx_set is None:
        return [not_measured("I", "semantic and acoustic tokens", "ABX error %", "no triphones: name a ZeroSpeech item file, "
                             "semantic.abx={items: FILE, audio: [FOLDER]}")]
    items, files = items_and_audio(abx_set.items, abx_set.audio, abx_set.speakers, "semantic.abx.audio")
    sides = load_sides({option: context.steps.get(step) for option, step in BUILDS.items()}, context.device)[::-1]
    wavs = excerpts(list(files.values()), config.tables.sounds, config.evaluate.clip_s)
    table = table1(sides, items, lambda file: wav_of(files[file]), wavs, audio_quality.scorers(), config.run.seed)
    results = []
    for row in table["rows"]:
        item = f"{row['tokens']}, {row['levels']} levels, {row['bits_per_s']:.0f} b/s"
        bits_per_s, *paper_abx, paper_visqol = _paper_values(row)
        note = "" if row["bits_per_s"] == bits_per_s else f"the paper's tokens have {bits_per_s} b/s"
        for mode, paper in zip(abx.MODES, paper_abx, strict=True):
            low, high = row[f"interval_{mode}"] or (None, None)
            results.append(Result("I", item, f"ABX {mode} %", row[mode], low, high, table["items"], "triphones", paper=paper,
                                  note=note if row[mode] is not None else "an imported codec gives no vectors to compare"))
        if row["visqol"] is not None:
            results.append(Result("I", item, "ViSQOL", row["visqol"], n=table["clips"], paper=paper_visqol, note=note))
    return results
