"""How well a stage predicts held-out tokens: its loss beside count baselines, and whether its prefix is used.

All figures are nats per target token on the same rows.  Baselines are counted on train crops: unigram (add-one, per
level) and bigram (context: the previous token, for acoustic stages the same level one frame before), interpolated with
the unigram by Witten-Bell's weights.  `conditioning` swaps the prefix for another clip's: a stage that does not get
worse ignores it.  Levels count from 0 here and from 1 in figures, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audiolm import rng
from audiolm.data.batches import Crop, TokenBatches
from audiolm.data.tokens import TokenStore, level_name, run_starts
from audiolm.lm.nats import batch_sums
from audiolm.lm.stages import Stage

BATCH = 8  # rows a forward pass
BASELINE_CROPS = 5_000  # train crops counted, evenly spaced: more changes the third digit only
STATISTICS_SHARDS = 50

Packed = tuple[np.ndarray, np.ndarray]  # (ids_T, target_T)


@dataclass(frozen=True)
class NGrams:
    """Counts of a stage's targets: unigrams by id, bigrams as sorted (context x vocab_size + id) keys."""

    stage: Stage
    unigram_V: np.ndarray
    keys: np.ndarray
    counts: np.ndarray
    total_C: np.ndarray  # bigrams of a context
    kinds_C: np.ndarray  # different ids seen after it

    def nats(self, targets_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(unigram_N, bigram_N): -log p of each target of one row."""
        levels_V = self.stage.level_table() + 1
        seen = np.bincount(np.maximum(levels_V, 0), self.unigram_V * (levels_V >= 0))
        uni_N = (self.unigram_V[targets_N] + 1.0) / (seen + support(self.stage))[levels_V[targets_N]]
        context_N = contexts(self.stage, targets_N)
        key_N = context_N * self.stage.vocab_size + targets_N
        at_N = np.minimum(np.searchsorted(self.keys, key_N), max(len(self.keys) - 1, 0))
        both_N = np.where(self.keys[at_N] == key_N, self.counts[at_N], 0) if len(self.keys) else np.zeros(len(key_N))
        total_N, kinds_N = self.total_C[context_N], self.kinds_C[context_N]
        known_N = np.maximum(total_N + kinds_N, 1)
        bi_N = np.where(total_N > 0, (both_N + kinds_N * uni_N) / known_N, uni_N)
        return -np.log(uni_N), -np.log(bi_N)


def support(stage: Stage) -> np.ndarray:
    """How many ids each level + 1 may take; EOS belongs to the level in whose slot it is predicted."""
    levels_V = stage.level_table()
    legal_V = levels_V >= -1
    if stage.name == "fine":
        legal_V[stage.eos] = False
    return np.bincount(levels_V[legal_V] + 1, minlength=stage.levels[1] + 1)


def contexts(stage: Stage, targets_N: np.ndarray) -> np.ndarray:
    """The id one frame before each target at the same level; vocab_size + slot where there is none."""
    start = stage.vocab_size + np.arange(stage.slots)
    return np.concatenate([start, targets_N])[:len(targets_N)]


def count(stage: Stage, rows: Iterable[np.ndarray]) -> NGrams:
    """N-grams of target rows (ids, EOS included)."""
    rows = list(rows)
    targets_N = np.concatenate([*rows, np.empty(0, np.int64)])
    context_N = np.concatenate([*(contexts(stage, r) for r in rows), np.empty(0, np.int64)])
    keys, counts = np.unique(context_N * stage.vocab_size + targets_N, return_counts=True)
    size = stage.vocab_size + stage.slots
    return NGrams(stage, np.bincount(targets_N, minlength=stage.vocab_size), keys, counts,
                  np.bincount(context_N, minlength=size), np.bincount(keys // stage.vocab_size, minlength=size))


def packed_rows(data: TokenBatches, crops: Sequence[Crop]) -> Iterator[Packed]:
    return (data.packed(*c) for c in crops)


def stage_figures(model: torch.nn.Module, stage: Stage, train: TokenBatches, dev: TokenBatches, n: int,
                  device: str | torch.device = "cpu") -> dict[str, Any]:
    """loss, unigram, bigram and tokens on n held-out rows; acoustic stages also per level (level counts from 1)."""
    ngrams = count(stage, (ids[t] for ids, t in packed_rows(train, train.fixed(BASELINE_CROPS))))
    rows = list(packed_rows(dev, dev.fixed(n)))
    sums = {"loss": loss_sums(model, stage, dev, rows, device)}
    baselines = {"unigram": np.zeros_like(sums["loss"]), "bigram": np.zeros_like(sums["loss"])}
    for ids, target in rows:
        at = stage.level_table()[ids[target]] + 1
        for name, nats_N in zip(baselines, ngrams.nats(ids[target]), strict=True):
            np.add.at(baselines[name][0], at, nats_N)
            np.add.at(baselines[name][1], at, 1)
    sums |= baselines
    figures: dict[str, Any] = {name: float(s[0].sum() / s[1].sum()) for name, s in sums.items()}
    figures["tokens"] = int(sums["loss"][1].sum())
    if stage.needs_acoustic:
        figures["levels"] = [{"level": q + 1, **{name: float(s[0, q + 1] / s[1, q + 1]) for name, s in sums.items()}}
                             for q in range(*stage.levels)]
    return figures


@torch.no_grad()
def loss_sums(model: torch.nn.Module, stage: Stage, data: TokenBatches, rows: Sequence[Packed],
              device: str | torch.device = "cpu") -> np.ndarray:
    """(2, levels + 1): nats and number of targets at level + 1. The model is in eval mode and on `device`."""
    sums = torch.zeros(2, stage.levels[1] + 1, dtype=torch.float64, device=device)
    for i in range(0, len(rows), BATCH):
        sums += batch_sums(model, stage, data.collate(rows[i:i + BATCH]), device)
    return sums.cpu().numpy()


def conditioning(model: torch.nn.Module, stage: Stage, data: TokenBatches, crops: Sequence[Crop], seed: int,
                 device: str | torch.device = "cpu") -> dict[str, float]:
    """Loss with each row's own prefix ("true") and with another clip's ("shuffled"); the targets are the same.

    Stage 2's prefix is semantic, stage 3's the coarse levels; stage 1 has none and is refused. Needs two rows.
    """
    if stage.name == "semantic":
        raise ValueError("the semantic stage has no prefix to shuffle: use the coarse or fine stage")
    if len(crops) < 2:
        raise ValueError(f"conditioning needs two held-out rows or more, got {len(crops)}: raise evaluate.rows or give "
                         "the corpus more dev audio")
    parts = [data.crop(*c) for c in crops]
    true, shuffled = [], []
    for i, (z_T, codes_TQ, at_end) in enumerate(parts):
        rest = [j for j in range(len(crops)) if j != i]
        others = [j for j in rest if crops[j][0] != crops[i][0]] or rest
        other_z, other_codes, _ = parts[others[int(rng.generator(seed, "conditioning", i).integers(len(others)))]]
        true.append(stage.pack(z_T, codes_TQ, at_end))
        if stage.name == "coarse":  # a shorter clip's prefix is repeated up to the length that belongs to the crop
            shuffled.append(stage.pack(np.resize(other_z, len(z_T)), codes_TQ, at_end))
        else:
            prefix = np.resize(other_codes[:, :stage.n_coarse], (len(codes_TQ), stage.n_coarse))
            shuffled.append(stage.pack(z_T, np.concatenate([prefix, codes_TQ[:, stage.n_coarse:]], 1), at_end))
    figures = {}
    for name, rows in (("true", true), ("shuffled", shuffled)):
        nats, number = loss_sums(model, stage, data, rows, device)
        figures[name] = float(nats.sum() / number.sum())
    return figures


def token_statistics(path: str) -> dict[str, float]:
    """entropy_bits, perplexity, used codes and mean run (frames) of a store's level 1, over some of its shards."""
    tokens = TokenStore(path)
    counts, frames, runs = np.zeros(tokens.spec["vocab"], np.int64), 0, 0
    for k in np.unique(np.linspace(0, tokens.shards - 1, min(tokens.shards, STATISTICS_SHARDS)).astype(int)):
        column = tokens.read(int(k), [level_name(0)])[level_name(0)]
        counts += np.bincount(column.values, minlength=len(counts))
        starts = run_starts(column.values)
        starts[column.offsets[:-1][np.diff(column.offsets) > 0]] = True  # a clip begins a run
        frames, runs = frames + len(column.values), runs + int(starts.sum())
    p = counts[counts > 0] / frames
    nats = float(-(p * np.log(p)).sum())
    return {"entropy_bits": nats / np.log(2), "perplexity": float(np.exp(nats)), "mean_run": frames / runs,
            "used": int((counts > 0).sum())}
