"""w2v-BERT (2108.06209): a contrastive module and a masked-prediction module on its codes, in one encoder.

Targets come from the unmasked, subsampled input through one codebook of V codes with a straight-through Gumbel softmax,
as in wav2vec 2.0 (2006.11477) with one group.  The first `contrastive_layers` blocks distinguish a masked frame's code
vector from those of other masked frames of its row; the blocks after them predict the code.
Deviations: masked frames become the encoder's learned vector (wav2vec 2.0), not random normal vectors (w2v-BERT).  No
linear layer follows the codebook, since with one group it folds into it (hence normal, not uniform, vectors).
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
    for row_MK, m, row in zip(negatives_BMK, masked, rows, strict=True):
        if m > 1:
            drawn = rng.generator(seed, "negatives", step, row).integers(m - 1, size=(m, k))
            # skips the frame itself; the others are equally likely
            row_MK[:m] = torch.from_numpy(drawn + (drawn >= np.arange(m)[:, None]))
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
    """Diversity loss (V - exp(entropy)) / V of the mean probabilities: 0 where all codes are used alike.

    The form of wav2vec 2.0's code (fairseq, transformers); its paper writes -entropy / V, with the same minimum.
    """
    # written out rather than models.entropy: its gradient must stay finite at a share of 0
    entropy = -(share_V * share_V.clamp_min(1e-30).log()).sum()
    return 1 - entropy.exp() / len(share_V)


class W2vBertModel(nn.Module):
    """Training model of w2v-BERT; only `encoder` is exported.

    Layer n of the masked-prediction module is the encoder's layer contrastive_layers + n.
    """

    def __init__(self, sizes: EncoderSizes, contrastive_layers: int, codes: int, code_dim: int):
        super().__init__()
        if not 1 <= contrastive_layers < sizes.layers:
            raise ValueError(f"w2vbert.contrastive_layers ({contrastive_layers}) must leave at least one of the model's "
                             f"{sizes.layers} layers to either module: give 1 to {sizes.layers - 1}")
        self.encoder, self.contrastive_layers = Encoder(sizes), contrastive_layers
        self.code_logits = nn.Linear(sizes.dim, codes)
        nn.init.normal_(self.code_logits.weight)  # std 1: confident choices from the start, as wav2vec 2.0
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
        with torch.autocast(x_BMD.device.type, enabled=False):  # a rounded logit could select another code
            logits_BMV = self.code_logits(x_BMD.float())
            noisy_BMV = logits_BMV if noise_BMV is None else logits_BMV + noise_BMV
            codes_BM = noisy_BMV.detach().argmax(-1)
            hard_BMV, soft_BMV = F.one_hot(codes_BM, logits_BMV.shape[-1]).float(), (noisy_BMV / tau).softmax(-1)
            vectors_BMC = (hard_BMV + soft_BMV - soft_BMV.detach()) @ self.code_vectors
            return vectors_BMC, codes_BM, logits_BMV.softmax(-1)

    def probabilities(self, mel_BTF: torch.Tensor, lengths_B: torch.Tensor | None, mask_BT: torch.Tensor) -> torch.Tensor:
        """(V,) sum over the masked frames of the codes' probabilities; runs the subsampling alone, not the blocks."""
        x_BTD = self.encoder.subsampled(mel_BTF, lengths_B)
        return (self.code_logits(x_BTD).softmax(-1) * mask_BT[..., None]).sum((0, 1))

    def forward(self, mel_BTF: torch.Tensor, lengths_B: torch.Tensor | None, mask_BT: torch.Tensor,
                negatives_BMK: torch.Tensor, temperature: float, noise_BMV: torch.Tensor | None = None,
                tau: float = 1.0, clean_BTF: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Sums over the masked frames, in float32.

        lengths_B counts frames at 25 Hz (None: every row is full); `temperature` divides the cosines; noise_BMV
        (draw_gumbel) and `tau` are for training; clean_BTF gives the targets where mel_BTF is augmented.
        "contrastive", "masked": losses in nats; "probabilities_V": see `quantize`, with a gradient (for `diversity`).
        Without a gradient: "contrastive_right" (never of a frame without a valid negative), "masked_right", "frames",
        "codes_V" and "predicted_V" (counts of targets and of predictions).
        """
        x_BTD = self.encoder.subsampled(mel_BTF, lengths_B)
        target_BTD = x_BTD if clean_BTF is None else self.encoder.subsampled(clean_BTF, lengths_B)
        context_BTD, top_BTD = self.encoder.blocks_of(x_BTD, lengths_B, mask_BT,
                                                      [self.contrastive_layers, len(self.encoder.blocks)])
        # A stable sort puts a row's masked frames first, in time.  M comes from the CPU, so that nothing waits for a GPU.
        at_BM = mask_BT.byte().argsort(dim=1, descending=True, stable=True)[:, :negatives_BMK.shape[1]]
        valid_BM = mask_BT.gather(1, at_BM)
        target_BMD, context_BMD, top_BMD = (_taken(y_BTD, at_BM) for y_BTD in (target_BTD, context_BTD, top_BTD))
        vectors_BMC, codes_BM, probabilities_BMV = self.quantize(target_BMD, noise_BMV, tau)
        # Losses of all places, padded ones too; `valid_BM` masks them in the sums.
        logits_BMN = contrastive_logits(self.context(context_BMD), vectors_BMC, codes_BM, negatives_BMK, temperature)
        predicted_BMV = self.predict(top_BMD).float()
        contrastive_BM = logits_BMN.logsumexp(-1) - logits_BMN[..., 0]
        masked_BM = F.cross_entropy(predicted_BMV.transpose(1, 2), codes_BM, reduction="none")
        with torch.no_grad():  # accuracies and code counts, for the log
            best_BM, guess_BM = logits_BMN[..., 1:].amax(-1), predicted_BMV.argmax(-1)
            right_BM = (logits_BMN[..., 0] > best_BM) & best_BM.isfinite()
            counts = {"contrastive_right": (right_BM & valid_BM).sum().float(),
                      "masked_right": ((guess_BM == codes_BM) & valid_BM).sum().float(), "frames": valid_BM.sum().float(),
                      "codes_V": _counts(codes_BM, valid_BM, predicted_BMV.shape[-1]),
                      "predicted_V": _counts(guess_BM, valid_BM, predicted_BMV.shape[-1])}
        return {"contrastive": (contrastive_BM * valid_BM).sum(), "masked": (masked_BM * valid_BM).sum(),
                "probabilities_V": (probabilities_BMV * valid_BM[..., None]).sum((0, 1)), **counts}


def contrastive_logits(context_BMC: torch.Tensor, vectors_BMC: torch.Tensor, codes_BM: torch.Tensor,
                       negatives_BMK: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cosines over `temperature`, logits_BM(1+K) in float32: the frame's own vector first, then its negatives.

    A negative of the same code gets -inf, as in wav2vec 2.0's code, which compares vectors instead; rounding of the
    straight-through sum can make equal codes' vectors differ.
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
