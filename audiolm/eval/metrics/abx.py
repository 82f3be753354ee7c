"""ABX phone discriminability of features (paper III-B and Table I), by libri-light's protocol (eval_ABX.py).

Items are triphones with the same neighbours (context). A triplet (A, B, X): A and X share the centre phone, B differs; A and
B are of one speaker, X of the same (within) or of another (across). It errs where d(A, X) > d(B, X), by half where they tie;
d is a DTW's mean over its path of the angle between frames / pi. Scores are means over contexts (across: contexts and X's
speakers together), then A's speakers, then ordered phone pairs, in %. An item is frames ceil(hz * onset - 0.5) to
floor(hz * offset - 0.5), the end exclusive. Legend: N items, F frames, D dimensions, S speakers, P phones (E: times P * P).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audiolm import rng, store
from audiolm.eval.metrics.dtw import DISTANCES, ItemFrames
from audiolm.eval.metrics.stats import interval, resampled
from audiolm.models.mel import HOP, log_mel, mfcc
from audiolm.tokenizers.base import SAMPLE_RATE
from audiolm.tokenizers.semantic import SemanticTokenizer

MODES = ("within", "across")
KINDS = ("mfcc", "mel", "semantic", "centroids")
COLUMNS = ("#file", "onset", "offset", "#phone", "prev-phone", "next-phone", "speaker")  # ZeroSpeech's
SLACK_S = 0.25  # by which an alignment may run past its file's end
PURPOSE = "abx bootstrap"  # of the random numbers that draw speakers

Features = Mapping[str, Any] | Callable[[str], Any]


@dataclass(frozen=True)
class Items:
    """Triphones, arrays of N: times in seconds, the rest text; `context` is (previous, next) joined by a space."""

    file: np.ndarray
    onset_s: np.ndarray
    offset_s: np.ndarray
    phone: np.ndarray
    context: np.ndarray
    speaker: np.ndarray

    def of(self, speakers: Iterable[str]) -> Items:
        """Those of some speakers. Raises ValueError for a speaker who has none."""
        wanted = list(speakers)
        if unknown := sorted(set(wanted) - set(self.speaker.tolist())):
            raise ValueError(f"speakers {unknown} have no items; those with items: {sorted(set(self.speaker.tolist()))}")
        keep = np.isin(self.speaker, wanted)
        return Items(*(getattr(self, f)[keep] for f in self.__dataclass_fields__))


@dataclass(frozen=True)
class Scores:
    """One mode's errors: `error_SE` in 0 to 1 by A's speaker and ordered phone pair, NaN where there is no triplet."""

    speakers: tuple[str, ...]
    error_SE: np.ndarray
    triplets: int
    distances: int  # pairs of items compared
    items: int
    dropped: int  # items shorter than a frame


def read_items(path: str) -> Items:
    """A ZeroSpeech item file: a header, then `file onset offset phone previous next speaker` a line.

    Raises FileNotFoundError; ValueError with the line for other columns, times that are none, and a file without items."""
    lines = [line.split() for line in store.get(path).decode().splitlines() if line.strip()]
    if not lines or tuple(lines[0]) != COLUMNS:
        raise ValueError(f"{path}: its columns are {' '.join(lines[0]) if lines else 'missing'!r}, expected "
                         f"{' '.join(COLUMNS)!r}; write them as its first line")
    if len(lines) == 1:
        raise ValueError(f"{path} holds no items, only the header; give a file with triphones")
    for number, row in enumerate(lines[1:], 2):
        try:
            good = len(row) == len(COLUMNS) and 0 <= float(row[1]) < float(row[2]) < math.inf
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"{path}: row {number} is {' '.join(row)!r}; expected seven columns and "
                             "0 <= onset < offset in seconds")
    file, onset, offset, phone, before, after, speaker = (np.array(c) for c in zip(*lines[1:], strict=True))
    context = np.array([f"{a} {b}" for a, b in zip(before, after, strict=True)])
    return Items(file, onset.astype(np.float64), offset.astype(np.float64), phone, context, speaker)


def abx(features: Features, items: Items, rate_hz: float, mode: Sequence[str] = MODES, speakers: Sequence[str] | None = None,
        seed: int = 0, max_size_group: int = 10, max_x_across: int = 5, distance: str = "angular") -> dict[str, Any]:
    """`summary` of each of `scores`' modes, as JSON: {"within": %, "interval_within": [lo, hi], ..., "across": ...}."""
    found = scores(features, items, rate_hz, mode, speakers, seed, max_size_group, max_x_across, distance)
    return {key: value for m, s in found.items() for key, value in summary(m, s, seed).items()}


