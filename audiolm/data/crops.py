"""Crops of audio for the masked model and the codec, in the planned order (DESIGN 1.8).

Row i of step s is a crop of one clip, decided by (lengths, seed, s, i) alone.  A corpus that fits into the cache is decoded
once, clip by clip; of a larger one only the crops are read, by several threads, and whole clips where they must be
resampled.  Shapes: wav_BT float32 at 16 kHz, zero-padded to the crop; lengths_B true samples.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from audiolm.data.audio import SAMPLE_RATE_HZ, read_clip
from audiolm.data.manifest import Clip
from audiolm.data.order import Order

READERS = 4  # decoding lets other threads run


class AudioCrops:
    """Crops of `crop` samples from clips; `cache_mb` bounds the decoded audio kept."""

    def __init__(self, clips: Sequence[Clip], roots: dict[str, str], crop: int, batch: int, seed: int, cache_mb: int):
        self.clips, self.roots, self.crop = list(clips), roots, crop
        self.order = Order([c.samples for c in self.clips], [c.shard for c in self.clips], crop, batch, seed)
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._room, self._held = cache_mb * 2**20, 0
        self._fits = 4 * sum(c.samples for c in self.clips) <= self._room  # float32
        self._readers = ThreadPoolExecutor(READERS)

    def _read(self, i: int, start: int) -> tuple[np.ndarray, bool]:
        """The crop of clip i, or the whole clip and True. In a reader's thread; the cache is the caller's."""
        clip = self.clips[i]
        if self._fits or clip.sample_rate != SAMPLE_RATE_HZ:
            return read_clip(clip, self.roots), True
        return read_clip(clip, self.roots, start, min(self.crop, clip.samples - start)), False

    def _keep(self, i: int, wav: np.ndarray) -> None:
        self._cache[i] = wav
        self._held += wav.nbytes
        while self._held > self._room and len(self._cache) > 1:
            self._held -= self._cache.popitem(last=False)[1].nbytes

    def batch(self, step: int, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(wav_BT, lengths_B) of some rows of step's global batch."""
        wav_BT, lengths_B = torch.zeros(len(rows), self.crop), torch.zeros(len(rows), dtype=torch.int64)
        places = [self.order.row(step, row) for row in rows]
        held = {i: self._cache[i] for i, _ in places if i in self._cache}
        wanted = {(i, 0 if self._fits else start): (i, start) for i, start in places if i not in held}
        found = dict(zip(wanted, self._readers.map(lambda place: self._read(*place), wanted.values()), strict=True))
        for i in held:
            self._cache.move_to_end(i)
        for (i, _), (wav, whole) in found.items():
            if whole and i not in self._cache:
                self._keep(i, wav)
        for b, (i, start) in enumerate(places):
            wav, whole = (held[i], True) if i in held else found[i, 0 if self._fits else start]
            piece = wav[start:start + self.crop] if whole else wav
            wav_BT[b, :len(piece)] = torch.from_numpy(piece)
            lengths_B[b] = len(piece)
        return wav_BT, lengths_B
