"""Statistics of a store's tokens: how often each is used, how long its runs are, which phones it goes with.

Counts are over frames as encoded; a run is a stretch of equal tokens within one clip, which deduplication makes one
token.  Entropies in bits; rates per second of audio, padded to whole frames.  Phone figures are HuBERT's (2106.07447,
IV-D).  Legend: K tokens, R runs, L run lengths, P phones.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audiolm import rng
from audiolm.data.tokens import Ragged, TokenStore, level_name, run_starts
from audiolm.models.entropy import entropy_bits

RUN_LENGTHS = 25  # bins of the histogram; the last counts longer runs too
ENDS = 10  # most and least used tokens that are listed
LONG = 2  # frames of a run that is audible as a sound of its own
SAMPLED_SHARDS = 50  # of `sampled_statistics`


@dataclass
class Use:
    """Frames and runs of each token, and runs by length from 1. Uses can be added."""

    frames_K: np.ndarray
    runs_K: np.ndarray
    lengths_L: np.ndarray

    @staticmethod
    def none(vocab: int) -> Use:
        return Use(*(np.zeros(n, np.int64) for n in (vocab, vocab, RUN_LENGTHS)))


@dataclass(frozen=True)
class Occurrence:
    """A run: frames [start, start + length) of a clip."""

    clip: str
    start: int
    length: int


def runs(column: Ragged) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(token_R, clip row_R, first frame within the clip_R, length_R) of a shard's column; a run ends with its clip."""
    begins = run_starts(column.values)
    begins[column.offsets[:-1]] = True  # no clip of a store is empty
    first_R = np.flatnonzero(begins)
    row_R = np.searchsorted(column.offsets, first_R, side="right") - 1
    return (column.values[first_R].astype(np.int64), row_R, first_R - column.offsets[row_R],
            np.diff(np.append(first_R, len(column.values))))


def tally(tokens: TokenStore, group_of: Mapping[str, str], groups: Sequence[str]) -> dict[str, Use]:
    """{group: Use} of the clips that `group_of` names, read a shard at a time."""
    vocab = tokens.spec["vocab"]
    uses = {g: Use.none(vocab) for g in groups}
    for k in range(tokens.shards):
        data = tokens.levels(k, [0])
        token_R, row_R, _, length_R = runs(data[level_name(0)])
        group_C = np.array([groups.index(group_of[i]) if i in group_of else -1 for i in data["id"]], np.int64)
        for g, name in enumerate(groups):
            mine = group_C[row_R] == g
            use, length, token = uses[name], length_R[mine], token_R[mine]
            use.frames_K += np.bincount(token, length, vocab).astype(np.int64)
            use.runs_K += np.bincount(token, minlength=vocab)
            use.lengths_L += np.bincount(np.minimum(length, RUN_LENGTHS) - 1, minlength=RUN_LENGTHS)
    return uses


def statistics(use: Use, rate_hz: float) -> dict[str, Any] | None:
    """Figures as JSON, None without frames.

    dedup_ratio: share of tokens left after deduplication; bits_per_s: rate times the entropy of single tokens, which a
    memoryless code needs (ZeroSpeech's bit rate), before and after deduplication.
    """
    frames, n_runs = int(use.frames_K.sum()), int(use.runs_K.sum())
    if not frames:
        return None
    bits, bits_dedup = entropy_bits(use.frames_K), entropy_bits(use.runs_K)
    order = np.lexsort((np.arange(len(use.frames_K)), -use.frames_K))  # most used first, ties by token
    used = order[use.frames_K[order] > 0]

    def listed(chosen: Iterable[int]) -> list[dict[str, Any]]:
        return [{"token": int(k), "share": float(use.frames_K[k] / frames),
                 "mean_run": float(use.frames_K[k] / use.runs_K[k])} for k in chosen]

    return {"frames": frames, "seconds": frames / rate_hz, "rate": rate_hz, "rate_dedup": rate_hz * n_runs / frames,
            "entropy_bits": bits, "entropy_bits_dedup": bits_dedup, "perplexity": float(2.0**bits),
            "bits_per_s": rate_hz * bits, "bits_per_s_dedup": rate_hz * n_runs / frames * bits_dedup,
            "used": len(used), "vocab": len(use.frames_K), "dedup_ratio": n_runs / frames, "mean_run": frames / n_runs,
            "runs_by_length": use.lengths_L.tolist(), "most_used": listed(used[:ENDS]),
            "least_used": listed(used[ENDS:][::-1][:ENDS])}


