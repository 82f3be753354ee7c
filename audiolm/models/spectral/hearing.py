"""A decoder that hears: the spectral codec's frames from codes and semantic ids, so that words survive badly drawn codes.

Words are quick and voices slow, and small language models draw codes that keep the slow part alone.  So the decoder reads the
codes' latents as a moving average, the id of each frame, which says the words, and the mean of latents that are the voice's,
such as a prompt's.  What it adds takes the place of the codec's own correction.
Shapes: x_BDT latents; voice_BD their mean; z_BN semantic ids, T = 2 N; known_BT True for frames, False for padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from audiolm.models.spectral.blocks import Correction

FRAMES = 2  # of the codec in the time of a semantic id


@dataclass(frozen=True)
class HearingSizes:
    """latents' dimensions; k ids with vectors of `unit`; `values` of a frame; `width` and `layers` of the network; `slow`:
    frames of the moving average, odd."""

    latent: int
    k: int
    unit: int
    values: int
    width: int
    layers: int
    slow: int


class HearingDecoder(nn.Module):
    """`initialise` gives it the sizes and places of codes and ids before its training."""

    kind = "hearing"  # of its export

    def __init__(self, sizes: HearingSizes):
        super().__init__()
        s = self.sizes = sizes
        self.unit_KU = nn.Parameter(torch.zeros(s.k, s.unit))
        self.network = Correction(2 * s.latent + s.unit + FRAMES, s.values, s.width, s.layers, causal=False)
        self.register_buffer("size", torch.ones(()))  # of a code's values

    @torch.no_grad()
    def initialise(self, code_VE: torch.Tensor, centroid_KD: torch.Tensor) -> None:
        """Takes the first level's code vectors and the clusters' centroids, where like ids lie together."""
        self.size.copy_(code_VE.square().mean().sqrt())
        self.unit_KU.copy_((centroid_KD - centroid_KD.mean(0)) / centroid_KD.std())

    def forward(self, x_BDT: torch.Tensor, voice_BD: torch.Tensor, z_BN: torch.Tensor,
                known_BT: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(the averaged latents_BDT, correction_BTF), as SpectralCodec.expand takes them."""
        x_BDT = self._slow(x_BDT, torch.ones_like(x_BDT[:, 0]) if known_BT is None else known_BT)
        x_BTD, voice_BTD = x_BDT.transpose(1, 2), voice_BD[:, None].expand(-1, x_BDT.shape[2], -1)
        unit_BTU = self.unit_KU[z_BN].repeat_interleave(FRAMES, 1)
        place_BTP = torch.eye(FRAMES, device=x_BDT.device).repeat(z_BN.shape[1], 1).expand(len(z_BN), -1, -1)
        in_BTC = torch.cat([x_BTD / self.size, voice_BTD / self.size, unit_BTU, place_BTP], -1)
        return x_BDT, self.network(in_BTC if known_BT is None else in_BTC * known_BT[..., None])

    def _slow(self, x_BDT: torch.Tensor, known_BT: torch.Tensor) -> torch.Tensor:
        """The mean over the known frames among `slow` around each."""
        known_B1T, size = known_BT[:, None].to(x_BDT), self.sizes.slow
        sums, counts = (F.avg_pool1d(x, size, 1, size // 2) for x in (x_BDT * known_B1T, known_B1T))
        return sums / counts.clamp_min(1e-6)
