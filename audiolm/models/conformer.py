"""The masked audio model: a Conformer encoder (2005.08100) on log-mels or semitones that predicts clusters of masked frames.

Legend: B rows, F log-mel bands (100 Hz), T frames at 25 Hz, D width, K target clusters.  mel_BTF holds 4 mel frames for
each frame; lengths_B counts frames.  Attention and convolutions mask what lies past a row's length, so a row gives the
same features alone and in a padded batch (to 1e-5).  Where all rows are full, callers give no lengths: without a mask a GPU has
a faster attention kernel.  Input statistics are global buffers, set once before training, and no normalisation looks across
time; with `normalise: clip` they are each row's own, over its valid frames, above a floor.  Objective: HuBERT (2106.07447).
Layers: "layer n" is the output of block n, counted from 1, after that block's closing LayerNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from audiolm.models.mel import floored, log_mel, standardised
from audiolm.models.positions import apply_rope, rope_table
from audiolm.models.semitones import semitones
from audiolm.models.stream import LayerNorm
from audiolm.models.transfer import send

SUBSAMPLE = 4  # 100 Hz -> 25 Hz
MIN_STD = 1e-2  # of a log-mel band within a clip: silence is not blown up
SPECTRA = {"mel": log_mel, "semitones": semitones}  # wav_BT -> mel_BTF at 100 Hz
LATER = {("normalise", "corpus"), ("spectrum", "mel")}
LAYER_CONVENTION = "block output after its closing LayerNorm, counted from 1"


@dataclass(frozen=True)
class EncoderSizes:
    """Architecture of an encoder."""

    dim: int
    layers: int
    heads: int
    ff: int
    conv_kernel: int = 5
    dropout: float = 0.0
    n_mels: int = 80
    normalise: str = "corpus"  # the input by the corpus' statistics per band, or by each clip's own
    spectrum: str = "mel"  # of the input, a key of SPECTRA, which has n_mels bands

    def to_json(self) -> dict:
        # Defaults that came later are left out, so that exports of before are the same bytes.
        return {name: value for name, value in asdict(self).items() if (name, value) not in LATER}


class Float32Buffers(nn.Module):
    """Measured, not learned numbers: float32 buffers that stay float32 when the module is cast."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():  # follow the cast to its device, but keep the unrounded values
            self._buffers[name] = value.to(self._buffers[name].device)
        return self


def valid_frames(lengths_B: torch.Tensor, frames: int) -> torch.Tensor:
    """valid_BT: True on a row's own frames."""
    return torch.arange(frames, device=lengths_B.device)[None] < lengths_B[:, None]


class FeedForward(nn.Module):
    """Pre-norm layer of width `ff` with SiLU."""

    def __init__(self, s: EncoderSizes):
        super().__init__()
        self.norm, self.drop = LayerNorm(s.dim), nn.Dropout(s.dropout)
        self.up, self.down = nn.Linear(s.dim, s.ff), nn.Linear(s.ff, s.dim)

    def forward(self, x_BTD):
        return self.drop(self.down(self.drop(F.silu(self.up(self.norm(x_BTD))))))


class Attention(nn.Module):
    """Pre-norm self-attention in both directions with rotary positions."""

    def __init__(self, s: EncoderSizes):
        super().__init__()
        self.heads = s.heads
        self.norm, self.drop = LayerNorm(s.dim), nn.Dropout(s.dropout)
        self.qkv, self.out = nn.Linear(s.dim, 3 * s.dim), nn.Linear(s.dim, s.dim)

    def forward(self, x_BTD, mask_B1TT, rope):
        b, t, d = x_BTD.shape
        q, k, v = self.qkv(self.norm(x_BTD)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = (apply_rope(x, *rope, fused=False) for x in (q, k))
        y_BHTE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TT)
        return self.drop(self.out(y_BHTE.transpose(1, 2).reshape(b, t, d)))


