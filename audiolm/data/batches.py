"""Rows of token ids for one language-model stage, from both token stores (DESIGN 1.7, 1.8).

A row is a crop of one clip, cut on semantic frames (25 Hz), then packed, and so deduplicated, by the stage.  The plan
needs the manifest's lengths alone; of the stores only the stage's columns are read, a shard at a time, into a bounded
cache.  A stage is any value with the fields of lm.stages.Stage that are used here (data stands below lm).
Shapes: z_T semantic ids; codes_TQ at 50 Hz; ids_BT int64, target_BT bool (the id carries loss), doc_BT int64 (0 = the
row's clip, 1 = padding).  T is the longest row of the call: nothing depends on other rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from audiolm.config import Where
from audiolm.data.manifest import token_clips
from audiolm.data.order import Order
from audiolm.data.tokens import RATIO, Ragged, TokenError, TokenStore, check_pair

Crop = tuple[int, int]  # (clip number, start in semantic frames)


class TokenBatches:
    """Batches of the clips of a split; `clips` are manifest rows, `frames` their semantic frames."""

    def __init__(self, manifest_path: str, semantic_path: str | None, acoustic_path: str | None, stage: Any, split: str,
                 where: Where | None, batch: int, seed: int, cache_mb: int = 256):
        """Raises TokenError for stores that do not belong together, ValueError where the split is empty."""
        self.stage = stage
        self.semantic = _open(semantic_path, "semantic_tokens", stage) if stage.needs_semantic else None
        self.acoustic = _open(acoustic_path, "acoustic_tokens", stage) if stage.needs_acoustic else None
        if self.semantic and self.acoustic:
            check_pair(self.semantic, self.acoustic)
        self.clips = token_clips(manifest_path, (self.semantic or self.acoustic).speeds, split, where)
        if not self.clips:
            raise ValueError(f"lm.{stage.name}.where leaves no {split} clips (it is {where!r}): widen it, or give the "
                             f"corpus a larger {split} share")
        hop = self.semantic.spec["hop"] if self.semantic else RATIO * self.acoustic.spec["hop"]
        self.frames = [max(1, -(-c.samples // hop)) for c in self.clips]
        self.order = Order(self.frames, [c.shard for c in self.clips], stage.crop_frames, batch, seed)
        self._cache: OrderedDict[int, tuple[dict[str, int], list[Ragged], int]] = OrderedDict()
        self._room, self._held = cache_mb * 2**20, 0

    def batch(self, step: int, rows: Iterable[int]) -> dict[str, torch.Tensor]:
        """ids_BT, target_BT, doc_BT of rows of step's global batch; decided by (seed, step, row) alone."""
        return self.collate([self.packed(*self.order.row(step, i)) for i in rows])

    def fixed(self, n: int) -> list[Crop]:
        """At most n crops, evenly spaced over all non-overlapping ones of the split; no randomness."""
        crop = self.stage.crop_frames
        ends = np.cumsum([max(1, -(-f // crop)) for f in self.frames])
        total = int(ends[-1])
        chosen = range(total) if n >= total else [(2 * i + 1) * total // (2 * n) for i in range(n)]
        found = []
        for slot in chosen:
            clip = int(np.searchsorted(ends, slot, side="right"))
            start = (slot - int(ends[clip - 1] if clip else 0)) * crop
            found.append((clip, max(0, min(start, self.frames[clip] - crop))))  # the last crop ends with the clip
        return found

    def crop(self, clip: int, start: int) -> tuple[np.ndarray | None, np.ndarray | None, bool]:
        """(z_T, codes_TQ, whether the crop reaches the clip's end); None for what the stage does not read."""
        stop = min(start + self.stage.crop_frames, self.frames[clip])
        row, columns = self._columns(clip)
        z_T = columns[0][row][start:stop].astype(np.int64) if self.semantic else None
        codes_TQ = None
        if self.acoustic:
            levels = columns[1:] if self.semantic else columns
            codes_TQ = np.stack([c[row][RATIO * start:RATIO * stop] for c in levels], 1).astype(np.int64)
        return z_T, codes_TQ, stop == self.frames[clip]

    def packed(self, clip: int, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids_T, target_T) of one crop."""
        return self.stage.pack(*self.crop(clip, start))

    def collate(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        """Packed rows padded at the right with BOS, which carries no loss and which no earlier id sees."""
        length = max(len(ids) for ids, _ in rows)
        ids_BT = torch.full((len(rows), length), self.stage.bos, dtype=torch.int64)
        target_BT = torch.zeros(len(rows), length, dtype=torch.bool)
        doc_BT = torch.ones(len(rows), length, dtype=torch.int64)
        for b, (ids, target) in enumerate(rows):
            ids_BT[b, :len(ids)], target_BT[b, :len(ids)] = torch.from_numpy(ids), torch.from_numpy(target)
            doc_BT[b, :len(ids)] = 0
        return {"ids_BT": ids_BT, "target_BT": target_BT, "doc_BT": doc_BT}

    def _columns(self, clip: int) -> tuple[int, list[Ragged]]:
        """The clip's row in its shard and the shard's columns: semantic first, then the stage's levels."""
        about = self.clips[clip]
        rows, columns, _ = self._shard(about.shard)
        if about.id not in rows:
            raise TokenError(f"clip {about.id} of the manifest is not in shard {about.shard} of the token store; "
                             "run the token steps again on this manifest")
        row = rows[about.id]
        for at, column in enumerate(columns):
            expected = self.frames[clip] * (1 if self.semantic and at == 0 else RATIO)
            if len(column[row]) != expected:
                raise TokenError(f"clip {about.id} has {len(column[row])} frames in the token store, its length in the "
                                 f"manifest gives {expected}; run the token steps again on this manifest")
        return row, columns

    def _shard(self, k: int) -> tuple[dict[str, int], list[Ragged], int]:
        if k not in self._cache:
            ids, columns = None, []
            for source, levels in ((self.semantic, (0,)), (self.acoustic, self.stage.columns)):
                if source:
                    found = source.levels(k, levels)
                    ids = found.pop("id") if ids is None else ids  # check_pair has shown that both hold the same clips
                    columns += [c for name, c in found.items() if name != "id"]
            size = sum(c.values.nbytes + c.offsets.nbytes for c in columns)
            self._cache[k] = ({name: row for row, name in enumerate(ids)}, columns, size)
            self._held += size
            while self._held > self._room and len(self._cache) > 1:
                self._held -= self._cache.popitem(last=False)[1][2]
        self._cache.move_to_end(k)
        return self._cache[k]


def _open(path: str | None, step: str, stage: Any) -> TokenStore:
    if path is None:
        raise ValueError(f"stage {stage.name!r} needs {step}: pass that step's output")
    return TokenStore(path)
