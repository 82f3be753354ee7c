"""How well a stage predicts held-out tokens: its loss beside count baselines, and whether its prefix is used.

All figures are nats per target token on the same rows; eval/metrics/likelihood.py says what is counted.  `conditioning` swaps the
prefix for another clip's: a stage that does not get worse ignores it.  Levels count from 0 here and from 1 in figures, as
in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from audiolm import rng
from audiolm.config.corpus import ClipFilter
from audiolm.data.tokens import RATIO, TokenStore, level_name, run_starts
from audiolm.eval.metrics import ngram
from audiolm.lm.batches import EvalCrop, TokenBatches
from audiolm.lm.loss import batch_sums
from audiolm.lm.model import load_lm
from audiolm.lm.stages import Stage
from audiolm.models.entropy import entropy_bits

COUNTED = 4_000_000  # targets of a level that are counted, about; in about 1 GB (4 M frames are 22 hours)

Packed = tuple[np.ndarray, np.ndarray]  # (ids_T, target_T)
View = tuple[int, np.ndarray, np.ndarray]  # (order, x_N, depth_N)


def lowest(data: TokenBatches, held_out: Sequence[Packed],
           only: Sequence[str] | None = None) -> tuple[dict[str, np.ndarray], int]:
    """(`sums` of the train clips' tokens, how many were counted); the lower ones where there are copies to count as well."""
    rows = list(train_rows(data))
    found, counted = sums(data.stage, rows, held_out, only), int(sum(target.sum() for _, target in rows))
    if any(c.speed != 1 for c in data.clips):
        more = sums(data.stage, list(train_rows(data, copies=True)), held_out, only)
        found = {name: np.minimum(s, more[name]) for name, s in found.items()}  # the numbers of targets are the same
    return found, counted


def train_rows(data: TokenBatches, most: int = COUNTED, copies: bool = False) -> Iterator[Packed]:
    """Crops that part the clips of evenly spaced shards, as many as have `most` targets a level (one shard at least). A
    clip's copies follow it."""
    by_shard: dict[int, list[int]] = {}
    for i, clip in enumerate(data.clips):
        if copies or clip.speed == 1:
            by_shard.setdefault(clip.shard, []).append(i)
    shards, step = list(by_shard.values()), data.stage.crop_frames
    frames = sum(int(data.frames[i]) for members in shards for i in members) * (RATIO if data.stage.needs_acoustic else 1)
    n = max(1, min(len(shards), len(shards) * most // frames))
    for k in range(n):
        clips = {i: data.clips[i] for i in shards[(2 * k + 1) * len(shards) // (2 * n)]}
        for i in sorted(clips, key=lambda i: (clips[i].parts[0].uri, clips[i].parts[0].start, clips[i].speed)):
            for start in range(0, data.frames[i], step):
                ids, target = data.packed(i, start)
                yield ids.astype(np.int32), target


def sums(stage: Stage, train: Sequence[Packed], held_out: Sequence[Packed],
         only: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """{baseline: (2, levels + 1)}: nats and number of the held-out targets at level + 1, as lm.loss.by_level. `only`: of
    these baselines (None: all)."""
    found: dict[str, np.ndarray] = {}
    cut = len(train) // 10  # whole clips with their copies before it and behind, but for one
    for level in range(*stage.levels) if stage.needs_acoustic else (-1,):
        asked, counted, tenth, rest = (views(stage, rows, level) for rows in (held_out, train, train[:cut], train[cut:]))
        support = (stage.vocab if level >= 0 else stage.k) + (stage.level_table()[stage.eos] == level and stage.name != "fine")
        for name, (order, *places) in asked.items():
            if only is not None and name not in only:
                continue
            if level < 0 or order == 1:
                nats_N = ngram.fit(*counted[name][1:], order, stage.vocab_size, support).nats(*places, stage.no_repeat)
            else:
                w_M = ngram.mix(_chances(rest[name], tenth[name], stage, support))
                nats_N = -np.log(w_M @ _chances(counted[name], asked[name], stage, support))
            total = found.setdefault(name, np.zeros((2, stage.levels[1] + 1)))
            total[:, level + 1] = nats_N.sum(), len(nats_N)
    return found


def _chances(counted: View, asked: View, stage: Stage, support: int) -> np.ndarray:
    """p_MN of what is asked by relative frequencies, Kneser-Ney and the unigram."""
    laws = [ngram.fit(*counted[1:], order, stage.vocab_size, support, discounted)
            for order, discounted in ((2, False), (2, True), (1, True))]
    _, x_N, depth_N = asked
    return np.stack([law.p(x_N, depth_N, x_N)[depth_N > 0] for law in laws])


def views(stage: Stage, rows: Sequence[Packed], level: int) -> dict[str, View]:
    """What each baseline of a level sees of packed rows."""
    if level < 0:
        own = ngram.sequence([np.append(stage.bos, ids[target]) for ids, target in rows])
        return {"unigram": (1, *own), "bigram": (2, *own), "fivegram": (5, *own)}
    slot, columns, pairs = level - stage.levels[0], [], []
    for ids, _ in rows:
        prompt, targets = stage.split(ids)
        codes_TS = targets.reshape(-1, stage.slots)
        end = ids[-1:] if not slot and ids[-1] == stage.eos else ids[:0]
        columns.append(np.concatenate([[stage.bos], codes_TS[:, slot], end]))
        if level:
            below_T = codes_TS[:, slot - 1] if slot else prompt[1:-1].reshape(-1, stage.n_coarse)[:, -1]
            pairs.append(np.stack([below_T, codes_TS[:, slot]], 1).reshape(-1))
    own = ngram.sequence(columns)
    found: dict[str, View] = {"unigram": (1, *own), "previous": (2, *own)}
    if level:
        x_N = np.concatenate([*pairs, np.empty(0, np.int64)]).astype(np.int64)
        found["below"] = (2, x_N, np.arange(len(x_N)) % 2)
    return found


BATCH = 8  # rows a forward pass
STATISTICS_SHARDS = 50


def measure_stage(name: str, paths: Mapping[str, str], where: ClipFilter, n: int, seed: int,
                  device: str | torch.device = "cpu", only: Sequence[str] | None = None) -> dict[str, Any]:
    """Figures of the trained stage paths[name], and its conditioning where it has a prefix and two held-out rows (else
    None), on n held-out rows; paths also has manifest and the token stores that the stage reads. `only`: these baselines."""
    model, stage = load_lm(paths[name], device)
    train, dev = (TokenBatches(paths["manifest"], paths.get("semantic_tokens"), paths.get("acoustic_tokens"), stage, split,
                               where, 1, seed) for split in ("train", "dev"))
    crops, used = dev.fixed(n), None
    if stage.name != "semantic" and len(crops) > 1:
        used = conditioning(model, stage, dev, crops, seed, device)
    return {"figures": stage_figures(model, stage, train, dev, n, device, only), "conditioning": used}


def stage_figures(model: torch.nn.Module, stage: Stage, train: TokenBatches, dev: TokenBatches, n: int,
                  device: str | torch.device = "cpu", only: Sequence[str] | None = None) -> dict[str, Any]:
    """`beside` of n held-out rows, their tokens and how many train tokens the baselines have counted; acoustic stages also
    per level (level counts from 1), their `baseline` being the mean of each level's better one."""
    rows = [dev.packed(*c) for c in dev.fixed(n)]
    found, counted = lowest(train, rows, only)
    sums = {"loss": loss_sums(model, stage, dev, rows, device), **found}
    levels = [{"level": q + 1, **beside({name: ratio(s[:, q + 1]) for name, s in sums.items()})} for q in range(*stage.levels)]
    tokens = sums["loss"][1]
    whole = beside({name: ratio(s.sum(1)) if (s[1] == tokens).all() else None for name, s in sums.items()})
    if levels:
        whole["baseline"] = float(sum(row["baseline"] * tokens[row["level"]] for row in levels) / tokens.sum())
        whole |= {"better": "by level", "difference_percent": percent(whole["loss"], whole["baseline"]), "levels": levels}
    return {**whole, "tokens": int(tokens.sum()), "counted": counted}


def beside(values: Mapping[str, float | None]) -> dict[str, Any]:
    """loss and baselines (None where one does not apply), the lowest of these by name (`better`) and value (`baseline`), and
    the loss's difference to it in per cent, negative where the loss lies under it."""
    known = {name: v for name, v in values.items() if name != "loss" and v is not None}
    better = min(known, key=known.__getitem__)
    return {**values, "better": better, "baseline": known[better], "difference_percent": percent(values["loss"], known[better])}


def ratio(sums: np.ndarray) -> float | None:
    """Nats per token of (nats, tokens)."""
    return float(sums[0] / sums[1]) if sums[1] else None


def percent(value: float, base: float) -> float:
    return 100 * (value / base - 1)


def above_baseline(stages: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The stages, and levels of stages (None: all of it), whose loss is not under their better baseline."""
    rows = [{"stage": name, "level": row.get("level"), "better": row["better"], "percent": row["difference_percent"]}
            for name, figures in stages.items() for row in (figures, *figures.get("levels", ()))]
    return [row for row in rows if not row["percent"] < 0]


@torch.no_grad()
def loss_sums(model: torch.nn.Module, stage: Stage, data: TokenBatches, rows: Sequence[Packed],
              device: str | torch.device = "cpu") -> np.ndarray:
    """(2, levels + 1): nats and number of targets at level + 1. The model is in eval mode and on `device`."""
    sums = torch.zeros(2, stage.levels[1] + 1, dtype=torch.float64, device=device)
    for i in range(0, len(rows), BATCH):
        sums += batch_sums(model, stage, data.collate(rows[i:i + BATCH]), device)
    return sums.cpu().numpy()


def conditioning(model: torch.nn.Module, stage: Stage, data: TokenBatches, crops: Sequence[EvalCrop], seed: int,
                 device: str | torch.device = "cpu") -> dict[str, float]:
    """Loss with each row's own prefix ("true") and with another clip's ("shuffled"); the targets are the same. "se" is the
    standard error over rows of shuffled - true, a ratio of sums (rows of more targets weigh more).

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
    (true_R, number_R), (shuffled_R, _) = (np.stack([loss_sums(model, stage, data, [row], device).sum(1) for row in rows], 1)
                                           for rows in (true, shuffled))  # row by row: the spread over rows is wanted
    number, gain_R = number_R.sum(), shuffled_R - true_R
    spread_R = gain_R - gain_R.sum() / number * number_R
    se = np.sqrt((spread_R ** 2).sum() * len(crops) / (len(crops) - 1)) / number
    return {"true": float(true_R.sum() / number), "shuffled": float(shuffled_R.sum() / number), "se": float(se)}


def token_statistics(path: str) -> dict[str, float]:
    """entropy_bits, perplexity, used codes and mean run (frames) of a store's level 1, over the clips of some of its shards."""
    tokens = TokenStore(path)
    counts, frames, runs = np.zeros(tokens.spec["vocab"], np.int64), 0, 0
    for k in np.unique(np.linspace(0, tokens.shards - 1, min(tokens.shards, STATISTICS_SHARDS)).astype(int)):
        data = tokens.levels(int(k), [0])
        column = data[level_name(0)]
        offsets = column.offsets[:tokens.originals(data["id"]) + 1]
        values = column.values[:offsets[-1]]
        counts += np.bincount(values, minlength=len(counts))
        starts = run_starts(values)
        starts[offsets[:-1][np.diff(offsets) > 0]] = True  # a clip begins a run
        frames, runs = frames + len(values), runs + int(starts.sum())
    bits = entropy_bits(counts)
    return {"entropy_bits": bits, "perplexity": 2.0 ** bits, "mean_run": frames / runs,
            "used": int((counts > 0).sum())}
