"""Random crops of audio for the masked model, the codec and the vocoder, in an order planned from the seed.

Row i of step s is a crop of one clip, decided by (lengths, seed, s, i) alone: workers and resumes do not change it.  A
corpus that fits into the cache is decoded once, clip by clip.  From a larger one several threads read the crops alone,
or whole clips where they must be resampled.
Shapes: wav_BT float32 at 16 kHz, zero-padded to the crop; lengths_B samples before the padding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from audiolm import rng
from audiolm.data.audio import SAMPLE_RATE_HZ
from audiolm.data.clip_table import ClipTable
from audiolm.data.clips import read_clip

KEPT = 4  # permutations cached: the current window, its neighbours, and one for the loader's read-ahead
READERS = 4  # threads; decoding releases the interpreter's lock


class CropSampler:
    """Rows of global batches over clips of the given lengths, `shards[c]` being the shard number of clip c.

    An epoch gives each clip one slot per started crop length, so long clips come up in proportion.  Shards are
    permuted, then slots within windows of `window` shards: a worker reads few shards at a time."""

    def __init__(self, lengths: Sequence[int], shards: Sequence[int], crop: int, batch: int, seed: int, window: int = 8):
        """Raises ValueError for no clips, empty clips, or sizes below 1."""
        self.lengths = np.asarray(lengths, np.int64)
        if self.lengths.size == 0:
            raise ValueError("no clips to order: the split is empty after `where`; widen `where` or add audio")
        if self.lengths.min() < 1:
            at = int(self.lengths.argmin())
            raise ValueError(f"clip {at} has length {self.lengths[at]}, expected at least 1")
        for name, value in (("crop", crop), ("batch", batch), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.crop, self.batch, self.seed, self.window = crop, batch, seed, window
        self._slots = np.maximum(1, -(-self.lengths // crop))
        self.slots = int(self._slots.sum())  # of one epoch
        by_shard = np.argsort(shards, kind="stable")  # clip numbers, shard after shard
        self._clips = np.split(by_shard, np.flatnonzero(np.diff(np.asarray(shards)[by_shard])) + 1)
        self._shard_slots = np.array([int(self._slots[c].sum()) for c in self._clips], np.int64)
        # Permutations are drawn again where they are needed again; memory does not grow with the steps taken.
        self._epoch = lru_cache(KEPT)(self._permute_shards)
        self._window = lru_cache(KEPT)(self._permute_slots)

    def row(self, step: int, i: int) -> tuple[int, int]:
        """(clip number, start) of row i of global batch `step`; starts are uniform within the clip."""
        if not 0 <= i < self.batch:
            raise ValueError(f"row {i} lies outside the global batch of {self.batch}")
        clip = self.clip_at(step * self.batch + i)
        starts = max(0, int(self.lengths[clip]) - self.crop) + 1
        return clip, 0 if starts == 1 else int(rng.generator(self.seed, "crop", step, i).integers(starts))

    def clip_at(self, slot: int) -> int:
        """The clip in a slot of the endless run of epochs."""
        epoch, position = divmod(slot, self.slots)
        _, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends, position, side="right"))
        begin = int(ends[window - 1]) if window else 0
        return int(self._window(epoch, window)[position - begin])

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order and the slot number at which each window ends."""
        permuted = rng.generator(self.seed, "order", epoch).permutation(len(self._clips))
        sizes = np.add.reduceat(self._shard_slots[permuted], np.arange(0, len(permuted), self.window))
        return permuted, np.cumsum(sizes)

    def _permute_slots(self, epoch: int, window: int) -> np.ndarray:
        """The clip numbers of a window's slots, in this epoch's order."""
        permuted, _ = self._epoch(epoch)
        clips = np.concatenate([self._clips[s] for s in permuted[window * self.window:(window + 1) * self.window]])
        return rng.generator(self.seed, "order", epoch, window).permutation(np.repeat(clips, self._slots[clips]))


class AudioCrops:
    """Crops of `crop` samples from clips; `cache_mb` bounds the decoded audio kept."""

    def __init__(self, clips: ClipTable, roots: dict[str, str], crop: int, batch: int, seed: int, cache_mb: int):
        self.clips, self.roots, self.crop = clips, roots, crop
        self.order = CropSampler(clips.samples, clips.shards, crop, batch, seed)
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()  # whole clips by number, the latest used last
        self._room, self._held = cache_mb * 2**20, 0
        self._fits = 4 * int(clips.samples.sum()) <= self._room  # float32
        self._readers = ThreadPoolExecutor(READERS)

    def _read(self, place: tuple[int, int]) -> tuple[np.ndarray, bool]:
        """The crop of clip i from `start`, or the whole clip and True. Runs in a reader's thread, without the cache."""
        i, start = place
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
        """(wav_BT, lengths_B) of some rows of step's global batch: a rank asks for its own."""
        wav_BT, lengths_B = torch.zeros(len(rows), self.crop), torch.zeros(len(rows), dtype=torch.int64)
        places = [self.order.row(step, row) for row in rows]
        cached = {i: self._cache[i] for i, _ in places if i in self._cache}
        # Rows that share a clip read it once where whole clips are cached; else every crop is its own read.
        missing = {(i, 0 if self._fits else start): (i, start) for i, start in places if i not in cached}
        read = dict(zip(missing, self._readers.map(self._read, missing.values()), strict=True))
        for i in cached:
            self._cache.move_to_end(i)
        for (i, _), (wav, whole) in read.items():
            if whole and i not in self._cache:
                self._keep(i, wav)
        # Rows are taken from `cached` and `read`: the cache may have dropped a clip of this very batch by now.
        for b, (i, start) in enumerate(places):
            wav, whole = (cached[i], True) if i in cached else read[i, 0 if self._fits else start]
            piece = wav[start:start + self.crop] if whole else wav
            wav_BT[b, :len(piece)] = torch.from_numpy(piece)
            lengths_B[b] = len(piece)
        return wav_BT, lengths_B
