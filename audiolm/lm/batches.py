"""Rows of token ids for one language-model stage, from both token stores (DESIGN 1.7, 1.8).

A training row is filled with documents, each a crop of one clip as the stage packs it: where a row is full, its last clip
is cut, and the rest begins another row (lm.row_plan).  Everything is planned from lengths; of the stores only the stage's
columns are read, a shard at a time, ahead of their use, into a bounded cache.  Validation takes plain crops, one a row.
A stage is any value with the fields of lm.stages.Stage that are used here (data stands below lm).
Shapes: z_T semantic ids at 25 Hz; codes_TQ at 50 Hz; ids_BT int64, target_BT bool (the id carries loss), doc_BT int64
(0, 1, ... within a row, the padding at its end one more).  T is stage.max_len, in `collate` that of the longest row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from audiolm import rng
from audiolm.config.corpus import ClipFilter
from audiolm.data.clips import Clip, token_clips
from audiolm.data.parallel import thread_map
from audiolm.data.tokens import RATIO, TokenStore, check_pair, run_starts
from audiolm.lm.clip_lengths import read_lengths
from audiolm.lm.row_plan import PackingPlan
from audiolm.lm.shard_cache import ShardCache

Crop = tuple[int, int]  # (clip number, start in semantic frames)
Piece = tuple[int, int, int]  # (clip number, start, stop)
LEAST = 25  # frames of the shortest piece of a longer clip, in rows that are long enough


@dataclass(frozen=True)
class Shard:
    """The stage's columns of a shard; clip i begins at semantic frame firsts[i]."""

    firsts: np.ndarray
    z_T: np.ndarray | None
    codes_TQ: np.ndarray | None
    ids_before: np.ndarray  # each frame, and the end: the ids that the stage makes of the frames before it


