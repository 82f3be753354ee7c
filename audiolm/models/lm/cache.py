"""Key-value cache of sampling: keys and values of every layer, in rows of different lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from audiolm.models.positions import Rope

# Keys are read in whole runs.  Masked keys add exact zeros, so there are few shapes, and a row's bits do not depend on
# how long the other rows are.
KEYS = 64
GPU_KEYS = 256  # a CUDA graph for each number of keys: reading 128 too many costs less than many graphs


@dataclass
class KVCache:
    """Keys and values of every layer; row b holds `lengths_B[b]` tokens from position 0"""

    kv: list[torch.Tensor]  # per layer (2, batch, heads, length, width of a head): keys, values
    lengths_B: torch.Tensor
    number_N: torch.Tensor  # 0, 1, ...: positions, and rows
    rope: torch.Tensor | None  # (length, 2, width): rotary cosines and sines, where there are any
    longest: int = 0  # the longest row, known without asking the device

    def clear(self) -> None:
        """Empties all rows; the memory stays, its contents are masked and overwritten."""
        self.lengths_B.zero_()
        self.longest = 0

    def rows(self, first: int, last: int) -> KVCache:
        """A view of some empty rows that shares their memory; set `longest` of the whole afterwards."""
        return KVCache([t[:, first:last] for t in self.kv], self.lengths_B[first:last], self.number_N, self.rope)

    def truncate(self, lengths_B: torch.Tensor, longest: int) -> None:
        """Sets the true lengths of the first rows after a right-padded prompt; keys beyond are masked and overwritten."""
        self.lengths_B[:len(lengths_B)] = lengths_B
        self.longest = longest

    def spread(self, of: list[int], first: int = 0) -> None:
        """Copies row of[b] to row b, counted from `first`: samples of a prompt share its keys and values."""
        n, own = self.longest, self.rows(first, first + len(of))
        for t in own.kv:
            t[..., :n, :] = t[:, of, :, :n]
        own.lengths_B[:] = own.lengths_B[of]

    def keys(self, t: int) -> int:
        """Number of keys that t new tokens are compared with, in whole runs."""
        run = KEYS if self.lengths_B.device.type == "cpu" else GPU_KEYS
        return min(self.kv[0].shape[3], -(-(self.longest + t) // run) * run)


@dataclass
class Places:
    """Where a step's new tokens stand in the cache, and the keys they attend to; the same for every layer."""

    row_B1: torch.Tensor
    at_Bt: torch.Tensor  # position of each new token in its row
    rope: Rope | None  # (B, t, 1, 1, width)
    keys: int
    hidden: torch.Tensor | None  # (B, 1, t, keys) True where a key comes after a new token; None: causal among themselves
    bias: torch.Tensor | None  # (B or 1, H, t, keys), added to the scores; -inf where a key is masked
    room: torch.Tensor | None = None  # (R, t, D) zeros where a step has more rows than the cache: models.lm.block.ROWS


def places(cache: KVCache, t: int, distance_bias=None) -> Places:
    """Places of t new tokens of every row. Raises ValueError where the cache is full."""
    B, length, number = cache.kv[0].shape[1], cache.kv[0].shape[3], cache.number_N
    if cache.longest + t > length:
        raise ValueError(f"cache of {length} tokens is full: {cache.longest} held, {t} more; ask for a longer one")
    row_B1, at_Bt = number[:B, None], cache.lengths_B[:, None]
    at_Bt = at_Bt + number[:t] if t > 1 else at_Bt
    keys = cache.keys(t)
    rope = None if cache.rope is None else cache.rope[at_Bt][:, :, :, None, None].unbind(2)
    if cache.longest == 0 and t > 1:  # a prompt: its tokens attend to each other only
        return Places(row_B1, at_Bt, rope, keys, None, distance_bias and distance_bias(t)[None])
    hidden, bias = (at_Bt[..., None] < number[:keys])[:, None], None
    if distance_bias:
        distance = at_Bt[..., None] - number[:keys]
        bias = distance_bias.at(distance).permute(0, 3, 1, 2).masked_fill(hidden, -torch.inf)
        bias = bias.float() if t == 1 else bias  # scores of a single token are added up in float32
    return Places(row_B1, at_Bt, rope, keys, hidden, bias)