def scores(features: Features, items: Items, rate_hz: float, mode: Sequence[str] = MODES,
           speakers: Sequence[str] | None = None, seed: int = 0, max_size_group: int = 10, max_x_across: int = 5,
           distance: str = "angular") -> dict[str, Scores]:
    """Errors by mode. `features`: file id -> (T, D), a frame being 1 / rate_hz s; a mapping, or a function, called once a file.

    speakers: A, B and X are of these alone. A (context, phone, speaker) with more than max_size_group items is represented by
    that many, drawn once; each (context, A's phone, A's speaker) meets at most max_x_across speakers X. The draws depend on
    the seed and those names, so that features of one rate meet the same triplets.
    Raises ValueError for files without features, frames that are not finite or end before the items do, and where no
    triplet can be formed.
    """
    if unknown := sorted(set(mode) - set(MODES)):
        raise ValueError(f"mode {unknown}: choose from {list(MODES)}")
    if distance not in DISTANCES:
        raise ValueError(f"distance {distance!r}: choose from {list(DISTANCES)}")
    if min(max_size_group, max_x_across) < 1 or max_size_group < 2:
        raise ValueError(f"max_size_group {max_size_group} must be at least 2 and max_x_across {max_x_across} at least 1")
    items = items if speakers is None else items.of(speakers)
    frames, kept = _segments(features, items, rate_hz)
    groups = _groups(items, kept, seed, max_size_group)
    data = ItemFrames([[frames[i] for i in members] for members in groups.values()], distance)
    result = {}
    for m in mode:
        trials = _within(groups) if m == "within" else _across(groups, seed, max_x_across)
        if not trials:
            raise ValueError(f"no {m} triplet: the {len(kept)} items hold no two phones in one context and speaker"
                             f"{' with a second item of one' if m == 'within' else ' with another speaker'}; give more items")
        result[m] = _scored(data, groups, trials, m == "within", len(kept), len(items.file) - len(kept))
    return result


def summary(mode: str, s: Scores, seed: int = 0) -> dict[str, Any]:
    """{mode}: error in %; interval_{mode}: 95 % by bootstrap over A's speakers; by_speaker_{mode}: {speaker: %};
    triplets_{mode}, pairs_{mode} (of items compared), phone_pairs_{mode}; items and dropped."""
    weights_WS = resampled(len(s.speakers), seed, PURPOSE)
    by_speaker = (100.0 * np.nanmean(s.error_SE, axis=1)).tolist()
    return {mode: mean(s), f"interval_{mode}": list(interval(_errors(s, weights_WS))),
            f"by_speaker_{mode}": dict(zip(s.speakers, by_speaker, strict=True)),
            f"triplets_{mode}": s.triplets, f"pairs_{mode}": s.distances,
            f"phone_pairs_{mode}": int((~np.isnan(s.error_SE)).any(0).sum()), "items": s.items, "dropped": s.dropped}


def mean(s: Scores) -> float:
    """Error in %: the mean over phone pairs of the mean over speakers."""
    return float(_errors(s, np.ones((1, len(s.speakers))))[0])


def difference(a: Scores, b: Scores, seed: int = 0) -> tuple[float, float, float]:
    """(a's error minus b's, and its 95 % interval) in points, the same speakers drawn for both."""
    if a.speakers != b.speakers:
        raise ValueError(f"scores of different speakers cannot be paired: {a.speakers} and {b.speakers}")
    weights_WS = resampled(len(a.speakers), seed, PURPOSE)
    return mean(a) - mean(b), *interval(_errors(a, weights_WS) - _errors(b, weights_WS))


def _errors(s: Scores, weights_WS: np.ndarray) -> np.ndarray:
    """% for each row of speakers' weights."""
    there_SE = ~np.isnan(s.error_SE)
    count_WE = weights_WS @ there_SE
    total_WE = weights_WS @ np.where(there_SE, s.error_SE, 0.0)
    mean_WE = np.divide(total_WE, count_WE, out=np.zeros_like(total_WE), where=count_WE > 0)
    return 100.0 * mean_WE.sum(1) / (count_WE > 0).sum(1)


