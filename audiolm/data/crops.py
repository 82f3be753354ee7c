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

from audiolm import rng
from audiolm.data.audio import SAMPLE_RATE_HZ
from audiolm.data.clips import Clip, read_clip

KEPT = 4  # window permutations held at once: the current one, its neighbours, and one for read-ahead


class CropSampler:
    """Rows of global batches over clips of the given lengths, `shards[c]` being the shard number of clip c."""

    def __init__(self, lengths: Sequence[int], shards: Sequence[int], crop: int, batch: int, seed: int, window: int = 8,
                 align: int = 1):
        """Raises ValueError for no clips, empty clips, or sizes below 1."""
        self.lengths = np.asarray(lengths, np.int64)
        if self.lengths.size == 0:
            raise ValueError("no clips to order: the split is empty after `where`; widen `where` or add audio")
        if len(shards) != len(self.lengths):
            raise ValueError(f"got {len(self.lengths)} lengths but {len(shards)} shard numbers, expected one per clip")
        if self.lengths.min() < 1:
            at = int(self.lengths.argmin())
            raise ValueError(f"clip {at} has length {self.lengths[at]}, expected at least 1")
        for name, value in (("crop", crop), ("batch", batch), ("window", window), ("align", align)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.crop, self.batch, self.seed, self.window, self.align = crop, batch, seed, window, align
        self._slots = np.maximum(1, -(-self.lengths // crop))
        self.slots = int(self._slots.sum())  # of one epoch
        _, index = np.unique(np.asarray(shards, np.int64), return_inverse=True)
        by_shard = np.argsort(index, kind="stable")  # clip numbers, shard after shard
        self._clips = np.split(by_shard, np.cumsum(np.bincount(index))[:-1])
        self._shard_slots = np.array([int(self._slots[c].sum()) for c in self._clips], np.int64)
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def row(self, step: int, i: int) -> tuple[int, int]:
        """(clip number, start) of row i of global batch `step`; starts are uniform over legal multiples of `align`."""
        if not 0 <= i < self.batch:
            raise ValueError(f"row {i} lies outside the global batch of {self.batch}")
        clip = self.clip_at(step * self.batch + i)
        starts = max(0, int(self.lengths[clip]) - self.crop) // self.align + 1
        if starts == 1:
            return clip, 0
        return clip, int(rng.generator(self.seed, "crop", step, i).integers(starts)) * self.align

    def clip_at(self, slot: int) -> int:
        """The clip in a slot of the endless run of epochs."""
        epoch, position = divmod(slot, self.slots)
        permuted, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends, position, side="right"))
        begin = int(ends[window - 1]) if window else 0
        return int(self._window(epoch, window, permuted)[position - begin])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order and the slot number at which each window ends."""
        def make():
            permuted = rng.generator(self.seed, "order", epoch).permutation(len(self._clips))
            sizes = np.add.reduceat(self._shard_slots[permuted], np.arange(0, len(permuted), self.window))
            return permuted, np.cumsum(sizes)
        return _kept(self._epochs, epoch, make)

    def _window(self, epoch: int, window: int, permuted: np.ndarray) -> np.ndarray:
        def make():
            clips = np.concatenate([self._clips[s] for s in permuted[window * self.window:(window + 1) * self.window]])
            return rng.generator(self.seed, "order", epoch, window).permutation(np.repeat(clips, self._slots[clips]))
        return _kept(self._windows, (epoch, window), make)


def _kept(cache: OrderedDict, key, make):
    if key not in cache:
        cache[key] = make()
        while len(cache) > KEPT:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


READERS = 4  # decoding lets other threads run


class AudioCrops:
    """Crops of `crop` samples from clips; `cache_mb` bounds the decoded audio kept."""

    def __init__(self, clips: Sequence[Clip], roots: dict[str, str], crop: int, batch: int, seed: int, cache_mb: int):
        self.clips, self.roots, self.crop = list(clips), roots, crop
        self.order = CropSampler([c.samples for c in self.clips], [c.shard for c in self.clips], crop, batch, seed)
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
