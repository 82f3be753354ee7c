"""What sampling keeps of the tokens so far: keys and values of every layer, in rows of different lengths."""

from __future__ import annotations

from dataclasses import dataclass

import torch

KEYS = 64  # on a CPU keys come in whole runs of these, masked ones add exact zeros


@dataclass
class Cache:
    """Keys and values of every layer; row b holds `lengths_B[b]` tokens at the places 0, 1, ..."""

    k: list[torch.Tensor]  # per layer (batch, heads, length, width of a head)
    v: list[torch.Tensor]
    lengths_B: torch.Tensor
    turns: tuple[torch.Tensor, torch.Tensor] | None  # (length, width) each: rotary cosines and sines, where there are any
    longest: int = 0  # the longest row, known without asking the device

    def row(self, b: int) -> Cache:
        """A view of one empty row that shares its memory; set `longest` of the whole afterwards."""
        return Cache([t[b:b + 1] for t in self.k], [t[b:b + 1] for t in self.v], self.lengths_B[b:b + 1], self.turns)

    def truncate(self, lengths_B: torch.Tensor, longest: int) -> None:
        """Declares the true lengths after a right-padded prompt; what lies beyond is masked and overwritten."""
        self.lengths_B.copy_(lengths_B)
        self.longest = longest


@dataclass
class Places:
    """Where a step's new tokens go and what they see; the same for every layer."""

    rows: torch.Tensor  # of the cache seen as (batch x heads x length, width), for each (row, head, new token)
    turns: tuple[torch.Tensor, torch.Tensor] | None  # (B, t, 1, 1, width)
    keys: int
    seen: torch.Tensor | None  # (B, 1, t, keys) True where a new token sees a key; None: causal among themselves
    bias: torch.Tensor | None  # (B or 1, H, t, keys), added to the scores; -inf where a key is not seen


def places(cache: Cache, t: int, distance_bias=None) -> Places:
    """Of t new tokens of every row. Raises ValueError where the cache is full."""
    B, H, length, _ = cache.k[0].shape
    if cache.longest + t > length:
        raise ValueError(f"cache of {length} tokens is full: {cache.longest} held, {t} more; ask for a longer one")
    device = cache.lengths_B.device
    at_Bt = cache.lengths_B[:, None] + torch.arange(t, device=device)
    rows = length * torch.arange(B * H, device=device).view(B, H, 1) + at_Bt[:, None]
    keys = min(length, -(-(cache.longest + t) // KEYS) * KEYS)
    turns = cache.turns and tuple(x[at_Bt][:, :, None, None] for x in cache.turns)
    if cache.longest == 0 and t > 1:  # an empty cache's new tokens see each other only
        return Places(rows.view(-1), turns, keys, None, distance_bias and distance_bias(t)[None])
    distance = at_Bt[..., None] - torch.arange(keys, device=device)
    seen, bias = (distance >= 0)[:, None], None
    if distance_bias:
        bias = distance_bias.at(distance).permute(0, 3, 1, 2).masked_fill(~seen, -torch.inf)
    return Places(rows.view(-1), turns, keys, seen, bias)