def _segments(features: Features, items: Items, rate_hz: float) -> tuple[dict[int, np.ndarray], list[int]]:
    """(item -> its frames, the items that have any)."""
    get = features if callable(features) else features.get
    by_file = defaultdict(list)
    for i, name in enumerate(items.file.tolist()):
        by_file[name].append(i)
    # 25 x 0.58 is a hair below 14.5 in floating point; times are decimals, and a half has to be one
    on, off = (np.round(rate_hz * t, 6) - 0.5 for t in (items.onset_s, items.offset_s))
    first, last = np.maximum(np.ceil(on), 0).astype(int), np.floor(off).astype(int)
    frames, missing, dims = {}, [], set()
    for name, members in by_file.items():
        x_TD = get(name)
        if x_TD is None:
            missing.append(name)
            continue
        x_TD = np.asarray(x_TD, dtype=np.float32)
        if x_TD.ndim != 2 or not np.isfinite(x_TD).all():
            raise ValueError(f"features of file {name}: shape {x_TD.shape}; expected (T, D) without NaN or infinity")
        dims.add(x_TD.shape[1])
        end_s = items.offset_s[members].max()
        if len(x_TD) < (end_s - SLACK_S) * rate_hz:
            raise ValueError(f"features of file {name} end at {len(x_TD) / rate_hz:.2f} s (T = {len(x_TD)} at {rate_hz:g} Hz), "
                             f"its items at {end_s:.2f} s: rate_hz is wrong, or the file is another one")
        frames |= {i: x_TD[first[i]:last[i]] for i in members if first[i] < min(last[i], len(x_TD))}
    if missing:
        raise ValueError(f"{len(missing)} of the items' {len(by_file)} files have no features, {', '.join(missing[:3])} say: "
                         "add them, or give the items of the files that have")
    if len(dims) > 1:
        raise ValueError(f"features have {sorted(dims)} dimensions: all files must have the same D")
    return frames, sorted(frames)


Group = tuple[str, str, str]  # context, speaker, phone


def _groups(items: Items, kept: list[int], seed: int, most: int) -> dict[Group, list[int]]:
    """The items that stand for each group, in the order of the names."""
    found = defaultdict(list)
    for i in kept:
        found[str(items.context[i]), str(items.speaker[i]), str(items.phone[i])].append(i)
    drawn = {}
    for key in sorted(found):
        members = found[key]
        if len(members) > most:
            pick = rng.generator(seed, f"abx items|{'|'.join(key)}").choice(len(members), most, replace=False)
            members = [members[j] for j in sorted(pick)]
        drawn[key] = members
    return drawn


Trial = tuple[Group, Group, Group]  # A, B, X


def _phones(groups: Iterable[Group]) -> dict[tuple[str, str], list[Group]]:
    """The groups of each context and speaker who has several phones there."""
    found = defaultdict(list)
    for key in groups:
        found[key[:2]].append(key)
    return {k: v for k, v in found.items() if len(v) > 1}


def _within(groups: dict[Group, list[int]]) -> list[Trial]:
    return [(a, b, a) for same in _phones(groups).values() for a in same if len(groups[a]) > 1 for b in same if b != a]


def _across(groups: dict[Group, list[int]], seed: int, most: int) -> list[Trial]:
    others = defaultdict(list)
    for key in groups:
        others[key[0], key[2]].append(key)
    trials = []
    for same in _phones(groups).values():
        for a in same:
            xs = [x for x in others[a[0], a[2]] if x != a]
            if len(xs) > most:
                pick = rng.generator(seed, f"abx speakers|{'|'.join(a)}").choice(len(xs), most, replace=False)
                xs = [xs[j] for j in sorted(pick)]
            trials += [(a, b, x) for x in xs for b in same if b != a]
    return trials


