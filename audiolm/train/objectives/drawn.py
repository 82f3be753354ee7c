"""Codes that stage 2 draws after recorded frames, with which the decoder that hears is trained (lm.decoder.drawn).

Every frame is drawn from what the stage makes of the recorded frames before it, all in one pass (as lm.frames.own_frames).  So
the codes keep the time, the voice and the loudness of the recording, and their details are as the stage draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from audiolm.lm.loss import inputs_of, prepare
from audiolm.lm.model import load_lm
from audiolm.lm.pack_rows import pack_rows
from audiolm.train.objectives.base import autocast

PREFIX = "drawn."  # of the tensors' names in a batch


class DrawnCodes:
    """Draws for crops of (z_N, codes_TQ); frozen."""

    def __init__(self, path: str, device: torch.device, dtype: str):
        """The stage of a finished lm_coarse build, which draws all levels as frames. Raises as load_lm."""
        self.model, self.stage = load_lm(path, device)
        self.device, self.dtype = device, dtype

    def load(self, crops: Sequence[tuple[np.ndarray, np.ndarray]], draws: Sequence[np.random.Generator],
             known_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """The CPU tensors that a call needs, beside a batch of these crops; draws: a generator a crop."""
        rows = [[self.stage.pack(z_N, codes_TQ, at_end=False)] for z_N, codes_TQ in crops]
        tensors = prepare(self.stage, pack_rows(self.stage, rows))
        size, slots = tensors["index_SN"].shape[1], self.stage.slots
        uniform = np.concatenate([draw.random((len(codes_TQ), slots))
                                  for draw, (_, codes_TQ) in zip(draws, crops, strict=True)])
        to_N = torch.full((size,), known_BT.numel())  # where empty places go
        to_N[:len(uniform)] = known_BT.flatten().nonzero()[:, 0]
        tensors["uniform_NS"] = torch.zeros(size, slots)
        tensors["uniform_NS"][:len(uniform)] = torch.from_numpy(uniform.astype(np.float32))
        return {PREFIX + name: x for name, x in {**tensors, "to_N": to_N}.items()}

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """codes_BTQ of a batch on the device, with which `load`'s tensors are."""
        tensors = {name.removeprefix(PREFIX): x for name, x in batch.items() if name.startswith(PREFIX)}
        with autocast(self.device, self.dtype):
            drawn_NQ = self.model(*inputs_of(tensors), uniform_NS=tensors["uniform_NS"])
        codes_BTQ = batch["codes_BTQ"]  # zeros where the padding is, and the place beyond the last one for empty places
        flat_MQ = F.pad(torch.zeros_like(codes_BTQ).flatten(0, 1), (0, 0, 0, 1))
        return flat_MQ.index_copy(0, tensors["to_N"], drawn_NQ)[:-1].unflatten(0, codes_BTQ.shape[:2])
