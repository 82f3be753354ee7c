"""Rows of token ids for one language-model stage, from both token stores.

Training packs a row with documents, each a span of one clip in the stage's layout.  Where a row is full its last clip is
cut; another row takes the rest (lm.row_plan).  Validation takes plain crops, one a row.  Everything is planned from
lengths; only the stage's columns of a shard are read, ahead of their use, into a bounded cache.

Shapes: z_T semantic ids at 25 Hz; codes_TQ at 50 Hz; ids_BT int64; target_BT bool, True where the id carries loss;
doc_BT int64, the document's number within its row, the padding at a row's end one more; cond_BTC (the ids added to each
position) and length_BT where the stage has them (lm.stages).  T is stage.max_len, in `collate` the longest row's length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from audiolm import rng
from audiolm.config.corpus import ClipFilter
from audiolm.data.clips import Clip, token_clips
from audiolm.data.tokens import RATIO, TokenStore, check_pair
from audiolm.lm.clip_lengths import read_lengths
from audiolm.lm.pack_rows import pack_rows
from audiolm.lm.row_plan import PackingPlan
from audiolm.lm.run_lengths import MAX_RUN, id_starts
from audiolm.lm.shard_cache import ShardCache
from audiolm.lm.stages import SEMANTIC_HZ, Packed, Stage

EvalCrop = tuple[int, int]  # (clip number, start in semantic frames)
ClipSpan = tuple[int, int, int]  # (clip number, start, stop) in semantic frames
# The shortest span that a cut may leave at a row's start or end: 1 s, an eighth of the crop or a quarter of the clip,
# whichever is least.  Shorter ones would be mostly special ids and prefix; longer ones would leave rows unfilled.
MIN_SPAN, MIN_CROP_PART, MIN_CLIP_PART = 1 * SEMANTIC_HZ, 8, 4


@dataclass(frozen=True)
class ShardTokens:
    """The stage's columns of one shard; clip i begins at semantic frame firsts[i]."""

    firsts: np.ndarray
    z_T: np.ndarray | None
    codes_TQ: np.ndarray | None
    ids_before: np.ndarray  # by frame, and at the end: positions of the frames before it in the stage's layout


