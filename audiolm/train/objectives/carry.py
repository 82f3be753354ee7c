"""Semantic ids of another tokenizer in weights that a training starts from: a new id begins as the mean of its frames' old ids.

So language models go on where units became better or more, and keep what they know of everything else.
N: new ids, O: old ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from audiolm.data.tokens import TokenStore
from audiolm.lm.stages import Stage
from audiolm.tokenizers.start import StartWeights

FRAMES = 10_000_000  # that are compared, 20 MB: 110 hours at 25 Hz, and thousands of each id


def semantic_tables(stage: Stage) -> list[str]:
    """A stage's weights that have a row for each semantic id, before all other rows."""
    if stage.name == "semantic":
        return ["embed.weight", "head.weight", *(["lengths.given.weight"] if stage.lengths else [])]
    return ["backbone.embed.weight" if stage.frames else "embed.weight"]


def carried(weights: Mapping[str, torch.Tensor], tables: Sequence[str], k: int, start: StartWeights,
            tokens: str | None) -> tuple[dict[str, torch.Tensor], int]:
    """(weights, their number of semantic ids): the first k rows of `tables` for the tokenizer of the store `tokens`.

    They stay as they are where the tokenizer is the same, or where the two stores share no clip.
    """
    if not (start.tokens and tokens) or (old := TokenStore(start.tokens)).hash == (new := TokenStore(tokens)).hash:
        return dict(weights), k
    share_NO = shares(old, new)
    if share_NO is None:
        return dict(weights), k
    rows = {name: torch.cat([share_NO.to(weights[name].dtype) @ weights[name][:k], weights[name][k:]]) for name in tables}
    return {**weights, **rows}, len(share_NO)


def shares(old: TokenStore, new: TokenStore) -> torch.Tensor | None:
    """share_NO (rows add up to 1): how often each old id stands in the frames of a new one; None without a shared clip.

    An id of no frame has the shares of all frames.
    """
    counts_NO, kept, seen, codes = np.zeros((new.spec["vocab"], old.spec["vocab"])), 0, 0, {}
    for clip, z_T in _clips(old):
        codes[clip], kept = z_T, kept + len(z_T)
        if kept >= FRAMES:
            break
    for clip, z_T in _clips(new):
        if len(was_T := codes.get(clip, ())) == len(z_T):
            np.add.at(counts_NO, (z_T, was_T), 1)
            seen += len(z_T)
        if seen == kept:
            break
    if not seen:
        return None
    counts_NO[counts_NO.sum(1) == 0] = counts_NO.sum(0)
    return torch.from_numpy(counts_NO / counts_NO.sum(1, keepdims=True))


def _clips(tokens: TokenStore):
    """(id, z_T) of every clip of a store."""
    for shard in range(tokens.shards):
        columns = tokens.levels(shard, [0])
        for row, clip in enumerate(columns["id"]):
            yield clip, columns["q00"][row]
