"""Crops of audio for the masked model and the codec, in the planned order (DESIGN 1.8).

Row i of step s is a crop of one clip, decided by (lengths, seed, s, i) alone.  Whole clips are decoded once and kept in
a bounded cache.  Shapes: wav_BT float32 at 16 kHz, zero-padded to the crop; lengths_B true samples.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from audiolm.data.audio import read_clip
from audiolm.data.manifest import Clip
from audiolm.data.order import Order


class AudioCrops:
    """Crops of `crop` samples from clips; `cache_mb` bounds the decoded audio kept."""

    def __init__(self, clips: Sequence[Clip], roots: dict[str, str], crop: int, batch: int, seed: int, cache_mb: int):
        self.clips, self.roots, self.crop = list(clips), roots, crop
        self.order = Order([c.samples for c in self.clips], [c.shard for c in self.clips], crop, batch, seed)
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._room, self._held = cache_mb * 2**20, 0

    def clip(self, i: int) -> np.ndarray:
        """The whole clip i, float32 at 16 kHz."""
        if i in self._cache:
            self._cache.move_to_end(i)
            return self._cache[i]
        wav = read_clip(self.clips[i], self.roots)
        self._cache[i] = wav
        self._held += wav.nbytes
        while self._held > self._room and len(self._cache) > 1:
            self._held -= self._cache.popitem(last=False)[1].nbytes
        return wav

    def batch(self, step: int, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(wav_BT, lengths_B) of some rows of step's global batch."""
        wav_BT, lengths_B = torch.zeros(len(rows), self.crop), torch.zeros(len(rows), dtype=torch.int64)
        for b, row in enumerate(rows):
            i, start = self.order.row(step, row)
            piece = self.clip(i)[start:start + self.crop]
            wav_BT[b, :len(piece)] = torch.from_numpy(piece)
            lengths_B[b] = len(piece)
        return wav_BT, lengths_B