class TokenBatches:
    """Batches of the clips of a split, in the manifest's order; `frames`: their semantic frames."""

    def __init__(self, manifest_path: str, semantic_path: str | None, acoustic_path: str | None, stage: Stage, split: str,
                 where: ClipFilter | None, batch: int, seed: int, cache_mb: int = 256):
        """Raises TokenError for stores that do not belong together, ValueError where the split is empty."""
        self.stage, self.batch_rows, self.seed = stage, batch, seed
        self.semantic = _open(semantic_path, "semantic_tokens", stage) if stage.needs_semantic else None
        self.acoustic = _open(acoustic_path, "acoustic_tokens", stage) if stage.needs_acoustic else None
        if self.semantic and self.acoustic:
            check_pair(self.semantic, self.acoustic)
        self.stores = [s for s in (self.semantic, self.acoustic) if s]
        ratio = 1 if self.semantic else RATIO  # the first store's frames in a semantic frame
        hop = ratio * self.stores[0].spec["hop"]
        self.lengths = read_lengths(manifest_path, split, where, hop, self.stores)
        self.frames = self.lengths.frames
        if not len(self.frames):
            raise ValueError(f"lm.{stage.name}.where leaves no {split} clips (it is {where!r}): widen it, or give the "
                             f"corpus a larger {split} share")
        # bytes of a ShardTokens: ids_before 8, z_T 2 and codes_TQ 2 a code for each frame, firsts 8 for each clip
        files, width = self.stores[0].files, 8 + 2 * int(stage.needs_semantic) + 2 * RATIO * len(stage.columns)
        self._sizes = np.array([width * (f["frames"] // ratio) + 8 * f["clips"] for f in files])
        self.cache = ShardCache(self._read_shard, self._sizes, cache_mb * 2**20)
        self._min_span = max(1, min(MIN_SPAN, stage.crop_frames // MIN_CROP_PART))
        self._query = manifest_path, split, where

    @cached_property
    def clips(self) -> list[Clip]:
        """The split's clips as the manifest describes them; training does without, for there may be millions."""
        manifest_path, split, where = self._query
        return token_clips(manifest_path, self.stores[0].speeds, split, where)

    @cached_property
    def plan(self) -> PackingPlan:
        """The packing plan, made at the first batch. With deduplication it reads a number of each clip from the index."""
        stage, lengths = self.stage, self.lengths
        costs = stage.frame_ids * self.frames + stage.n_special
        if stage.needs_semantic and stage.dedupe:
            n_dedup, places = self.semantic.index.n_dedup()
            costs += n_dedup[np.repeat(places[lengths.shards], np.diff(lengths.firsts)) + lengths.rows]
        elif stage.needs_semantic:
            costs += self.frames
        # a row pays the special ids of one clip more than the costs know of (the one it cuts), and a cut falls on whole
        # frames, half a frame before the row's end on average
        stride = max(1, stage.max_len - stage.n_special - stage.frame_ids // 2)
        size = float(self._sizes[lengths.shards].mean())
        return PackingPlan(costs, lengths.firsts, stride, self.batch_rows, self.seed, size)

    # -- training rows -------------------------------------------------------------------------------------------

    def batch(self, step: int, rows: Iterable[int]) -> dict[str, torch.Tensor]:
        """ids_BT, target_BT, doc_BT and what else the stage has of some rows of step's global batch; decided by (seed, step,
        row) alone."""
        rows = list(rows)
        self.expect(step, rows)
        return pack_rows(self.stage, [self.documents(step, i) for i in rows], self.stage.max_len)

    def expect(self, step: int, rows: Sequence[int]) -> None:
        """Has the shards of some rows of a step read in the background."""
        plan = self.plan
        # the reader threads start on this step's shards, then on those that the same rows need a window later
        now, later = (self._shards(plan.address(s, i)[:2] for i in rows) for s in (step, step + plan.ahead))
        self.cache.expect(now, later)

    def documents(self, step: int, i: int) -> list[Packed]:
        """The packed spans of a row, a share of them without their condition."""
        spans, dropped = self.spans(step, i), self.stage.dropped
        drop = (rng.generator(self.seed, "condition", *self.plan.address(step, i)).random(len(spans)) < dropped if dropped
                else np.zeros(len(spans), bool))
        return [self.stage.pack(*self.read(*span), bool(d)) for span, d in zip(spans, drop, strict=True)]

    def spans(self, step: int, i: int) -> list[ClipSpan]:
        """The documents of a row: from its start on the ring, clip by clip, until it is full."""
        address = self.plan.address(step, i)
        window = self.plan.window(*address[:2])
        at, into = window.start_of(address[2])
        draw = rng.generator(self.seed, "pieces", *address) if self.stage.min_crop_frames else None
        room, full, spans = self.stage.max_len, False, []
        while not full:
            clip = int(window.clips[at % len(window.clips)])  # a short window comes round again
            found, room, full = self._spans_of(clip, into, room, draw)
            spans += found
            at, into = at + 1, 0
        return spans

    def _spans_of(self, clip: int, into: int, room: int,
                  draw: np.random.Generator | None) -> tuple[list[ClipSpan], int, bool]:
        """(spans of a clip from `into` ids on, ids of room left, True where the row is full). `draw` cuts at random."""
        stage, frames, least = self.stage, int(self.frames[clip]), self.stage.min_crop_frames
        shortest = max(1, min(self._min_span, frames // MIN_CLIP_PART))
        shard, first = self._locate(clip)
        ids_before = shard.ids_before[first:first + frames + 1]
        start = _frame_at(ids_before, int(ids_before[0]) + into) if into else 0
        if start < shortest:  # what is before the start is too short for another row: take it too
            start = 0
        elif frames - start < shortest:  # what is left is too short: the next clip is first
            start = frames
        # a deduplicated run whose codes are cut is paid twice: its id begins both spans
        halved = int(stage.dedupe and stage.name == "coarse")
        spans: list[ClipSpan] = []
        while start < frames:
            overhead = stage.n_special + (halved if start else 0)
            fits = stop = _frame_at(ids_before, int(ids_before[start]) + room - overhead)
            if stop < frames and stop - start < shortest:
                return spans, room, True
            if draw is not None and stop - start >= 2 * least:
                # stage 3: lengths uniform from min_crop_s up, so that generation may end with a shorter chunk
                cut = start + int(draw.integers(least, stop - start + 1))
                stop = cut if stop - cut >= least else stop
            spans.append((clip, start, stop))
            room -= int(ids_before[stop] - ids_before[start]) + overhead
            if stop == fits < frames:
                return spans, room, True
            start = stop
        return spans, room, False

    # -- validation rows and crops -------------------------------------------------------------------------------

    def fixed(self, n: int) -> list[EvalCrop]:
        """At most n crops, evenly spaced over all crops that part the split's clips; no randomness."""
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
        """`read` of a whole crop, or up to the clip's end."""
        return self.read(clip, start, min(start + self.stage.crop_frames, int(self.frames[clip])))

    def packed(self, clip: int, start: int) -> Packed:
        """One crop in the stage's layout."""
        return self.stage.pack(*self.crop(clip, start))

    def collate(self, rows: Sequence[Packed]) -> dict[str, torch.Tensor]:
        """A batch of packed crops, one a row, as long as the longest."""
        return pack_rows(self.stage, [[row] for row in rows])

    # -- shards --------------------------------------------------------------------------------------------------

    def read(self, clip: int, start: int, stop: int) -> tuple[np.ndarray | None, np.ndarray | None, bool]:
        """(z_T, codes_TQ, True where the span reaches the clip's end) as `Stage.pack` takes them; None if unused."""
        shard, first = self._locate(clip)
        a, b = first + start, first + stop
        z_T = None if shard.z_T is None else shard.z_T[a:b].astype(np.int64)
        codes_TQ = None if shard.codes_TQ is None else shard.codes_TQ[RATIO * a:RATIO * b].astype(np.int64)
        return z_T, codes_TQ, stop == self.frames[clip]

    def _shards(self, windows: Iterable[tuple[int, int]]) -> list[int]:
        """Shard numbers of some (epoch, window), each once."""
        return self.lengths.shards[[s for w in dict.fromkeys(windows) for s in self.plan.window(*w).shards]].tolist()

    def _locate(self, clip: int) -> tuple[ShardTokens, int]:
        """The clip's shard, and its first frame there."""
        shard = self.cache[self.lengths.shard_of(clip)]
        return shard, int(shard.firsts[self.lengths.rows[clip]])

    def _read_shard(self, k: int) -> ShardTokens:
        """Shard k of both stores; runs in the cache's reader threads."""
        z_T = codes_TQ = None
        if self.acoustic:
            firsts, codes_TQ = self.acoustic.codes(k, self.stage.columns)
            firsts = firsts // RATIO
        if self.semantic:
            firsts, z_TQ = self.semantic.codes(k, (0,))
            z_T = z_TQ[:, 0]
        # ids of each frame, shifted by one: a sum of them is the ids before each frame
        ids = np.full(int(firsts[-1]) + 1, self.stage.frame_ids, np.int64)
        ids[0] = 0
        if z_T is not None and self.stage.dedupe:
            longest = MAX_RUN if self.stage.lengths else None
            ids[1:] += np.concatenate([id_starts(z_T[a:b], longest) for a, b in pairwise(firsts)] or [np.zeros(0, bool)])
        elif z_T is not None:
            ids[1:] += 1
        return ShardTokens(firsts, z_T, codes_TQ, np.cumsum(ids, out=ids))


def _frame_at(ids_before: np.ndarray, ids: int) -> int:
    """The last frame with at most `ids` ids before it: right behind a deduplicated run, unless codes go with it."""
    return int(np.searchsorted(ids_before, ids, side="right")) - 1


def _open(path: str | None, step: str, stage: Stage) -> TokenStore:
    if path is None:
        raise ValueError(f"stage {stage.name!r} needs {step}: pass that step's output")
    return TokenStore(path)