def sampled_statistics(path: str) -> dict[str, float]:
    """entropy_bits, perplexity, used codes and mean run (frames) of a store's level 1, over some of its shards."""
    tokens = TokenStore(path)
    frames_K, n_runs = np.zeros(tokens.spec["vocab"], np.int64), 0
    for k in np.unique(np.linspace(0, tokens.shards - 1, min(tokens.shards, SAMPLED_SHARDS)).astype(int)):
        data = tokens.levels(int(k), [0])
        token_R, row_R, _, length_R = runs(data[level_name(0)])
        counts = ~np.isin(data["id"], tokens.files[int(k)]["rejected"])
        counts[tokens.originals(data["id"]):] = False  # copies at other speeds
        own_R = counts[row_R]
        frames_K += np.bincount(token_R[own_R], length_R[own_R], len(frames_K)).astype(np.int64)
        n_runs += int(own_R.sum())
    bits = entropy_bits(frames_K)
    return {"entropy_bits": bits, "perplexity": 2.0 ** bits, "mean_run": int(frames_K.sum()) / n_runs,
            "used": int((frames_K > 0).sum())}


def drift_bits(a_K: np.ndarray, b_K: np.ndarray) -> float:
    """Jensen-Shannon divergence of two histograms: 0 where they are equal, 1 where they share no token."""
    p, q = a_K / a_K.sum(), b_K / b_K.sum()
    return max(0.0, entropy_bits((p + q) / 2) - (entropy_bits(p) + entropy_bits(q)) / 2)


def occurrences(tokens: TokenStore, wanted: Sequence[int], speaker_of: Mapping[str, str], n: int,
                seed: int) -> dict[int, list[Occurrence]]:
    """At most n runs of each wanted token in the clips that `speaker_of` names, drawn from (seed, shard).

    Runs of LONG frames come first, then one of each clip before a second of any, then one of each speaker.
    """
    candidates: dict[int, list[tuple]] = {k: [] for k in wanted}
    for shard in range(tokens.shards):
        data = tokens.levels(shard, [0])
        ids = data["id"]
        token_R, row_R, start_R, length_R = runs(data[level_name(0)])
        draw_R = rng.generator(seed, "token examples", shard).random(len(token_R))
        here = np.isin(token_R, wanted) & np.array([i in speaker_of for i in ids], bool)[row_R]
        short_R = (length_R < LONG).astype(np.int64)
        # by token, then clip; within a clip long runs first, in drawn order
        order = np.lexsort((draw_R, short_R, row_R, token_R))
        order = order[here[order]]
        nth: Counter = Counter()
        for r in order.tolist():
            token, row = int(token_R[r]), int(row_R[r])
            at = nth[token, row]
            nth[token, row] += 1
            if at < n:
                candidates[token].append((int(short_R[r]), at, float(draw_R[r]), speaker_of[ids[row]],
                                     Occurrence(str(ids[row]), int(start_R[r]), int(length_R[r]))))
        candidates = {k: _spread(v, n) for k, v in candidates.items()}  # once a shard, so that few candidates are held
    return {k: [v[-1] for v in _spread(v, n)[:n]] for k, v in candidates.items()}


def _spread(candidates: list[tuple], n: int) -> list[tuple]:
    """At most n candidates of each speaker, the best first."""
    seen: dict[str, int] = defaultdict(int)
    ranked = []
    for short, at, draw, speaker, where in sorted(candidates, key=lambda c: c[:3]):
        seen[speaker] += 1
        if seen[speaker] <= n:
            ranked.append(((short, at, seen[speaker], draw), (short, at, draw, speaker, where)))
    return [c for _, c in sorted(ranked, key=lambda r: r[0])]


def phone_figures(frames_PK: np.ndarray) -> dict[str, float]:
    """Shares of frames in 0 to 1, and PNMI.

    phone_purity: frames whose phone is their token's likeliest; cluster_purity: frames whose token is their phone's
    likeliest; pnmi: the share of the phones' entropy that the tokens explain, I(phone; token) / H(phone), 0 with one phone.
    """
    total = frames_PK.sum()
    # I(phone; token) = H(phone) + H(token) - H(phone, token)
    h_phone = entropy_bits(frames_PK.sum(1))
    mutual = h_phone + entropy_bits(frames_PK.sum(0)) - entropy_bits(frames_PK.ravel())
    return {"phone_purity": float(frames_PK.max(0).sum() / total), "cluster_purity": float(frames_PK.max(1).sum() / total),
            "pnmi": max(0.0, mutual) / h_phone if h_phone > 0 else 0.0}


def diagonal(frames_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order of phones, of the tokens that occur): phones by frequency, tokens by their likeliest phone, surest first."""
    phones = np.argsort(-frames_PK.sum(1), kind="stable")
    tokens = np.flatnonzero(frames_PK.sum(0))
    share_PK = frames_PK[np.ix_(phones, tokens)] / frames_PK[:, tokens].sum(0)
    return phones, tokens[np.lexsort((-share_PK.max(0), share_PK.argmax(0)))]