class TokenBatches:
    """Batches of the clips of a split, in the manifest's order; `frames`: their semantic frames."""

    def __init__(self, manifest_path: str, semantic_path: str | None, acoustic_path: str | None, stage: Any, split: str,
                 where: ClipFilter | None, batch: int, seed: int, cache_mb: int = 256):
        """Raises TokenError for stores that do not belong together, ValueError where the split is empty."""
        self.stage, self.batch_rows, self.seed = stage, batch, seed
        self.semantic = _open(semantic_path, "semantic_tokens", stage) if stage.needs_semantic else None
        self.acoustic = _open(acoustic_path, "acoustic_tokens", stage) if stage.needs_acoustic else None
        if self.semantic and self.acoustic:
            check_pair(self.semantic, self.acoustic)
        self.stores = [s for s in (self.semantic, self.acoustic) if s]
        hop = self.semantic.spec["hop"] if self.semantic else RATIO * self.acoustic.spec["hop"]
        self.lengths = read_lengths(manifest_path, split, where, hop, self.stores)
        self.frames = self.lengths.frames
        if not len(self.frames):
            raise ValueError(f"lm.{stage.name}.where leaves no {split} clips (it is {where!r}): widen it, or give the "
                             f"corpus a larger {split} share")
        ratio = 1 if self.semantic else RATIO
        frames = np.array([f["frames"] // ratio for f in self.stores[0].files])
        width = 8 + 2 * int(stage.needs_semantic) + 2 * RATIO * len(stage.columns)  # bytes of a frame in a Shard
        self._sizes = width * frames + 8 * np.array([f["clips"] for f in self.stores[0].files])
        self.cache = ShardCache(self._read, self._sizes, cache_mb * 2**20)
        self._least = max(1, min(LEAST, stage.crop_frames // 8))
        self._of = manifest_path, split, where

    @cached_property
    def clips(self) -> list[Clip]:
        """The split's clips as the manifest describes them; training does without, for there may be millions."""
        manifest_path, split, where = self._of
        return token_clips(manifest_path, self.stores[0].speeds, split, where)

    @cached_property
    def plan(self) -> PackingPlan:
        """Made at the first batch: where tokens are deduplicated it needs a number of each clip from the store."""
        stage, lengths = self.stage, self.lengths
        costs = stage.frame_ids * self.frames + stage.special
        if stage.needs_semantic and not stage.dedupe:
            costs += self.frames
        elif stage.needs_semantic:
            dedup = thread_map(lambda k: self.semantic.read(k, ["n_dedup"])["n_dedup"], lengths.shards.tolist())
            for s, n_dedup in enumerate(dedup):
                of_shard = slice(lengths.firsts[s], lengths.firsts[s + 1])
                costs[of_shard] += n_dedup[lengths.rows[of_shard]]
        # a row has one cut clip more than the costs know of, and ends within a frame of its end
        stride = max(1, stage.max_len - stage.special - stage.frame_ids // 2)
        size = float(self._sizes[lengths.shards].mean())
        return PackingPlan(costs, lengths.firsts, stride, self.batch_rows, self.seed, size)

    def batch(self, step: int, rows: Iterable[int]) -> dict[str, torch.Tensor]:
        """ids_BT, target_BT, doc_BT of rows of step's global batch; decided by (seed, step, row) alone."""
        rows, plan = list(rows), self.plan
        now, later = (self._shards(plan.place(s, i)[:2] for i in rows) for s in (step, step + plan.ahead))
        self.cache.expect(now, later)
        shape = len(rows), self.stage.max_len
        ids_BT, target_BT = np.full(shape, self.stage.bos, np.int64), np.zeros(shape, bool)
        doc_BT = np.empty(shape, np.int64)
        for b, i in enumerate(rows):
            at, pieces = 0, self.pieces(step, i)
            for doc, piece in enumerate(pieces):
                ids, target = self.stage.pack(*self.cut(*piece))
                end = at + len(ids)
                ids_BT[b, at:end], target_BT[b, at:end], doc_BT[b, at:end] = ids, target, doc
                at = end
            doc_BT[b, at:] = len(pieces)
        return {k: torch.from_numpy(v) for k, v in (("ids_BT", ids_BT), ("target_BT", target_BT), ("doc_BT", doc_BT))}

    def pieces(self, step: int, i: int) -> list[Piece]:
        """The documents of a row: on from its beginning, clip by clip, until it is full.

        A piece of less than `_least` frames, or of a quarter of its clip, is left out at the row's beginning and end.
        """
        stage, place = self.stage, self.plan.place(step, i)
        ring = self.plan.ring(*place[:2])
        at, into = ring.begin(place[2])
        least, draw = stage.min_crop_frames, None
        if least:
            draw = rng.generator(self.seed, "pieces", *place)
        halved = int(stage.dedupe and stage.name == "coarse")  # a run that is cut stands in both pieces
        room, found = stage.max_len, []
        while True:
            clip = int(ring.clips[at % len(ring.clips)])
            frames, shortest = int(self.frames[clip]), max(1, min(self._least, int(self.frames[clip]) // 4))
            shard, first = self._find(clip)
            ids = shard.ids_before[first:first + frames + 1]
            start = _frame(ids, int(ids[0]) + into) if into else 0
            if start < shortest:
                start = 0
            elif frames - start < shortest:
                start = frames
            while start < frames:
                head = stage.special + (halved if start else 0)
                fits = stop = _frame(ids, int(ids[start]) + room - head)
                if stop < frames and stop - start < shortest:
                    return found
                if draw is not None and stop - start >= 2 * least:
                    cut = start + int(draw.integers(least, stop - start + 1))
                    stop = cut if stop - cut >= least else stop
                found.append((clip, start, stop))
                room -= int(ids[stop] - ids[start]) + head
                if stop == fits < frames:
                    return found
                start = stop
            at, into = at + 1, 0

    def fixed(self, n: int) -> list[Crop]:
        """At most n crops, evenly spaced over all non-overlapping ones of the split; no randomness."""
        crop = self.stage.crop_frames
        ends = np.cumsum(np.maximum(1, -(-self.frames // crop)), dtype=np.int64)
        total = int(ends[-1])
        chosen = range(total) if n >= total else [(2 * i + 1) * total // (2 * n) for i in range(n)]
        found = []
        for slot in chosen:
            clip = int(np.searchsorted(ends, slot, side="right"))
            start = (slot - int(ends[clip - 1] if clip else 0)) * crop
            found.append((clip, max(0, min(start, int(self.frames[clip]) - crop))))  # the last crop ends with the clip
        return found

    def crop(self, clip: int, start: int) -> tuple[np.ndarray | None, np.ndarray | None, bool]:
        """`cut` of a whole crop, or up to the clip's end."""
        return self.cut(clip, start, min(start + self.stage.crop_frames, int(self.frames[clip])))

    def cut(self, clip: int, start: int, stop: int) -> tuple[np.ndarray | None, np.ndarray | None, bool]:
        """(z_T, codes_TQ, whether the piece reaches the clip's end); None for what the stage does not read."""
        shard, first = self._find(clip)
        a, b = first + start, first + stop
        z_T = None if shard.z_T is None else shard.z_T[a:b].astype(np.int64)
        codes_TQ = None if shard.codes_TQ is None else shard.codes_TQ[RATIO * a:RATIO * b].astype(np.int64)
        return z_T, codes_TQ, stop == self.frames[clip]

    def packed(self, clip: int, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids_T, target_T) of one crop."""
        return self.stage.pack(*self.crop(clip, start))

    def collate(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        """Packed crops, one a row, padded at the right with BOS, which carries no loss and which no earlier id sees."""
        length = max(len(ids) for ids, _ in rows)
        ids_BT = torch.full((len(rows), length), self.stage.bos, dtype=torch.int64)
        target_BT = torch.zeros(len(rows), length, dtype=torch.bool)
        doc_BT = torch.ones(len(rows), length, dtype=torch.int64)
        for b, (ids, target) in enumerate(rows):
            ids_BT[b, :len(ids)], target_BT[b, :len(ids)] = torch.from_numpy(ids), torch.from_numpy(target)
            doc_BT[b, :len(ids)] = 0
        return {"ids_BT": ids_BT, "target_BT": target_BT, "doc_BT": doc_BT}

    def _shards(self, windows: Iterable[tuple[int, int]]) -> list[int]:
        """The shards of some windows, each once."""
        return self.lengths.shards[[s for w in dict.fromkeys(windows) for s in self.plan.ring(*w).shards]].tolist()

    def _find(self, clip: int) -> tuple[Shard, int]:
        """The clip's shard, and its first frame there."""
        shard = self.cache[self.lengths.shard_of(clip)]
        return shard, int(shard.firsts[self.lengths.rows[clip]])

    def _read(self, k: int) -> Shard:
        z_T = codes_TQ = None
        if self.acoustic:
            firsts, codes_TQ = self.acoustic.codes(k, self.stage.columns)
            firsts = firsts // RATIO
        if self.semantic:
            firsts, z_TQ = self.semantic.codes(k, (0,))
            z_T = z_TQ[:, 0]
        ids = np.full(int(firsts[-1]) + 1, self.stage.frame_ids, np.int64)
        ids[0] = 0
        if z_T is not None and self.stage.dedupe:
            begins = run_starts(z_T)
            begins[firsts[:-1]] = True
            ids[1:] += begins
        elif z_T is not None:
            ids[1:] += 1
        return Shard(firsts, z_T, codes_TQ, np.cumsum(ids, out=ids))


def _frame(ids_before: np.ndarray, ids: int) -> int:
    """The last frame that has at most `ids` before it; a deduplicated run is not cut, unless codes go with it."""
    return int(np.searchsorted(ids_before, ids, side="right")) - 1


def _open(path: str | None, step: str, stage: Any) -> TokenStore:
    if path is None:
        raise ValueError(f"stage {stage.name!r} needs {step}: pass that step's output")
    return TokenStore(path)
