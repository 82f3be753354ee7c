"""ABX phone discriminability of features (paper III-B and Table I), by libri-light's protocol (eval_ABX.py).

Items are triphones with the same neighbours (context).  In a triplet (A, B, X), A and X share the centre phone and B
differs; A and B are of one speaker, X of the same (within) or of another (across).  A triplet errs where d(A, X) >
d(B, X), by half where they tie; d is the mean angle between frames / pi along a DTW path.
Scores are means over contexts (across: and X's speakers), then A's speakers, then ordered phone pairs, in %.
Legend: N items, F frames, D dimensions, G groups, R trials (groups of A, B and X), K blocks of distances, S speakers,
P phones, E ordered phone pairs (P * P), W resamples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audiolm import rng, store
from audiolm.eval.metrics.dtw import ItemFrames
from audiolm.eval.metrics.stats import interval, resampled
from audiolm.models.mel import HOP, clip_mel, mfcc
from audiolm.tokenizers.base import SAMPLE_RATE
from audiolm.tokenizers.semantic import SemanticTokenizer

MODES = ("within", "across")
KINDS = ("mfcc", "mel", "semantic", "centroids")
COLUMNS = ("#file", "onset", "offset", "#phone", "prev-phone", "next-phone", "speaker")  # ZeroSpeech's
SLACK_S = 0.25  # an alignment may run past its file's end by this much
PURPOSE = "abx bootstrap"  # of the random numbers that draw speakers

Features = Mapping[str, Any] | Callable[[str], Any]  # file id -> (T, D)
Group = tuple[str, str, str]  # context, speaker, phone: items that are interchangeable as A, B or X
Trial = tuple[Group, Group, Group]  # A, B, X


@dataclass(frozen=True)
class Protocol:
    """Sampling of the triplets; the defaults are libri-light's and ZeroSpeech 2021's.

    A group of more than max_size_group items is represented by that many, drawn once; their script, the same elsewhere,
    draws them anew for each A, B and X, without a seed.  Each (context, A's phone, A's speaker) meets at most max_x_across
    speakers X.  The draws depend on the seed and those names alone, so features of one rate meet the same triplets.
    Raises ValueError for an unknown mode and for sizes without a pair.
    """

    seed: int = 0
    max_size_group: int = 10
    max_x_across: int = 5
    modes: tuple[str, ...] = MODES

    def __post_init__(self):
        if unknown := sorted(set(self.modes) - set(MODES)):
            raise ValueError(f"mode {unknown}: choose from {list(MODES)}")
        if self.max_size_group < 2 or self.max_x_across < 1:
            raise ValueError(f"max_size_group {self.max_size_group} must be at least 2, max_x_across {self.max_x_across} 1")


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
        """The items of some speakers. Raises ValueError for a speaker without items."""
        chosen = list(speakers)
        if unknown := sorted(set(chosen) - set(self.speaker.tolist())):
            raise ValueError(f"speakers {unknown} have no items; those with items: {sorted(set(self.speaker.tolist()))}")
        keep = np.isin(self.speaker, chosen)
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
    """Items of a ZeroSpeech file: a header, then `file onset offset phone previous next speaker` a line.

    Raises FileNotFoundError; ValueError, with the line, for other columns, invalid times and a file without items.
    """
    lines = [line.split() for line in store.get(path).decode().splitlines() if line.strip()]
    if not lines or tuple(lines[0]) != COLUMNS:
        raise ValueError(f"{path}: its columns are {' '.join(lines[0]) if lines else 'missing'!r}, expected "
                         f"{' '.join(COLUMNS)!r}; write them as its first line")
    if len(lines) == 1:
        raise ValueError(f"{path} holds no items, only the header; give a file with triphones")
    for number, row in enumerate(lines[1:], 2):
        try:
            valid = len(row) == len(COLUMNS) and 0 <= float(row[1]) < float(row[2]) < math.inf
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"{path}: row {number} is {' '.join(row)!r}; expected seven columns and "
                             "0 <= onset < offset in seconds")
    file, onset, offset, phone, before, after, speaker = (np.array(c) for c in zip(*lines[1:], strict=True))
    context = np.array([f"{a} {b}" for a, b in zip(before, after, strict=True)])
    return Items(file, onset.astype(np.float64), offset.astype(np.float64), phone, context, speaker)


def abx(features: Features, items: Items, rate_hz: float, protocol: Protocol = Protocol()) -> dict[str, Any]:
    """`summary` of each mode's scores, as JSON: {"within": %, "interval_within": [lo, hi], ..., "across": ...}."""
    by_mode = scores(features, items, rate_hz, protocol)
    return {key: value for mode, s in by_mode.items() for key, value in summary(mode, s, protocol.seed).items()}


