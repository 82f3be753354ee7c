"""Codes that stage 2 draws after recorded frames, with which the decoder that hears is trained (lm.decoder.drawn).

In the first pass every frame is drawn after the recorded frames, in the next after those of the pass before (lm.frames), all
frames at once.  So the codes keep the time, the voice and the loudness of the recording, and their details are as the stage
draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from audiolm.lm.frames import drawn_frames, own_draws
from audiolm.lm.loss import prepare
from audiolm.lm.model import load_lm
from audiolm.lm.pack_rows import pack_rows
from audiolm.train.objectives.base import autocast

PREFIX = "drawn."  # of the tensors' names in a batch


class DrawnCodes:
    """Draws for crops of (z_N, codes_TQ); frozen."""

    def __init__(self, path: str, passes: int, device: torch.device, dtype: str):
        """The stage of a finished lm_coarse build, which draws all levels as frames. Raises as load_lm."""
        self.model, self.stage = load_lm(path, device)
        self.passes, self.device, self.dtype = passes, device, dtype

    def load(self, crops: Sequence[tuple[np.ndarray, np.ndarray]], draws: Sequence[np.random.Generator],
             known_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """The CPU tensors that a call needs, beside a batch of these crops; draws: a generator a crop."""
        rows = [[self.stage.pack(z_N, codes_TQ, at_end=False)] for z_N, codes_TQ in crops]
        batch = pack_rows(self.stage, rows)
        tensors = prepare(self.stage, batch) | own_draws(self.stage, batch, 0.0, self.passes, draws)
        to_N = torch.full((tensors["index_SN"].shape[1],), known_BT.numel())  # where empty places go
        to_N[:int(known_BT.sum())] = known_BT.flatten().nonzero()[:, 0]  # a batch's targets are its frames, in the same order
        return {PREFIX + name: x for name, x in {**tensors, "to_N": to_N}.items()}

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """codes_BTQ of a batch on the device, with which `load`'s tensors are."""
        tensors = {name.removeprefix(PREFIX): x for name, x in batch.items() if name.startswith(PREFIX)}
        with autocast(self.device, self.dtype):
            drawn_NQ = drawn_frames(self.model, self.stage, tensors)
        codes_BTQ = batch["codes_BTQ"]  # zeros where the padding is, and the place beyond the last one for empty places
        flat_MQ = F.pad(torch.zeros_like(codes_BTQ).flatten(0, 1), (0, 0, 0, 1))
        return flat_MQ.index_copy(0, tensors["to_N"], drawn_NQ)[:-1].unflatten(0, codes_BTQ.shape[:2])
