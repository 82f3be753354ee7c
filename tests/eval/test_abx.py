"""ABX against a plain oracle (loops and dicts, after eval_ABX.py's text), at its edges, and from the command line."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest

from audiolm import rng
from audiolm.eval.metrics import abx, dtw
from tests.worlds.abx_items import HEADER
from workflows import evaluate as command


def plain_angle(a, b):
    na, nb = math.sqrt(sum(v * v for v in a)), math.sqrt(sum(v * v for v in b))
    if na == 0 or nb == 0:
        return 0.0 if na == nb else 1.0
    dot = sum(p * q for p, q in zip(a, b, strict=True)) / na / nb
    return 0.0 if tuple(a) == tuple(b) else math.acos(max(-1.0, min(1.0, dot))) / math.pi


def plain_dtw(x, y, between):
    cost = {}
    for i, j in itertools.product(range(len(x)), range(len(y))):
        before = [cost[p] for p in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if p in cost]
        cost[i, j] = np.float32(between(x[i], y[j])) + (min(before) if before else np.float32(0))
    i, j, steps = len(x) - 1, len(y) - 1, 1
    while i or j:
        up, left, corner = (cost.get(p, math.inf) for p in ((i - 1, j), (i, j - 1), (i - 1, j - 1)))
        if corner <= left and corner <= up:
            i, j = i - 1, j - 1
        elif left <= up:
            j -= 1
        else:
            i -= 1
        steps += 1
    return cost[len(x) - 1, len(y) - 1] / np.float32(steps)


def plain_abx(features, rows, rate_hz, mode, seed=0, most=10, most_x=5, between=plain_angle):
    """rows: (file, onset, offset, phone, before, after, speaker)."""
    groups = defaultdict(list)
    for file, on, off, phone, before, after, speaker in rows:
        first, last = (Fraction(str(rate_hz)) * Fraction(str(t)) - Fraction(1, 2) for t in (on, off))
        first, last = max(0, math.ceil(first)), math.floor(last)
        if len(x := features[file][first:last].tolist()):
            groups[f"{before} {after}", speaker, phone].append(x)
    for (c, s, p), members in groups.items():
        if len(members) > most:
            pick = rng.generator(seed, f"abx items|{c}|{s}|{p}").choice(len(members), most, replace=False)
            groups[c, s, p] = [members[i] for i in sorted(pick)]
    table = defaultdict(lambda: defaultdict(list))  # (phone a, phone b) -> speaker -> errors by context (and X's speaker)
    for c, s, p in sorted(groups):
        if mode == "within":
            sources = [s] if len(groups[c, s, p]) > 1 else []
        else:
            sources = sorted(t for d, t, q in groups if d == c and q == p and t != s)
            if len(sources) > most_x:
                pick = rng.generator(seed, f"abx speakers|{c}|{s}|{p}").choice(len(sources), most_x, replace=False)
                sources = [sources[i] for i in sorted(pick)]
        for t in sources:
            for q in [q for d, u, q in groups if (d, u) == (c, s) and q != p]:
                errors = []
                for (i, x), (j, a) in itertools.product(enumerate(groups[c, t, p]), enumerate(groups[c, s, p])):
                    if mode == "within" and i == j:
                        continue
                    first, second = (x, a) if mode == "across" or i < j else (a, x)
                    ax = plain_dtw(first, second, between)
                    for b in groups[c, s, q]:
                        bx = plain_dtw(x, b, between)
                        errors.append(1.0 if ax > bx else 0.5 if ax == bx else 0.0)
                table[p, q][s].append(np.mean(errors))
    return 100 * np.mean([np.mean([np.mean(by_context) for by_context in pair.values()]) for pair in table.values()])


def corpus(tmp_path, seed, draw, speakers=4, n=70, seconds=8.0, rate_hz=25.0):
    """Items of few contexts and phones over files whose frames `draw(generator, frames)` makes."""
    g = np.random.default_rng(seed)
    features = {f"f{s}": draw(g, int(seconds * rate_hz)).astype(np.float32) for s in range(speakers)}
    rows = []
    for _ in range(n):
        s, on, length = int(g.integers(speakers)), round(g.uniform(0, seconds - 0.5), 2), round(g.uniform(0.06, 0.5), 2)
        rows.append((f"f{s}", on, round(on + length, 2), "abc"[g.integers(3)], "xy"[g.integers(2)], "z", f"s{s}"))
    path = tmp_path / "some.item"
    path.write_text(HEADER + "".join(" ".join(map(str, r)) + "\n" for r in rows))
    return features, rows, abx.read_items(str(path))


def gaussian(g, frames):
    return g.standard_normal((frames, 5))


def tokens(g, frames):
    """Centroids of a few codes in runs: many equal frames and so ties of paths and of distances; the last one is null."""
    book = np.concatenate([np.random.default_rng(7).standard_normal((3, 4)), np.zeros((1, 4))])
    return book[np.repeat(g.integers(0, 4, frames), g.integers(1, 4, frames))[:frames]]


@pytest.mark.parametrize("draw", (gaussian, tokens))
@pytest.mark.parametrize("most, most_x", ((10, 5), (3, 2)))
def test_equals_the_plain_oracle(tmp_path, monkeypatch, draw, most, most_x):
    """Whole groups and drawn ones alike, over blocks that hold a few items only and batches of few pairs."""
    monkeypatch.setattr(dtw, "CELLS", 3000)
    monkeypatch.setattr(dtw, "WAVE", 64)
    features, rows, items = corpus(tmp_path, 1, draw)
    found = abx.abx(features, items, 25.0, abx.Protocol(3, most, most_x))
    for mode in abx.MODES:
        assert found[mode] == pytest.approx(plain_abx(features, rows, 25.0, mode, 3, most, most_x), abs=1e-6)
        assert 20 < found[mode] < 80 and found[f"interval_{mode}"][0] <= found[mode] <= found[f"interval_{mode}"][1]


def test_long_items_share_batches_with_others(tmp_path):
    """At 100 Hz pairs of unlike lengths are found together: the padding of the shorter must not be seen."""
    features, rows, items = corpus(tmp_path, 2, gaussian, speakers=2, n=28, rate_hz=100.0)
    found = abx.abx(features, items, 100.0)
    for mode in abx.MODES:
        assert found[mode] == pytest.approx(plain_abx(features, rows, 100.0, mode), abs=1e-6)


@pytest.mark.parametrize("draw", (gaussian, tokens))
def test_euclidean(tmp_path, draw):
    features, rows, items = corpus(tmp_path, 3, draw, n=60)
    found = abx.abx(features, items, 25.0, abx.Protocol(distance="euclidean"))
    for mode in abx.MODES:
        assert found[mode] == pytest.approx(plain_abx(features, rows, 25.0, mode, between=math.dist), abs=1e-6)


def test_null_frames_without_a_codebook(tmp_path, monkeypatch):
    def some_null(g, frames):
        return g.standard_normal((frames, 5)) * (g.random((frames, 1)) > 0.3)

    monkeypatch.setattr(dtw, "CODEBOOK", 2)
    features, rows, items = corpus(tmp_path, 4, some_null, n=60)
    assert abx.abx(features, items, 25.0)["across"] == pytest.approx(plain_abx(features, rows, 25.0, "across"), abs=1e-6)


def test_agrees_with_fastabx(tmp_path, monkeypatch):
    fastabx = pytest.importorskip("fastabx", reason="fastabx is not installed (it needs Python 3.12)")
    import torch

    monkeypatch.setenv("FASTABX_WITH_LIBRILIGHT_BUG", "1")  # libri-light's frames: the last one of an item is left out

    features, _, items = corpus(tmp_path, 1, gaussian)
    for name, x_TD in features.items():
        torch.save(torch.from_numpy(x_TD), tmp_path / f"{name}.pt")
    found = abx.abx(features, items, 25.0, abx.Protocol(0, 1000, 1000))
    for mode in abx.MODES:
        theirs = fastabx.zerospeech_abx(tmp_path / "some.item", tmp_path, max_size_group=None, max_x_across=None, speaker=mode,
                                        frequency=25)
        assert found[mode] == pytest.approx(100 * theirs, abs=1e-3)


def test_phones_that_sound_apart_score_0_equal_ones_50(tmp_path):
    _, rows, items = corpus(tmp_path, 5, gaussian, n=120)
    apart = {f"f{s}": np.zeros((800, 3), np.float32) for s in range(4)}
    rows = [(f, 5 * n * 0.04, (5 * n + 4) * 0.04, *r) for n, (f, _, _, *r) in enumerate(rows)]
    path = tmp_path / "apart.item"
    path.write_text(HEADER + "".join(" ".join(map(str, r)) + "\n" for r in rows))
    for file, on, _, phone, *_ in rows:
        apart[file][round(on * 25):round(on * 25) + 4, "abc".index(phone)] = 1.0
    found = abx.abx(apart, abx.read_items(str(path)), 25.0)
    assert found["within"] == found["across"] == 0.0 and found["interval_across"] == [0.0, 0.0]
    same = abx.abx({f: np.ones((200, 3), np.float32) for f in apart}, items, 25.0)
    assert same["within"] == same["across"] == 50.0


def test_speakers_seeds_and_paired_differences(tmp_path):
    features, rows, items = corpus(tmp_path, 6, gaussian, n=150)
    two = abx.abx(features, items.of(["s0", "s2"]), 25.0, abx.Protocol(max_size_group=1000))
    theirs = [r for r in rows if r[6] in ("s0", "s2")]
    assert two["across"] == pytest.approx(plain_abx(features, theirs, 25.0, "across", most=1000), abs=1e-6)
    assert list(two["by_speaker_within"]) == ["s0", "s2"]
    once, again, other = (abx.scores(features, items, 25.0, abx.Protocol(s, 4))["across"] for s in (0, 0, 1))
    assert np.array_equal(once.error_SE, again.error_SE, equal_nan=True) and abx.mean(once) != abx.mean(other)
    blurred = {f: x + 3 for f, x in features.items()}
    worse = abx.scores(blurred, items, 25.0, abx.Protocol(0, 4))["across"]
    change, lo, hi = abx.difference(worse, once)
    assert change == pytest.approx(abx.mean(worse) - abx.mean(once)) and lo <= change <= hi
    assert abx.difference(once, again) == (0.0, 0.0, 0.0)


def test_items_shorter_than_a_frame_are_dropped_and_counted(tmp_path):
    features, rows, items = corpus(tmp_path, 1, gaussian)
    slow = {f: x_TD[::4] for f, x_TD in features.items()}
    short = sum(math.floor(6.25 * r[2] - 0.5) <= math.ceil(6.25 * r[1] - 0.5) for r in rows)
    found = abx.abx(slow, items, 6.25)
    assert short and found["dropped"] == short and found["items"] == len(rows) - short
    assert found["across"] == pytest.approx(plain_abx(slow, rows, 6.25, "across"), abs=1e-6)


def test_what_does_not_fit_is_refused(tmp_path):
    features, _, items = corpus(tmp_path, 1, gaussian)
    cases = (
        (lambda: abx.abx({k: v for k, v in features.items() if k != "f1"}, items, 25.0), "1 of the items' 4 files.*f1"),
        (lambda: abx.abx(features, items, 50.0), "rate_hz is wrong"),
        (lambda: abx.abx({f: x * np.nan for f, x in features.items()}, items, 25.0), "NaN"),
        (lambda: abx.abx({**features, "f0": features["f0"][:, :3]}, items, 25.0), r"\[3, 5\] dimensions"),
        (lambda: items.of(["s0", "s9"]), r"\['s9'\] have no items"),
        (lambda: abx.abx(features, items.of(["s0"]), 25.0), "no across triplet"),
        (lambda: abx.Protocol(modes=("between",)), "between"),
        (lambda: abx.Protocol(distance="cosine"), "cosine"),
        (lambda: abx.Protocol(max_size_group=1), "max_size_group 1"),
    )
    for call, text in cases:
        with pytest.raises(ValueError, match=text):
            call()
    path = tmp_path / "bad.item"
    for content, text in (("", "missing"), (HEADER, "no items"), ("#file onset offset #phone speaker\n", "columns"),
                          (HEADER + "f0 0.1 0.3 a x z s0\nf0 0.3 0.1 a x z s0\n", "row 3"),
                          (HEADER + "f0 0.1 a x z s0\n", "row 2"),
                          (HEADER + "f0 zero 0.1 a x z s0\n", "row 2")):
        path.write_text(content)
        with pytest.raises(ValueError, match=text):
            abx.read_items(str(path))


def test_features_of_a_tokenizer():
    """A frame's centroid is the nearest to its z-scored features; frames are the tokens'."""
    import torch

    from audiolm.models.conformer import Encoder, EncoderSizes
    from audiolm.tokenizers.extractor import ConformerExtractor, Window
    from audiolm.tokenizers.semantic import SemanticTokenizer, golden_clip

    torch.manual_seed(0)
    heard = ConformerExtractor(Encoder(EncoderSizes(dim=8, layers=1, heads=2, ff=16, conv_kernel=3, dropout=0.0)))
    raw = SemanticTokenizer(heard, 1, torch.zeros(8), torch.ones(8), torch.randn(5, 8), Window(400, 50), "")
    wav_T = golden_clip()[0].numpy()
    std_D, mean_D = torch.std_mean(torch.from_numpy(abx.extractor("semantic", raw)[0](wav_T)), 0)
    tokenizer = SemanticTokenizer(heard, 1, mean_D, std_D, raw.centroids_KD, raw.window, "")
    (features, rate), (centroids, same_rate) = (abx.extractor(kind, tokenizer) for kind in ("semantic", "centroids"))
    x_TD, c_TD = features(wav_T), centroids(wav_T)
    assert rate == same_rate == 25.0 and x_TD.shape == c_TD.shape == (50, 8)
    book_KD = tokenizer.centroids_KD.numpy()
    nearest_T = ((x_TD[:, None] - book_KD) ** 2).sum(-1).argmin(1)
    assert np.array_equal(c_TD, book_KD[nearest_T]) and len(set(nearest_T)) > 1
    mfcc_TD = abx.extractor("mfcc")[0](wav_T[:16_001])
    assert mfcc_TD.shape == (101, 39)
    assert np.allclose(mfcc_TD.mean(0), 0, atol=1e-4) and np.allclose(mfcc_TD.std(0), 1, atol=1e-3)
    assert abx.extractor("mel")[0](wav_T).shape == (200, 80) and abx.extractor("mel")[1] == 100.0
    with pytest.raises(ValueError, match="need no"):
        abx.extractor("mel", tokenizer)


def test_command_line(tmp_path, capsys):
    """Tones for phones: the features of sound files tell them apart; a file that is missing is named."""
    from audiolm.data.audio import wav_bytes

    g, rows = np.random.default_rng(0), []
    for s in range(2):
        wav, n = [], 0
        for phone, _ in itertools.product("ab", range(3)):
            tone = np.sin(2 * np.pi * {"a": 300, "b": 2500}[phone] * (1 + 0.03 * s) * np.arange(4000) / 16_000)
            wav.append(0.3 * tone + 0.01 * g.standard_normal(4000))
            rows.append(f"f{s} {n * 0.25:.2f} {n * 0.25 + 0.2:.2f} {phone} x y s{s}\n")
            n += 1
        (tmp_path / "deep").mkdir(exist_ok=True)
        (tmp_path / "deep" / f"f{s}.wav").write_bytes(wav_bytes(np.concatenate(wav)))
    (tmp_path / "a.item").write_text(HEADER + "".join(rows))
    line = ["abx", "--items", str(tmp_path / "a.item"), "--audio", str(tmp_path), "--json", str(tmp_path / "out.json")]
    for kind in ("mfcc", "mel"):
        assert command.main([*line, "--features", kind]) == 0
        out = capsys.readouterr().out
        assert f"{kind} within speaker: 0.00 %" in out and f"{kind} across speaker: 0.00 %" in out and "12 items (0 " in out
    (tmp_path / "deep" / "f1.wav").write_bytes(b"no sound")
    assert command.main([*line, "--features", "mel"]) == 2 and "f1.wav" in capsys.readouterr().err
    (tmp_path / "deep" / "f1.wav").unlink()
    assert command.main([*line, "--features", "mel"]) == 2 and "f1" in capsys.readouterr().err
    assert command.main([*line, "--features", "semantic"]) == 2 and "tokenizer" in capsys.readouterr().err