def scores(features: Features, items: Items, rate_hz: float, protocol: Protocol = Protocol()) -> dict[str, Scores]:
    """Errors by mode. A frame lasts 1 / rate_hz s; where `features` is a function it is called once a file.

    Raises ValueError for files without features, frames that are not finite or end before the items do, and where no
    triplet can be formed.
    """
    frames, kept = _segments(features, items, rate_hz)
    groups = _groups(items, kept, protocol)
    data = ItemFrames([[frames[i] for i in members] for members in groups.values()])
    result = {}
    for mode in protocol.modes:
        within = mode == "within"
        trials = _within(groups) if within else _across(groups, protocol)
        if not trials:
            raise ValueError(f"no {mode} triplet: the {len(kept)} items hold no two phones in one context and speaker"
                             f"{' with a second item of one' if within else ' with another speaker'}; give more items")
        result[mode] = _scored(data, groups, trials, within, (len(kept), len(items.file) - len(kept)))
    return result


def summary(mode: str, s: Scores, seed: int = 0) -> dict[str, Any]:
    """Scores as JSON: {mode}, the error in %; interval_{mode}, 95 % by bootstrap over A's speakers; by_speaker_{mode},
    {speaker: %}; triplets_{mode}, pairs_{mode} (of items compared), phone_pairs_{mode}; items and dropped."""
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
    """(W,) error in % for each row of speakers' weights: the mean over speakers, then over phone pairs.

    float64 throughout: means of thousands of cells, of which two systems' differences are taken.
    """
    known_SE = ~np.isnan(s.error_SE)  # a speaker may lack a phone pair; a resample may lack all who have it
    count_WE = weights_WS @ known_SE
    total_WE = weights_WS @ np.where(known_SE, s.error_SE, 0.0)
    mean_WE = np.divide(total_WE, count_WE, out=np.zeros_like(total_WE), where=count_WE > 0)
    return 100.0 * mean_WE.sum(1) / (count_WE > 0).sum(1)


def _segments(features: Features, items: Items, rate_hz: float) -> tuple[dict[int, np.ndarray], list[int]]:
    """({item: its frames (T, D)}, the items with at least one frame).

    An item is frames ceil(hz * onset - 0.5) to floor(hz * offset - 0.5), the end exclusive.
    """
    read = features if callable(features) else features.get
    by_file = defaultdict(list)
    for i, name in enumerate(items.file.tolist()):
        by_file[name].append(i)
    # Rounded to 6 decimals first: 25 x 0.58 is a hair below 14.5 in floating point, and a half must stay one.
    on, off = (np.round(rate_hz * t, 6) - 0.5 for t in (items.onset_s, items.offset_s))
    first, last = np.maximum(np.ceil(on), 0).astype(int), np.floor(off).astype(int)
    frames, missing, dims = {}, [], set()
    for name, members in by_file.items():
        x_TD = read(name)
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


def _groups(items: Items, kept: list[int], protocol: Protocol) -> dict[Group, list[int]]:
    """The items that represent each group, in the order of the names."""
    members_of = defaultdict(list)
    for i in kept:
        members_of[str(items.context[i]), str(items.speaker[i]), str(items.phone[i])].append(i)
    return {key: _drawn(members_of[key], protocol.max_size_group, protocol.seed, f"abx items|{'|'.join(key)}")
            for key in sorted(members_of)}