class Convolution(nn.Module):
    """Pointwise, GLU, depthwise, norm, pointwise; LayerNorm over channels replaces the paper's BatchNorm."""

    def __init__(self, s: EncoderSizes):
        super().__init__()
        self.norm, self.drop = LayerNorm(s.dim), nn.Dropout(s.dropout)
        self.up, self.down = nn.Linear(s.dim, 2 * s.dim), nn.Linear(s.dim, s.dim)
        self.depth = nn.Conv1d(s.dim, s.dim, s.conv_kernel, padding=s.conv_kernel // 2, groups=s.dim)
        self.inner = LayerNorm(s.dim)

    def forward(self, x_BTD, valid_BT):
        y_BTD = F.glu(self.up(self.norm(x_BTD)), dim=-1)
        if valid_BT is not None:  # zeros past a row's end, as the convolution pads its edges
            y_BTD = y_BTD * valid_BT[..., None]
        y_BTD = self.depth(y_BTD.transpose(1, 2)).transpose(1, 2)
        return self.drop(self.down(F.silu(self.inner(y_BTD))))


class Block(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, LayerNorm."""

    def __init__(self, s: EncoderSizes):
        super().__init__()
        self.first, self.attention, self.convolution, self.last = (
            FeedForward(s), Attention(s), Convolution(s), FeedForward(s))
        self.norm = LayerNorm(s.dim)

    def forward(self, x_BTD, valid_BT, rope, mask_B1TT=None):
        """`valid_BT` None: every row is full. `mask_B1TT`: the frames that each may attend to, in place of all valid ones."""
        if mask_B1TT is None and valid_BT is not None:
            mask_B1TT = valid_BT[:, None, None]
        # 0.5: the two feed-forward layers are halves of one (Macaron, 1906.02762)
        x_BTD = x_BTD + 0.5 * self.first(x_BTD)
        x_BTD = x_BTD + self.attention(x_BTD, mask_B1TT, rope)
        x_BTD = x_BTD + self.convolution(x_BTD, valid_BT)
        return self.norm(x_BTD + 0.5 * self.last(x_BTD))


class Subsample(nn.Module):
    """Two convolutions of stride 2 over time (kernel 4, one frame of padding a side: frame i is centred on its hop)."""

    def __init__(self, s: EncoderSizes):
        super().__init__()
        self.one, self.two = nn.Conv1d(s.n_mels, s.dim, 4, 2, 1), nn.Conv1d(s.dim, s.dim, 4, 2, 1)
        self.norm, self.out, self.drop = LayerNorm(s.dim), nn.Linear(s.dim, s.dim), nn.Dropout(s.dropout)

    def forward(self, mel_BTF, lengths_B):
        x_BFT = mel_BTF.transpose(1, 2)
        for conv, rate in ((self.one, 4), (self.two, 2)):  # `rate`: frames at the layer's input for each frame at 25 Hz
            if lengths_B is not None:
                x_BFT = x_BFT * valid_frames(lengths_B * rate, x_BFT.shape[-1])[:, None]
            x_BFT = F.silu(conv(x_BFT))
        return self.drop(self.out(self.norm(x_BFT.transpose(1, 2))))


class Encoder(nn.Module):
    """Encoder of log-mels: one vector per 40 ms. `statistics` holds the input's mean and std per band of the corpus."""

    def __init__(self, sizes: EncoderSizes):
        super().__init__()
        s = self.sizes = sizes
        if s.dim % s.heads or (s.dim // s.heads) % 2:
            raise ValueError(f"heads ({s.heads}) must divide dim ({s.dim}) into even parts for rotary positions")
        if s.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel ({s.conv_kernel}) must be odd, so that a frame stays in place")
        self.statistics = Float32Buffers({"mean": (s.n_mels,), "std": (s.n_mels,)})
        self.statistics.std.fill_(1.0)
        self.subsample = Subsample(s)
        self.mask_embedding = nn.Parameter(0.1 * torch.randn(s.dim))
        self.blocks, self._compiled = nn.ModuleList(Block(s) for _ in range(s.layers)), None

    def compile_training(self, backend: str = "inductor") -> None:
        """Compiles the blocks for training, whose rows have one length; evaluation, whose lengths vary, stays as it is."""
        torch._dynamo.config.recompile_limit = 64  # one graph for each number of rows that the loop tries
        self._compiled = torch.compile(self._features, backend=backend, dynamic=False)

    def forward(self, mel_BTF: torch.Tensor, lengths_B: torch.Tensor | None, mask_BT: torch.Tensor | None = None,
                layer: int | None = None) -> torch.Tensor:
        """features_BTD of block `layer` (None: the last); frames under mask_BT are replaced by the mask embedding.

        `lengths_B` None: every row is full.
        """
        return self.outputs(mel_BTF, lengths_B, mask_BT, [len(self.blocks) if layer is None else layer])[0]

    def subsampled(self, mel_BTF: torch.Tensor, lengths_B: torch.Tensor | None) -> torch.Tensor:
        """x_BTD at 25 Hz, the blocks' input before masking. Raises ValueError where the mels are no whole frames."""
        if mel_BTF.shape[1] % SUBSAMPLE:
            raise ValueError(f"the encoder takes a multiple of {SUBSAMPLE} mel frames, got {mel_BTF.shape[1]}; "
                             "pad the audio to whole frames (tokenizers.base.padded_samples)")
        lengths_B = _on(lengths_B, mel_BTF)
        if self.sizes.normalise == "clip":
            valid_BT = torch.ones(mel_BTF.shape[:2], dtype=torch.bool, device=mel_BTF.device)
            if lengths_B is not None:
                valid_BT = valid_frames(lengths_B * SUBSAMPLE, mel_BTF.shape[1])
            mel_BTF = standardised(floored(mel_BTF, valid_BT), valid_BT, MIN_STD)
        else:
            mel_BTF = (mel_BTF.float() - self.statistics.mean) / self.statistics.std
        return self.subsample(mel_BTF.to(self.mask_embedding.dtype), lengths_B)

    def outputs(self, mel_BTF: torch.Tensor, lengths_B: torch.Tensor | None, mask_BT: torch.Tensor | None,
                layers: Sequence[int]) -> list[torch.Tensor]:
        """features_BTD of each of `layers`, in one pass that ends with the highest."""
        if wrong := [n for n in layers if not 1 <= n <= len(self.blocks)]:
            raise ValueError(f"layer {wrong[0]} is not one of the {len(self.blocks)} blocks, counted from 1")
        lengths_B = _on(lengths_B, mel_BTF)
        return self.blocks_of(self.subsampled(mel_BTF, lengths_B), lengths_B, mask_BT, layers)

    def blocks_of(self, x_BTD: torch.Tensor, lengths_B: torch.Tensor | None, mask_BT: torch.Tensor | None,
                  layers: Sequence[int]) -> list[torch.Tensor]:
        """`outputs` of the result of `subsampled`."""
        features = self._compiled if self._compiled and self.training else self._features
        return features(x_BTD, lengths_B, mask_BT, layers)

    def _features(self, x_BTD, lengths_B, mask_BT, layers) -> list[torch.Tensor]:
        if mask_BT is not None:
            x_BTD = torch.where(mask_BT[..., None], self.mask_embedding.to(x_BTD.dtype), x_BTD)
        valid_BT = None if lengths_B is None else valid_frames(lengths_B, x_BTD.shape[1])
        frames = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        rope, features = rope_table(frames, self.sizes.dim // self.sizes.heads), {}
        for n, block in enumerate(self.blocks[:max(layers)], 1):  # blocks above the highest layer are not run
            x_BTD = block(x_BTD, valid_BT, rope)
            if n in layers:
                features[n] = x_BTD
        return [features[n] for n in layers]


def _on(lengths_B: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if lengths_B is None else send(lengths_B, like.device)


class MaskedModel(nn.Module):
    """Encoder with a classifier of target clusters.

    `targets.codebook` (K, target_dim) holds the clusters' centroids, of width 0 where targets come from elsewhere.
    """

    def __init__(self, sizes: EncoderSizes, targets_k: int, target_dim: int = 39):
        super().__init__()
        self.encoder = Encoder(sizes)
        self.head = nn.Linear(sizes.dim, targets_k)
        self.targets = Float32Buffers({"codebook": (targets_k, target_dim)})

    def forward(self, mel_BTF: torch.Tensor, lengths_B: torch.Tensor | None,
                mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        """logits_BTK for every frame; frames past a row's length are meaningless."""
        return self.head(self.encoder(mel_BTF, lengths_B, mask_BT))

    def features(self, mel_BTF: torch.Tensor, lengths_B: torch.Tensor, layer: int) -> torch.Tensor:
        """features_BTD: the output of block `layer`, from 1."""
        return self.encoder(mel_BTF, lengths_B, None, layer)
