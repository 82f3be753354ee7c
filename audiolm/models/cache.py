"""What sampling keeps of the tokens so far: keys and values of every layer, in rows of different lengths."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from audiolm.models.positions import Rope

KEYS = 64  # keys come in whole runs of these, masked ones add exact zeros: few shapes, and bits that no other row changes
GPU_KEYS = 256  # a CUDA graph each: reading 128 keys too many costs less than many graphs


@dataclass
class KVCache:
    """Keys and values of every layer; row b holds `lengths_B[b]` tokens at the places 0, 1, ..."""

    k: list[torch.Tensor]  # per layer (batch, heads, length, width of a head)
    v: list[torch.Tensor]
    lengths_B: torch.Tensor
    rope: Rope | None  # (length, width) each: rotary cosines and sines, where there are any
    longest: int = 0  # the longest row, known without asking the device

    def clear(self) -> None:
        """Forgets all rows; the memory stays, and what lies in it is masked and overwritten."""
        self.lengths_B.zero_()
        self.longest = 0

    def rows(self, first: int, last: int) -> KVCache:
        """A view of some empty rows that shares their memory; set `longest` of the whole afterwards."""
        part = slice(first, last)
        return KVCache([t[part] for t in self.k], [t[part] for t in self.v], self.lengths_B[part], self.rope)

    def truncate(self, lengths_B: torch.Tensor, longest: int) -> None:
        """Declares the true lengths of the first rows after a right-padded prompt; what lies beyond is masked and
        overwritten."""
        self.lengths_B[:len(lengths_B)] = lengths_B
        self.longest = longest

    def spread(self, of: list[int]) -> None:
        """Row b becomes what row of[b] is, for the first rows: samples of a prompt share what was computed for it."""
        n = self.longest
        for t in (*self.k, *self.v):
            t[:len(of), :, :n] = t[of, :, :n]
        self.lengths_B[:len(of)] = self.lengths_B[of]

    def keys(self, t: int) -> int:
        """How many keys t new tokens are compared with: whole runs, and few different numbers."""
        run = KEYS if self.lengths_B.device.type == "cpu" else GPU_KEYS
        return min(self.k[0].shape[2], -(-(self.longest + t) // run) * run)


@dataclass
class Places:
    """Where a step's new tokens go and what they see; the same for every layer."""

    rows: torch.Tensor  # of the cache seen as (batch x heads x length, width), for each (row, head, new token)
    rope: Rope | None  # (B, t, 1, 1, width)
    keys: int
    seen: torch.Tensor | None  # (B, 1, t, keys) True where a new token sees a key; None: causal among themselves
    bias: torch.Tensor | None  # (B or 1, H, t, keys), added to the scores; -inf where a key is not seen


def places(cache: KVCache, t: int, distance_bias=None) -> Places:
    """Of t new tokens of every row. Raises ValueError where the cache is full."""
    B, H, length, _ = cache.k[0].shape
    if cache.longest + t > length:
        raise ValueError(f"cache of {length} tokens is full: {cache.longest} held, {t} more; ask for a longer one")
    device = cache.lengths_B.device
    at_Bt = cache.lengths_B[:, None] + torch.arange(t, device=device)
    rows = length * torch.arange(B * H, device=device).view(B, H, 1) + at_Bt[:, None]
    keys = cache.keys(t)
    rope = cache.rope and tuple(x[at_Bt][:, :, None, None] for x in cache.rope)
    if cache.longest == 0 and t > 1:  # an empty cache's new tokens see each other only
        return Places(rows.view(-1), rope, keys, None, distance_bias and distance_bias(t)[None])
    distance = at_Bt[..., None] - torch.arange(keys, device=device)
    seen, bias = (distance >= 0)[:, None], None
    if distance_bias:
        bias = distance_bias.at(distance).permute(0, 3, 1, 2).masked_fill(~seen, -torch.inf)
    return Places(rows.view(-1), rope, keys, seen, bias)