def _drawn(choices: list, most: int, seed: int, purpose: str) -> list:
    """At most `most` of the choices, in their order; one generator a group, so that groups do not affect each other."""
    if len(choices) <= most:
        return choices
    return [choices[i] for i in sorted(rng.generator(seed, purpose).choice(len(choices), most, replace=False))]


def _by_context_and_speaker(groups: Iterable[Group]) -> list[list[Group]]:
    """The strata in which A and B are paired: groups of one context and speaker, where there are two phones or more."""
    strata = defaultdict(list)
    for key in groups:
        strata[key[:2]].append(key)
    return [same for same in strata.values() if len(same) > 1]


def _within(groups: dict[Group, list[int]]) -> list[Trial]:
    # X is another item of A's group, so A needs two.
    return [(a, b, a) for same in _by_context_and_speaker(groups) for a in same if len(groups[a]) > 1 for b in same if b != a]


def _across(groups: dict[Group, list[int]], protocol: Protocol) -> list[Trial]:
    by_phone = defaultdict(list)  # (context, phone) -> the groups of all its speakers
    for key in groups:
        by_phone[key[0], key[2]].append(key)
    trials = []
    for same in _by_context_and_speaker(groups):
        for a in same:
            others = [x for x in by_phone[a[0], a[2]] if x != a]
            xs = _drawn(others, protocol.max_x_across, protocol.seed, f"abx speakers|{'|'.join(a)}")
            trials += [(a, b, x) for x in xs for b in same if b != a]
    return trials


def _scored(data: ItemFrames, groups: dict[Group, list[int]], trials: list[Trial], within: bool,
            kept_and_dropped: tuple[int, int]) -> Scores:
    """Scores of one mode: distances of the pairs that the trials need, errors by trial, means by speaker and phone pair."""
    number = {key: n for n, key in enumerate(groups)}
    size_G = np.array([len(v) for v in groups.values()])
    a_R, b_R, x_R = np.array([[number[key] for key in trial] for trial in trials]).T
    distance, starts_2R, pairs = _distances(data, size_G, x_R, np.stack([a_R, b_R]), within)
    sizes_3R = size_G[np.stack([x_R, a_R, b_R])]
    error_R = _errors_by_trial(distance, starts_2R, sizes_3R, within)
    speakers, error_SE = _by_speaker(trials, error_R)
    nx_R, na_R, nb_R = sizes_3R
    triplets = int(((na_R - 1 if within else nx_R) * na_R * nb_R).sum())
    return Scores(speakers, error_SE, triplets, pairs, *kept_and_dropped)