def _scored(data: ItemFrames, groups: dict[Group, list[int]], trials: list[Trial], symmetric: bool, items: int,
            dropped: int) -> Scores:
    """Measures the pairs of items that the trials need, each once, and averages the trials' errors."""
    number = {key: n for n, key in enumerate(groups)}
    size_G = np.array([len(v) for v in groups.values()])
    first_G = np.cumsum(size_G) - size_G  # a group's items lie together in `data`
    a_R, b_R, x_R = np.array([[number[key] for key in trial] for trial in trials]).T
    blocks, at = np.unique(np.stack([x_R, x_R]) * len(size_G) + np.stack([a_R, b_R]), return_inverse=True)
    x_K, y_K = np.divmod(blocks, len(size_G))  # a block: the items of one group by those of another
    cells_K = size_G[x_K] * size_G[y_K]
    start_K = np.cumsum(cells_K) - cells_K
    inside = np.arange(cells_K.sum()) - np.repeat(start_K, cells_K)
    i, j = np.divmod(inside, np.repeat(size_G[y_K], cells_K))
    i, j = i + np.repeat(first_G[x_K], cells_K), j + np.repeat(first_G[y_K], cells_K)
    if symmetric:  # libri-light measures A against A once, from the earlier item
        i, j = np.where(np.repeat(x_K == y_K, cells_K), (np.minimum(i, j), np.maximum(i, j)), (i, j))
    pairs, where = np.unique(i * data.n + j, return_inverse=True)
    distance = data.dtw(*np.divmod(pairs, data.n))[where]

    na_R, nb_R, nx_R = size_G[a_R], size_G[b_R], size_G[x_R]
    error_R = np.zeros(len(trials))
    at_a, at_b = start_K[at.reshape(2, -1)]
    _, shape_R = np.unique(np.stack([nx_R, na_R, nb_R]), axis=1, return_inverse=True)
    order = np.argsort(shape_R, kind="stable")
    for same in np.split(order, np.flatnonzero(np.diff(shape_R[order])) + 1):
        nx, na, nb = nx_R[same[0]], na_R[same[0]], nb_R[same[0]]
        a = distance[at_a[same, None] + np.arange(nx * na)].reshape(-1, nx, na, 1)
        b = distance[at_b[same, None] + np.arange(nx * nb)].reshape(-1, nx, 1, nb)
        wrong = (a > b) + 0.5 * (a == b)
        if symmetric:  # X is never A itself
            wrong[:, np.arange(na), np.arange(na)] = 0
        error_R[same] = wrong.sum((1, 2, 3)) / ((na * (na - 1) if symmetric else na * nx) * nb)

    speakers, s_R = np.unique([a[1] for a, _, _ in trials], return_inverse=True)
    phones, p = np.unique([[a[2], b[2]] for a, b, _ in trials], return_inverse=True)
    p = p.reshape(-1, 2)
    cell_R = (s_R * len(phones) + p[:, 0]) * len(phones) + p[:, 1]
    total, count = (np.bincount(cell_R, w, len(speakers) * len(phones) ** 2) for w in (error_R, None))
    error = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return Scores(tuple(speakers.tolist()), error.reshape(len(speakers), -1),
                  int(((na_R - 1 if symmetric else nx_R) * na_R * nb_R).sum()), len(pairs), items, dropped)


def extractor(kind: str, tokenizer: SemanticTokenizer | None = None) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """(wav_T at 16 kHz -> features (T, D), their rate in Hz): mfcc (13 with first and second differences, each standardised
    over the file: as they come the first, loudness, rules the angle), mel (80 log-mels, as they come), or of a semantic
    tokenizer its z-scored features or each frame's centroid, which is what the paper measures of tokens."""
    if kind not in KINDS:
        raise ValueError(f"features {kind!r}: choose from {list(KINDS)}")
    if (kind in KINDS[2:]) != (tokenizer is not None):
        raise ValueError(f"features {kind!r} {'come from' if tokenizer is None else 'need no'} a semantic tokenizer")

    @torch.inference_mode()
    def spectral(wav_T: np.ndarray) -> np.ndarray:
        wav_1T = torch.nn.functional.pad(torch.from_numpy(wav_T), (0, -len(wav_T) % HOP))[None]
        mel_1TF = log_mel(wav_1T, sample_rate=SAMPLE_RATE)
        if kind == "mel":
            return mel_1TF[0].numpy()
        std_D, mean_D = torch.std_mean(x_TD := mfcc(mel_1TF)[0], 0, correction=0)
        return ((x_TD - mean_D) / std_D.clamp_min(1e-5)).numpy()

    @torch.inference_mode()
    def semantic(wav_T: np.ndarray) -> np.ndarray:
        wav_1T, length_1 = torch.from_numpy(wav_T)[None], torch.tensor([len(wav_T)])
        if kind == "semantic":
            return tokenizer.features(wav_1T, length_1)[0][0].cpu().numpy()
        return tokenizer.centroids_KD.cpu()[tokenizer.encode(wav_1T, length_1)[0][:, 0]].numpy()

    return (spectral, SAMPLE_RATE / HOP) if tokenizer is None else (semantic, tokenizer.spec.rate_hz)
