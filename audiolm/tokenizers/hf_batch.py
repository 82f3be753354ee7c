"""Rows of different lengths in one forward pass of an imported model, without padding's effects.

Four things in transformers' models look beyond a row's end. An attention mask covers two:
attention, and the encoder's convolutions. The group norm after the first convolution takes
statistics over all of time: here it runs over each row's own span. The audio's mean and variance:
here over the true samples. Batch norm ahead of the positional convolution (conv_pos_batch_norm)
lifts a mask's zeros, so such models take rows of one length at a time.
Legend: wav_BT float32 at 16 kHz, zeros past a row's length; frames at 25 Hz, frames_B on the CPU;
rows end on whole frames.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from audiolm.models.kaldi_fbank import scaled_log_mel
from audiolm.models.transfer import send
from audiolm.tokenizers.base import SEMANTIC_HOP

# Zeros at either end, half of a frame's receptive field beyond its hop: (400 - 320) / 2 samples, of
# a mel frame (400 - 160) / 2. With them n samples give exactly n / 320 frames; without, the last
# one would be lost.
EDGE, MEL_EDGE = 40, 120
EPS = 1e-7  # of Wav2Vec2FeatureExtractor


def group_rows(config, frames: list[int]) -> list[list[int]]:
    """The row numbers of each forward pass."""
    if not getattr(config, "conv_pos_batch_norm", False):
        return [list(range(len(frames)))]
    by_length: dict[int, list[int]] = {}
    for row, n in enumerate(frames):
        by_length.setdefault(n, []).append(row)
    return list(by_length.values())


def wave_inputs(wav_BT: torch.Tensor, lengths_B: torch.Tensor, frames_B: torch.Tensor,
                normalize: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """input_values and attention_mask of models that take audio; `normalize`: mean 0, variance 1.
    """
    if normalize:  # over the true samples; the padding is zero again afterwards
        inside_BT = _inside(lengths_B, wav_BT.shape[1])
        n_B1 = lengths_B.clamp_min(1)[:, None]
        wav_BT = (wav_BT - wav_BT.sum(1, keepdim=True) / n_B1) * inside_BT
        wav_BT = wav_BT / (wav_BT.square().sum(1, keepdim=True) / n_B1 + EPS).sqrt()
    wav_BT = F.pad(wav_BT, (EDGE, EDGE))
    return wav_BT, _mask(frames_B * SEMANTIC_HOP + 2 * EDGE, wav_BT)


def mel_inputs(wav_BT: torch.Tensor, frames_B: torch.Tensor, n_mels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """input_features (two mel frames side by side, 50 Hz) and attention_mask of w2v-BERT 2.0."""
    mel_BTF = scaled_log_mel(F.pad(wav_BT, (MEL_EDGE, MEL_EDGE)), send(4 * frames_B, wav_BT.device), n_mels)
    mel_BTF = mel_BTF.reshape(len(mel_BTF), -1, 2 * n_mels)
    return mel_BTF, _mask(2 * frames_B, mel_BTF)


@contextlib.contextmanager
def per_row_group_norm(model, frames: list[int]) -> Iterator[None]:
    """Makes the model's group norm, where it has one, run over each row's own span."""
    if getattr(model.config, "feat_extract_norm", None) != "group" or len(set(frames)) == 1:
        yield
        return
    norm = model.feature_extractor.conv_layers[0].layer_norm
    kernel, stride = model.config.conv_kernel[0], model.config.conv_stride[0]
    # The first convolution's output frames that stem from a row's own samples and its edges.
    spans = [(n * SEMANTIC_HOP + 2 * EDGE - kernel) // stride + 1 for n in frames]

    def forward(x_BCT: torch.Tensor) -> torch.Tensor:  # in place: this is the model's largest activation
        for row, span in enumerate(spans):
            x_BCT[row, :, :span] = F.group_norm(x_BCT[row:row + 1, :, :span], norm.num_groups, norm.weight, norm.bias,
                                                norm.eps)[0]
        return x_BCT

    norm.forward = forward  # not a hook, which would run after the norm over all of time
    try:
        yield
    finally:
        del norm.forward


def _inside(lengths_B: torch.Tensor, samples: int) -> torch.Tensor:
    return torch.arange(samples, device=lengths_B.device) < lengths_B[:, None]


def _mask(spans_B: torch.Tensor, rows_BT: torch.Tensor) -> torch.Tensor | None:
    """None where every row fills the batch: attention is faster without one."""
    width = rows_BT.shape[1]
    return None if int(spans_B.min()) == width else _inside(send(spans_B, rows_BT.device), width)