def _distances(data: ItemFrames, size_G: np.ndarray, x_R: np.ndarray, ab_2R: np.ndarray,
               within: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """(distances of all blocks end to end, where the trials' blocks X by A and X by B start, distinct pairs of items).

    A block is the items of one group by those of another, row by row.  Trials share blocks, and blocks share pairs:
    each pair of items goes through DTW once.
    """
    first_G = np.cumsum(size_G) - size_G  # a group's items are neighbours in `data`
    blocks, block_of = np.unique(np.stack([x_R, x_R]) * len(size_G) + ab_2R, return_inverse=True)
    x_K, y_K = np.divmod(blocks, len(size_G))
    cells_K = size_G[x_K] * size_G[y_K]
    start_K = np.cumsum(cells_K) - cells_K
    inside = np.arange(cells_K.sum()) - np.repeat(start_K, cells_K)  # a cell's place within its block
    i, j = np.divmod(inside, np.repeat(size_G[y_K], cells_K))
    i, j = i + np.repeat(first_G[x_K], cells_K), j + np.repeat(first_G[y_K], cells_K)
    if within:  # libri-light measures A against A once, from the earlier item: DTW's ties make it asymmetric
        i, j = np.where(np.repeat(x_K == y_K, cells_K), (np.minimum(i, j), np.maximum(i, j)), (i, j))
    pairs, pair_of = np.unique(i * data.n + j, return_inverse=True)
    return data.dtw(*np.divmod(pairs, data.n))[pair_of], start_K[block_of.reshape(2, -1)], len(pairs)


def _errors_by_trial(distance: np.ndarray, starts_2R: np.ndarray, sizes_3R: np.ndarray, within: bool) -> np.ndarray:
    """(R,) error rate of each trial, in 0 to 1, float64. Trials of equal sizes are compared as one array."""
    (start_a, start_b), error_R = starts_2R, np.zeros(sizes_3R.shape[1])
    _, shape_R = np.unique(sizes_3R, axis=1, return_inverse=True)
    order = np.argsort(shape_R, kind="stable")
    for same in np.split(order, np.flatnonzero(np.diff(shape_R[order])) + 1):
        nx, na, nb = sizes_3R[:, same[0]]
        a = distance[start_a[same, None] + np.arange(nx * na)].reshape(-1, nx, na, 1)
        b = distance[start_b[same, None] + np.arange(nx * nb)].reshape(-1, nx, 1, nb)
        wrong = (a > b) + 0.5 * (a == b)
        if within:  # X and A are items of one group, but never the same item
            wrong[:, np.arange(na), np.arange(na)] = 0
        error_R[same] = wrong.sum((1, 2, 3)) / ((na * (na - 1) if within else na * nx) * nb)
    return error_R


def _by_speaker(trials: list[Trial], error_R: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """(A's speakers, error_SE): means over contexts (across: and X's speakers) of each speaker and ordered phone pair."""
    speakers, s_R = np.unique([a[1] for a, _, _ in trials], return_inverse=True)
    phones, p = np.unique([[a[2], b[2]] for a, b, _ in trials], return_inverse=True)
    a_R, b_R = p.reshape(-1, 2).T
    cell_R = (s_R * len(phones) + a_R) * len(phones) + b_R
    total, count = (np.bincount(cell_R, w, len(speakers) * len(phones) ** 2) for w in (error_R, None))
    error = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return tuple(speakers.tolist()), error.reshape(len(speakers), -1)


def extractor(kind: str, tokenizer: SemanticTokenizer | None = None) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """(function of wav_T at 16 kHz that gives features (T, D), their rate in Hz).

    mfcc: 13 with first and second differences, each standardised over the file, because the first one, loudness, would
    otherwise dominate the angle; mel: 80 log-mels; semantic: a tokenizer's z-scored features; centroids: each frame's
    centroid, which is what the paper measures of tokens.  Raises ValueError for a kind without its tokenizer.
    """
    if kind not in KINDS:
        raise ValueError(f"features {kind!r}: choose from {list(KINDS)}")
    if (kind in KINDS[2:]) != (tokenizer is not None):
        raise ValueError(f"features {kind!r} {'come from' if tokenizer is None else 'need no'} a semantic tokenizer")

    @torch.inference_mode()
    def spectral(wav_T: np.ndarray) -> np.ndarray:
        mel_TF = clip_mel(wav_T)
        if kind == "mel":
            return mel_TF.numpy()
        std_D, mean_D = torch.std_mean(x_TD := mfcc(mel_TF[None])[0], 0, correction=0)
        return ((x_TD - mean_D) / std_D.clamp_min(1e-5)).numpy()

    @torch.inference_mode()
    def semantic(wav_T: np.ndarray) -> np.ndarray:
        wav_1T, length_1 = torch.from_numpy(wav_T)[None], torch.tensor([len(wav_T)])
        if kind == "semantic":
            return tokenizer.features(wav_1T, length_1)[0][0].cpu().numpy()
        return tokenizer.centroids_KD.cpu()[tokenizer.encode(wav_1T, length_1)[0][:, 0]].numpy()

    return (spectral, SAMPLE_RATE / HOP) if tokenizer is None else (semantic, tokenizer.spec.rate_hz)
