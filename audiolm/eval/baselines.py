"""What counting the train tokens predicts of held-out ones: the baselines a stage's loss is set beside.

Fitted on and asked about the stage's own targets (its deduplication, its EOS, its crops), so a baseline's nats per token
and the stage's are one quantity.  Semantic stage: Kneser-Ney of orders 1, 2 and 5 which know, as the model can, that a
deduplicated id never repeats.  Acoustic stages, each level by itself: its frequencies; its own code one frame before, and
the code one level below in the same frame (the first coarse level has none; a fine level's may be a coarse one), each as
relative frequencies, Kneser-Ney's and the unigram's mixed by weights fitted on a tenth of the train rows.  Where the store
has copies at other speeds, each baseline is the better of two: counted with them and without.
Legend: N places of an ngram sequence, M laws; levels count from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from audiolm.data.batches import TokenBatches
from audiolm.data.tokens import RATIO
from audiolm.eval import ngram
from audiolm.lm.stages import Stage

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
    """{baseline: (2, levels + 1)}: nats and number of the held-out targets at level + 1, as lm.nats.by_level. `only`: of
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
