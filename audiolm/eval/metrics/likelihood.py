"""Likelihood of held-out tokens under a trained stage: its loss beside count baselines, and the use of its prefix.

All figures are nats per target token on the same rows; eval/metrics/ngram.py fits the baselines.  `conditioning` swaps
the prefix for another clip's: a stage that does not get worse ignores its prefix.  Levels count from 0 here and from 1 in
figures, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from audiolm import rng
from audiolm.config.corpus import ClipFilter
from audiolm.data.tokens import RATIO
from audiolm.eval.metrics import ngram
from audiolm.lm.batches import EvalCrop, TokenBatches
from audiolm.lm.loss import batch_sums, n_sums
from audiolm.lm.model import load_lm
from audiolm.lm.parallel import whole_level_sums
from audiolm.lm.run_lengths import MAX_RUN
from audiolm.lm.stages import Packed, Stage

LENGTH_PRIOR = 20.0  # runs of all ids that count for an id's lengths, beside its own
COUNTED = 4_000_000  # targets of a level that the baselines count, about: 22 hours, in about 1 GB

View = tuple[int, np.ndarray, np.ndarray]  # (order, x_N, depth_N)


def lowest(data: TokenBatches, held_out: Sequence[Packed],
           only: Sequence[str] | None = None) -> tuple[dict[str, np.ndarray], int]:
    """(`sums` of the train clips' tokens, number of tokens counted).

    With copies at other speeds the baselines are fitted with and without them, and the lower sums count: the stage has
    to be below the better baseline.
    """
    rows = list(train_rows(data))
    totals, counted = sums(data.stage, rows, held_out, only), int(sum(row.target.sum() for row in rows))
    if any(c.speed != 1 for c in data.clips):
        more = sums(data.stage, list(train_rows(data, copies=True)), held_out, only)
        totals = {name: np.minimum(s, more[name]) for name, s in totals.items()}  # the numbers of targets are the same
    return totals, counted


def train_rows(data: TokenBatches, most: int = COUNTED, copies: bool = False) -> Iterator[Packed]:
    """Packed crops of the clips of evenly spaced shards, with about `most` targets a level (one shard at least).

    A clip's copies follow it.
    """
    by_shard: dict[int, list[int]] = {}
    for i, clip in enumerate(data.clips):
        if copies or clip.speed == 1:
            by_shard.setdefault(clip.shard, []).append(i)
    shards, step = list(by_shard.values()), data.stage.crop_frames
    # As many shards as hold about `most` targets, each from the middle of one of n equal stretches.
    frames = sum(int(data.frames[i]) for members in shards for i in members) * (RATIO if data.stage.needs_acoustic else 1)
    n = max(1, min(len(shards), len(shards) * most // frames))
    for k in range(n):
        clips = {i: data.clips[i] for i in shards[(2 * k + 1) * len(shards) // (2 * n)]}
        for i in sorted(clips, key=lambda i: (clips[i].parts[0].uri, clips[i].parts[0].start, clips[i].speed)):
            for start in range(0, data.frames[i], step):
                row = data.packed(i, start)
                yield Packed(row.ids.astype(np.int32), row.target, row.cond[:0], row.length)  # half the memory


def sums(stage: Stage, train: Sequence[Packed], held_out: Sequence[Packed],
         only: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """{baseline: (2, levels + 1)}: nats and number of the held-out targets at level + 1, as lm.loss.by_level.

    `only`: these baselines (None: all).
    """
    totals: dict[str, np.ndarray] = {}
    # A tenth of the train rows weighs the mixture of laws fitted on the rest.  Clips stay whole with their copies, but one.
    cut = len(train) // 10
    for level in range(*stage.levels) if stage.needs_acoustic else (-1,):
        held, counted, tenth, rest = (views(stage, rows, level) for rows in (held_out, train, train[:cut], train[cut:]))
        support = (stage.vocab if level >= 0 else stage.k) + (stage.ends and level in (-1, stage.levels[0]))  # EOS
        for name, (order, *places) in held.items():
            if only is not None and name not in only:
                continue
            # Kneser-Ney alone for text-like sequences; a mixture of laws where contexts are few and dense.
            if level < 0 or order == 1:
                nats_N = ngram.fit(*counted[name][1:], order, stage.vocab_size, support).nats(*places, stage.no_repeat)
            else:
                w_M = ngram.mix(_chances(rest[name], tenth[name], stage, support))
                nats_N = -np.log(w_M @ _chances(counted[name], held[name], stage, support))
            total = totals.setdefault(name, np.zeros((2, stage.levels[1] + 1)))
            total[:, level + 1] = nats_N.sum(), len(nats_N)
    return totals


def _chances(counted: View, scored: View, stage: Stage, support: int) -> np.ndarray:
    """p_MN of the scored ids by relative frequencies, Kneser-Ney and the unigram."""
    laws = [ngram.fit(*counted[1:], order, stage.vocab_size, support, discounted)
            for order, discounted in ((2, False), (2, True), (1, True))]
    _, x_N, depth_N = scored
    return np.stack([law.p(x_N, depth_N, x_N)[depth_N > 0] for law in laws])


def views(stage: Stage, rows: Sequence[Packed], level: int) -> dict[str, View]:
    """{baseline: (order, ids, depths)}: the sequence that each baseline of a level reads from packed rows.

    Level -1 is the semantic stage's only one.  An acoustic level is compared with the previous frame's code and with
    the code of the level below.
    """
    if level < 0:
        own = ngram.sequence([np.append(stage.bos, row.ids[row.target]) for row in rows])
        return {"unigram": (1, *own), "bigram": (2, *own), "fivegram": (5, *own)}
    slot, columns, pairs = level - stage.levels[0], [], []
    for ids in (row.ids for row in rows):
        prompt, targets = stage.split(ids)
        codes_TS = targets.reshape(-1, stage.slots)
        # the end of a clip is predicted in the first slot alone
        end = ids[-1:] if not slot and ids[-1] == stage.eos else ids[:0]
        columns.append(np.concatenate([[stage.bos], codes_TS[:, slot], end]))
        if level:
            below_T = codes_TS[:, slot - 1] if slot else prompt[1:-1].reshape(-1, stage.n_coarse)[:, -1]
            pairs.append(np.stack([below_T, codes_TS[:, slot]], 1).reshape(-1))
    own = ngram.sequence(columns)
    by_name: dict[str, View] = {"unigram": (1, *own), "previous": (2, *own)}
    if level:
        x_N = np.concatenate([*pairs, np.empty(0, np.int64)]).astype(np.int64)
        by_name["below"] = (2, x_N, np.arange(len(x_N)) % 2)
    return by_name


BATCH = 8  # rows a forward pass


def measure_stage(name: str, paths: Mapping[str, str], where: ClipFilter, n: int, seed: int,
                  device: str | torch.device = "cpu", only: Sequence[str] | None = None) -> dict[str, Any]:
    """Figures of the trained stage paths[name] on n held-out rows, and its conditioning (None without a prefix or two rows).

    paths also has manifest and the token stores that the stage reads. `only`: these baselines.
    """
    model, stage = load_lm(paths[name], device)
    train, dev = (TokenBatches(paths["manifest"], paths.get("semantic_tokens"), paths.get("acoustic_tokens"), stage, split,
                               where, 1, seed) for split in ("train", "dev"))
    crops, used = dev.fixed(n), None
    if stage.conditioned and len(crops) > 1:
        used = conditioning(model, stage, dev, crops, seed, device)
    return {"figures": stage_figures(model, stage, train, dev, n, device, only), "conditioning": used}


def stage_figures(model: torch.nn.Module, stage: Stage, train: TokenBatches, dev: TokenBatches, n: int,
                  device: str | torch.device = "cpu", only: Sequence[str] | None = None) -> dict[str, Any]:
    """`beside` of n held-out rows, with their tokens and the train tokens that the baselines counted.

    Acoustic stages also have figures per level (from 1); their `baseline` is the mean of each level's better one.
    """
    rows = [dev.packed(*c) for c in dev.fixed(n)]
    totals, counted = lowest(train, rows, only)
    if stage.name == "parallel":  # a level is masked as a whole, so its own neighbours do not help as they help `previous`
        own = whole_level_sums(model, stage, (dev.crop(*c)[:2] for c in dev.fixed(n)), device).cpu().numpy()
    else:
        own = loss_sums(model, stage, dev, rows, device)
    sums = {"loss": own[:, :stage.levels[1] + 1], **totals}  # without run lengths, which have figures of their own
    levels = [{"level": q + 1, **beside({name: ratio(s[:, q + 1]) for name, s in sums.items()})} for q in range(*stage.levels)]
    tokens = sums["loss"][1]
    # A baseline that misses some targets (the level below has none under level 1) has no figure of the whole stage.
    whole = beside({name: ratio(s.sum(1)) if (s[1] == tokens).all() else None for name, s in sums.items()})
    if levels:
        whole["baseline"] = float(sum(row["baseline"] * tokens[row["level"]] for row in levels) / tokens.sum())
        whole |= {"better": "by level", "difference_percent": percent(whole["loss"], whole["baseline"]), "levels": levels}
    if stage.lengths and not only:
        whole["lengths"] = beside({"loss": ratio(own[:, -1]), "by id": lengths_by_id(stage, train_rows(train), rows)})
    return {**whole, "tokens": int(tokens.sum()), "counted": counted}


def lengths_by_id(stage: Stage, train: Iterable[Packed], held_out: Sequence[Packed]) -> float:
    """Nats per run length by counting: p(length | id), smoothed with the lengths of all ids."""
    count_KL = np.zeros((stage.k, MAX_RUN))
    for row in train:
        known = row.length > 0
        np.add.at(count_KL, (row.ids[known], row.length[known] - 1), 1)
    all_L = (count_KL.sum(0) + 1) / (count_KL.sum() + MAX_RUN)
    p_KL = (count_KL + LENGTH_PRIOR * all_L) / (count_KL.sum(1, keepdims=True) + LENGTH_PRIOR)
    ids, lengths = (np.concatenate([getattr(row, name)[row.length > 0] for row in held_out]) for name in ("ids", "length"))
    return float(-np.log(p_KL[ids, lengths - 1]).mean())


def beside(values: Mapping[str, float | None]) -> dict[str, Any]:
    """Loss and baselines (None where one does not apply), the best baseline by name (`better`) and value (`baseline`).

    difference_percent is the loss's difference to it, negative where the loss is lower.
    """
    known = {name: v for name, v in values.items() if name != "loss" and v is not None}
    better = min(known, key=known.__getitem__)
    return {**values, "better": better, "baseline": known[better], "difference_percent": percent(values["loss"], known[better])}


def ratio(sums: np.ndarray) -> float | None:
    """Nats per token of (nats, tokens)."""
    return float(sums[0] / sums[1]) if sums[1] else None


def percent(value: float, base: float) -> float:
    return 100 * (value / base - 1)


def above_baseline(stages: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stages, and levels of stages (None: the whole stage), whose loss is not below their better baseline."""
    rows = [{"stage": name, "level": row.get("level"), "better": row["better"], "percent": row["difference_percent"]}
            for name, figures in stages.items() for row in (figures, *figures.get("levels", ()))]
    return [row for row in rows if not row["percent"] < 0]


@torch.no_grad()
def loss_sums(model: torch.nn.Module, stage: Stage, data: TokenBatches, rows: Sequence[Packed],
              device: str | torch.device = "cpu") -> np.ndarray:
    """(2, n_sums): nats and number of targets as lm.loss.level_sums. The model is in eval mode and on `device`."""
    sums = torch.zeros(2, n_sums(stage), dtype=torch.float64, device=device)
    for i in range(0, len(rows), BATCH):
        sums += batch_sums(model, stage, data.collate(rows[i:i + BATCH]), device)
    return sums.cpu().numpy()


def conditioning(model: torch.nn.Module, stage: Stage, data: TokenBatches, crops: Sequence[EvalCrop], seed: int,
                 device: str | torch.device = "cpu") -> dict[str, float]:
    """Loss with each row's own prefix ("true") and with another clip's ("shuffled"), on the same targets.

    "se": the standard error over rows of shuffled - true, a ratio of sums, in which rows of more targets weigh more.
    Stage 2's prefix and the parallel decoder's condition are semantic, stage 3's prefix the coarse levels. Raises ValueError
    for stage 1, which has none, and for fewer than two rows.
    """
    if not stage.conditioned:
        raise ValueError(f"the {stage.name} stage has no prefix to shuffle: use a coarse or fine stage that has one")
    if len(crops) < 2:
        raise ValueError(f"conditioning needs two held-out rows or more, got {len(crops)}: raise evaluate.rows or give "
                         "the corpus more dev audio")
    parts = [data.crop(*c) for c in crops]
    true, shuffled = [], []
    for i, (z_T, codes_TQ, at_end) in enumerate(parts):
        rest = [j for j in range(len(crops)) if j != i]
        others = [j for j in rest if crops[j][0] != crops[i][0]] or rest  # of other clips, where there are any
        other_z, other_codes, _ = parts[others[int(rng.generator(seed, "conditioning", i).integers(len(others)))]]
        true.append((z_T, codes_TQ, at_end))
        if stage.name != "fine":  # a shorter prefix is repeated to the crop's length
            shuffled.append((np.resize(other_z, len(z_T)), codes_TQ, at_end))
        else:
            prefix = np.resize(other_codes[:, :stage.n_coarse], (len(codes_TQ), stage.n_coarse))
            shuffled.append((z_T, np.concatenate([prefix, codes_TQ[:, stage.n_coarse:]], 1), at_end))

    def row_sums(z_T: np.ndarray | None, codes_TQ: np.ndarray, at_end: bool) -> np.ndarray:
        if stage.name == "parallel":
            return whole_level_sums(model, stage, [(z_T, codes_TQ)], device).cpu().numpy()
        return loss_sums(model, stage, data, [stage.pack(z_T, codes_TQ, at_end)], device)

    (true_R, number_R), (shuffled_R, _) = (np.stack([row_sums(*row).sum(1) for row in rows], 1)
                                           for rows in (true, shuffled))  # row by row, for the spread over rows
    # Linearised standard error of a ratio of sums (Cochran 1977, 6.4), with n / (n - 1) for few rows.
    number, gain_R = number_R.sum(), shuffled_R - true_R
    spread_R = gain_R - gain_R.sum() / number * number_R
    se = np.sqrt((spread_R ** 2).sum() * len(crops) / (len(crops) - 1)) / number
    return {"true": float(true_R.sum() / number), "shuffled": float(shuffled_R.sum() / number), "se": float(se)}
