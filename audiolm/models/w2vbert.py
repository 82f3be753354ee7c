"""w2v-BERT (2108.06209): a contrastive module and a masked-prediction module on its codes, one encoder (PAPER 2.2).

Targets come from the unmasked, subsampled input through one codebook of V codes with a straight-through Gumbel softmax,
as in wav2vec 2.0 (2006.11477) with one group.  The first `contrastive_layers` blocks tell a masked frame's code vector
from those of other masked frames of its row; the blocks after them name the code itself.
Deviations: masked frames become the encoder's learned vector (wav2vec 2.0), not random normal vectors (w2v-BERT); no
linear layer follows the codebook, since with one group it would be folded into it (hence normal, not uniform, vectors).
Legend: B rows, T frames at 25 Hz, F mel bands, M masked frames of a row (padded), K negatives, V codes, C code width.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from audiolm import rng
from audiolm.models.conformer import Encoder, EncoderSizes


def draw_negatives(mask_BT: torch.Tensor, k: int, seed: int, step: int, rows: list[int]) -> torch.Tensor:
    """negatives_BMK (int64, CPU): each masked frame's k draws, with replacement, of its row's other masked frames.

    An entry counts the row's masked frames from 0; -1 where there is none (padding, or a row with one masked frame).
    """
    masked = mask_BT.sum(1).tolist()
    negatives_BMK = torch.full((len(rows), max(masked), k), -1)
    for found_MK, m, row in zip(negatives_BMK, masked, rows, strict=True):
        if m > 1:
            drawn = rng.generator(seed, "negatives", step, row).integers(m - 1, size=(m, k))
            found_MK[:m] = torch.from_numpy(drawn + (drawn >= np.arange(m)[:, None]))  # never itself, the rest alike
    return negatives_BMK


def draw_gumbel(mask_BT: torch.Tensor, codes: int, seed: int, step: int, rows: list[int],
                device: torch.device) -> torch.Tensor:
    """noise_BMV: standard Gumbel draws of each masked frame, drawn on `device` (a generator a row); mask_BT on the CPU."""
    masked = mask_BT.sum(1).tolist()
    noise_BMV = torch.zeros(len(rows), max(masked), codes, device=device)
    for noise_MV, m, row in zip(noise_BMV, masked, rows, strict=True):
        generator = torch.Generator(device).manual_seed(rng.derive(seed, "gumbel", step, row))
        noise_MV[:m] = -torch.empty(m, codes, device=device).exponential_(generator=generator).log()
    return noise_BMV


def diversity(share_V: torch.Tensor) -> torch.Tensor:
    """(V - exp(entropy)) / V of the mean probabilities: 0 where all codes are used alike.

    The form of wav2vec 2.0's code (fairseq, transformers); its paper writes -entropy / V, with the same minimum.
    """
    entropy = -(share_V * share_V.clamp_min(1e-30).log()).sum()
    return 1 - entropy.exp() / len(share_V)


class W2vBertModel(nn.Module):
    """`encoder` is what is exported: layer n of the masked-prediction module is the encoder's contrastive_layers + n."""

    def __init__(self, sizes: EncoderSizes, contrastive_layers: int, codes: int, code_dim: int):
        super().__init__()
        if not 1 <= contrastive_layers < sizes.layers:
            raise ValueError(f"w2vbert.contrastive_layers ({contrastive_layers}) must leave at least one of the model's "
                             f"{sizes.layers} layers to either module: give 1 to {sizes.layers - 1}")
        self.encoder, self.contrastive_layers = Encoder(sizes), contrastive_layers
        self.code_logits = nn.Linear(sizes.dim, codes)
        nn.init.normal_(self.code_logits.weight)  # decided from the start, as wav2vec 2.0
        nn.init.zeros_(self.code_logits.bias)
        self.code_vectors = nn.Parameter(torch.randn(codes, code_dim))
        self.context = nn.Linear(sizes.dim, code_dim)
        self.predict = nn.Linear(sizes.dim, codes)

    def quantize(self, x_BMD: torch.Tensor, noise_BMV: torch.Tensor | None = None,
                 tau: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(vectors_BMC, codes_BM, probabilities_BMV) in float32; the probabilities are those without noise at tau = 1.

        With noise the vector is that of the code drawn, and its gradient the one of the softmax at `tau`; without, the
        likeliest code's.
        """
        with torch.autocast(x_BMD.device.type, enabled=False):  # a rounded logit would draw another code
            logits_BMV = self.code_logits(x_BMD.float())
            noisy_BMV = logits_BMV if noise_BMV is None else logits_BMV + noise_BMV
            codes_BM = noisy_BMV.detach().argmax(-1)
            hard_BMV, soft_BMV = F.one_hot(codes_BM, logits_BMV.shape[-1]).float(), (noisy_BMV / tau).softmax(-1)
            vectors_BMC = (hard_BMV + soft_BMV - soft_BMV.detach()) @ self.code_vectors
            return vectors_BMC, codes_BM, logits_BMV.softmax(-1)

    def probabilities(self, mel_BTF: torch.Tensor, lengths_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """Sum over the masked frames of the codes' probabilities (V,), without what lies above the codes."""
        x_BTD = self.encoder.subsampled(mel_BTF, lengths_B)
        return (self.code_logits(x_BTD).softmax(-1) * mask_BT[..., None]).sum((0, 1))

    def forward(self, mel_BTF: torch.Tensor, lengths_B: torch.Tensor, mask_BT: torch.Tensor,
                negatives_BMK: torch.Tensor, temperature: float, noise_BMV: torch.Tensor | None = None,
                tau: float = 1.0, clean_BTF: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Sums over the masked frames, in float32.

        lengths_B counts frames at 25 Hz; `temperature` divides the cosines; noise_BMV (draw_gumbel) and `tau` are of
        training; clean_BTF is what the targets are made of where the model hears something else.
        "contrastive", "masked": losses in nats; "probabilities_V": see `quantize`, with a gradient (for `diversity`);
        without one: "contrastive_right" (a frame without a valid negative is never right), "masked_right", "frames",
        "codes_V" and "predicted_V" (counts of targets and of predictions).
        """
        x_BTD = self.encoder.subsampled(mel_BTF, lengths_B)
        target_BTD = x_BTD if clean_BTF is None else self.encoder.subsampled(clean_BTF, lengths_B)
        context_BTD, top_BTD = self.encoder.blocks_of(x_BTD, lengths_B, mask_BT,
                                                      [self.contrastive_layers, len(self.encoder.blocks)])
        # A stable sort puts a row's masked frames first, in time; M is known to the CPU, so that a GPU need not be asked.
        at_BM = mask_BT.byte().argsort(dim=1, descending=True, stable=True)[:, :negatives_BMK.shape[1]]
        valid_BM = mask_BT.gather(1, at_BM)
        target_BMD, context_BMD, top_BMD = (_taken(y_BTD, at_BM) for y_BTD in (target_BTD, context_BTD, top_BTD))
        vectors_BMC, codes_BM, probabilities_BMV = self.quantize(target_BMD, noise_BMV, tau)
        logits_BMN = contrastive_logits(self.context(context_BMD), vectors_BMC, codes_BM, negatives_BMK, temperature)
        predicted_BMV = self.predict(top_BMD).float()
        contrastive_BM = logits_BMN.logsumexp(-1) - logits_BMN[..., 0]
        masked_BM = F.cross_entropy(predicted_BMV.transpose(1, 2), codes_BM, reduction="none")
        with torch.no_grad():
            best_BM, named_BM = logits_BMN[..., 1:].amax(-1), predicted_BMV.argmax(-1)
            found_BM = (logits_BMN[..., 0] > best_BM) & best_BM.isfinite()
            counts = {"contrastive_right": (found_BM & valid_BM).sum().float(),
                      "masked_right": ((named_BM == codes_BM) & valid_BM).sum().float(), "frames": valid_BM.sum().float(),
                      "codes_V": _counts(codes_BM, valid_BM, predicted_BMV.shape[-1]),
                      "predicted_V": _counts(named_BM, valid_BM, predicted_BMV.shape[-1])}
        return {"contrastive": (contrastive_BM * valid_BM).sum(), "masked": (masked_BM * valid_BM).sum(),
                "probabilities_V": (probabilities_BMV * valid_BM[..., None]).sum((0, 1)), **counts}


def contrastive_logits(context_BMC: torch.Tensor, vectors_BMC: torch.Tensor, codes_BM: torch.Tensor,
                       negatives_BMK: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cosines over `temperature`, logits_BM(1+K) in float32: the frame's own vector first, then its negatives.

    A negative of the same code is no negative: -inf, as in wav2vec 2.0's code (there found by comparing the vectors,
    which rounding of the straight-through sum can make differ).
    """
    with torch.autocast(context_BMC.device.type, enabled=False):
        cosines_BMM = F.normalize(context_BMC.float(), dim=-1) @ F.normalize(vectors_BMC, dim=-1).transpose(1, 2)
    b, m, k = negatives_BMK.shape
    at_BMK = negatives_BMK.clamp_min(0)
    same_BMK = codes_BM.gather(1, at_BMK.view(b, m * k)).view(b, m, k) == codes_BM[..., None]
    others_BMK = cosines_BMM.gather(2, at_BMK).masked_fill(same_BMK | (negatives_BMK < 0), -torch.inf)
    return torch.cat([cosines_BMM.diagonal(dim1=1, dim2=2)[..., None], others_BMK], dim=-1) / temperature


def _taken(x_BTD: torch.Tensor, at_BM: torch.Tensor) -> torch.Tensor:
    return x_BTD.gather(1, at_BM[..., None].expand(-1, -1, x_BTD.shape[-1]))


def _counts(codes_BM: torch.Tensor, valid_BM: torch.Tensor, codes: int) -> torch.Tensor:
    counts_V = torch.zeros(codes, device=codes_BM.device)
    return counts_V.index_add_(0, codes_BM.flatten(), valid_BM.flatten().float())
