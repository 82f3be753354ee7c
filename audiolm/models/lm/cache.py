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

    k: list[torch.Tensor]  # per layer (batch, heads, length, width of a head)
    v: list[torch.Tensor]
    lengths_B: torch.Tensor
    rope: Rope | None  # (length, width) each: rotary cosines and sines, where there are any
    longest: int = 0  # the longest row, known without asking the device

    def clear(self) -> None:
        """Empties all rows; the memory stays, its contents are masked and overwritten."""
        self.lengths_B.zero_()
        self.longest = 0

    def rows(self, first: int, last: int) -> KVCache:
        """A view of some empty rows that shares their memory; set `longest` of the whole afterwards."""
        part = slice(first, last)
        return KVCache([t[part] for t in self.k], [t[part] for t in self.v], self.lengths_B[part], self.rope)

    def truncate(self, lengths_B: torch.Tensor, longest: int) -> None:
        """Sets the true lengths of the first rows after a right-padded prompt; keys beyond are masked and overwritten."""
        self.lengths_B[:len(lengths_B)] = lengths_B
        self.longest = longest

    def spread(self, of: list[int], first: int = 0) -> None:
        """Copies row of[b] to row b, counted from `first`: samples of a prompt share its keys and values."""
        n, own = self.longest, self.rows(first, first + len(of))
        for t in (*own.k, *own.v):
            t[:, :, :n] = t[of, :, :n]
        own.lengths_B[:] = own.lengths_B[of]

    def keys(self, t: int) -> int:
        """Number of keys that t new tokens are compared with, in whole runs."""
        run = KEYS if self.lengths_B.device.type == "cpu" else GPU_KEYS
        return min(self.k[0].shape[2], -(-(self.longest + t) // run) * run)


@dataclass
class Places:
    """Cache rows of a step's new tokens, and the keys they attend to; the same for every layer."""

    rows: torch.Tensor  # of the cache seen as (batch x heads x length, width), for each (row, head, new token)
    rope: Rope | None  # (B, t, 1, 1, width)
    keys: int
    seen: torch.Tensor | None  # (B, 1, t, keys) True where a new token attends to a key; None: causal among themselves
    bias: torch.Tensor | None  # (B or 1, H, t, keys), added to the scores; -inf where a key is masked


def places(cache: KVCache, t: int, distance_bias=None) -> Places:
    """Places of t new tokens of every row. Raises ValueError where the cache is full."""
    B, H, length, _ = cache.k[0].shape
    if cache.longest + t > length:
        raise ValueError(f"cache of {length} tokens is full: {cache.longest} held, {t} more; ask for a longer one")
    device = cache.lengths_B.device
    at_Bt = cache.lengths_B[:, None] + torch.arange(t, device=device)
    rows = length * torch.arange(B * H, device=device).view(B, H, 1) + at_Bt[:, None]
    keys = cache.keys(t)
    rope = cache.rope and tuple(x[at_Bt][:, :, None, None] for x in cache.rope)
    if cache.longest == 0 and t > 1:  # a prompt: its tokens attend to each other only
        return Places(rows.view(-1), rope, keys, None, distance_bias and distance_bias(t)[None])
    distance = at_Bt[..., None] - torch.arange(keys, device=device)
    seen, bias = (distance >= 0)[:, None], None
    if distance_bias:
        bias = distance_bias.at(distance).permute(0, 3, 1, 2).masked_fill(~seen, -torch.inf)
    return Places(rows.view(-1), rope, keys, seen, bias)
