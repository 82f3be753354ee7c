"""What masked models train on, whatever the objective: crops, spans to guess, augmented input, fixed validation pieces.

Input statistics come from a bounded sample of training clips, the same on every rank, and live in the encoder's float32
buffers, so that checkpoints and exports carry them.  Masks and augmentations are drawn from (seed, purpose, step, row).
Legend: B rows, T frames at 25 Hz, F mel bands at 100 Hz.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audiolm import rng
from audiolm.config.semantic import MaskedModelConfig
from audiolm.data.clips import Clip, read_clip, read_clips
from audiolm.data.crops import AudioCrops
from audiolm.data.sources import roots
from audiolm.models.augment import Augmentation, augment, draw_augmentation
from audiolm.models.conformer import Encoder
from audiolm.models.mel import log_mel
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP, padded_samples
from audiolm.tokenizers.extractor import extractor_mel, mask_padding
from audiolm.train.objectives.base import Context

FIT_S = 3600.0  # audio that input statistics and MFCC targets are measured on
EVAL_S = 900.0  # dev audio of one evaluation, kept in memory


@dataclass(frozen=True)
class MaskedBatch:
    wav_BT: torch.Tensor
    lengths_B: torch.Tensor  # samples
    mask_BT: torch.Tensor  # frames the model must guess
    step: int  # -1 in validation
    rows: list[int]  # of the step's global batch; in validation the piece's number
    draws: list[Augmentation] | None = None

    @property
    def audio_s(self) -> float:
        return float(self.lengths_B.sum()) / SAMPLE_RATE


def span_mask(frames: int, span: int, share: float, generator: np.random.Generator) -> np.ndarray:
    """mask_T with exactly round(share x frames) frames set (at least 1), in spans of `span` that may touch."""
    want = min(frames, max(1, round(share * frames)))
    mask_T = np.zeros(frames, bool)
    for start in generator.permutation(max(1, frames - span + 1)):
        left = want - int(mask_T.sum())
        if left <= 0:
            break
        open_ = np.flatnonzero(~mask_T[start:start + span])[:left]
        mask_T[start + open_] = True
    return mask_T


def frames_of(samples: list[int]) -> list[int]:
    return [padded_samples(n) // SEMANTIC_HOP for n in samples]


class MaskedInputs:
    """`crops` gives batches; `held` are this rank's validation pieces by number."""

    def __init__(self, sizes: MaskedModelConfig, crops: AudioCrops, held: dict[int, torch.Tensor], seed: int):
        self.sizes, self.crops, self.held, self.seed = sizes, crops, held, seed

    def batch(self, step: int, rows: Sequence[int]) -> MaskedBatch:
        """Rows of step's global batch, on the CPU."""
        a = self.sizes.augment
        wav_BT, lengths_B = self.crops.batch(step, rows)
        draws = [draw_augmentation((a.pitch, a.noise, a.reverb), a.pitch_cents, a.snr_db, a.reverb_s,
                      rng.generator(self.seed, "augment", step, row)) for row in rows]
        return self._masked(wav_BT, lengths_B, [rng.generator(self.seed, "mask", step, row) for row in rows], step,
                            list(rows), draws if a.pitch or a.noise or a.reverb else None)

    def pieces(self) -> Iterator[MaskedBatch]:
        """Validation: one row each, whole crops of dev clips, masked alike at every call, not augmented."""
        for i, piece in self.held.items():
            yield self._masked(piece[None], torch.tensor([len(piece)]), [rng.generator(self.seed, "mask-eval", i)], -1, [i],
                               None)

    def _masked(self, wav_BT, lengths_B, generators: list, step: int, rows: list[int], draws) -> MaskedBatch:
        frames = frames_of(lengths_B.tolist())
        mask_BT = torch.zeros(len(frames), max(frames), dtype=torch.bool)
        span = max(1, round(self.sizes.mask_span_s * SAMPLE_RATE / SEMANTIC_HOP))
        for row, n, generator in zip(mask_BT, frames, generators, strict=True):
            row[:n] = torch.from_numpy(span_mask(n, span, self.sizes.mask_share, generator))
        return MaskedBatch(wav_BT, lengths_B, mask_BT, step, rows, draws)

    def mels(self, batch: MaskedBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(clean mel_BTF, the one that the model hears, frames_B) on the device; one tensor where nothing is done to it."""
        wav_BT, frames_B = mask_padding(batch.wav_BT.to(device), batch.lengths_B)
        clean_BTF = log_mel(wav_BT)
        if batch.draws is None:
            return clean_BTF, clean_BTF, frames_B
        return clean_BTF, augment(wav_BT, batch.lengths_B, batch.draws), frames_B


def masked_inputs(config: Mapping[str, Any], inputs: Mapping[str, str], ctx: Context) -> tuple[MaskedInputs, list[Clip]]:
    """The inputs of a step (config: model, where, corpus, seed, and train, its training run) and its train clips."""
    sizes, where, folders = config["model"], config["where"], roots(config["corpus"])
    train, dev = (read_clips(inputs["manifest"], split, where) for split in ("train", "dev"))
    for split, clips in (("train", train), ("dev", dev)):
        if not clips:
            raise ValueError(f"the masked model needs {split} clips and the manifest has none for semantic.where = "
                             f"{where.source}: widen semantic.where" + (" or raise corpus.dev" if split == "dev" else ""))
    crop = crop_samples(sizes)
    mine = list(enumerate(eval_pieces(dev, crop)))[ctx.rank::ctx.world]
    held = {j: torch.from_numpy(read_clip(dev[i], folders, at, n)) for j, (i, at, n) in mine}
    crops = AudioCrops(train, folders, crop, config["train"].batch, config["seed"], ctx.cache_mb)
    return MaskedInputs(sizes, crops, held, config["seed"]), train


def crop_samples(sizes: MaskedModelConfig) -> int:
    return max(1, round(sizes.crop_s * SAMPLE_RATE / SEMANTIC_HOP)) * SEMANTIC_HOP


def eval_pieces(clips: Sequence, crop: int) -> list[tuple[int, int, int]]:
    """(clip, start, samples) of whole crops that cover the dev clips, evenly thinned to EVAL_S."""
    every = [(i, at, min(crop, c.samples - at)) for i, c in enumerate(clips) for at in range(0, c.samples, crop)
             if at == 0 or c.samples - at >= crop // 2]
    keep = min(len(every), max(1, int(EVAL_S * SAMPLE_RATE / crop)))
    return [every[j * len(every) // keep] for j in range(keep)]


def fit_sample(clips: Sequence, folders: dict[str, str], crop: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(mel_1TF, frames_1) of random crops of at most FIT_S together, in a fixed order."""
    chosen, seconds = [], 0.0
    for i in rng.generator(seed, "fit-clips").permutation(len(clips)).tolist():
        if seconds >= FIT_S:
            break
        chosen.append(i)
        seconds += min(clips[i].samples, crop) / SAMPLE_RATE
    for i in sorted(chosen):
        start = int(rng.generator(seed, "fit-crop", i).integers(max(0, clips[i].samples - crop) + 1))
        wav = torch.from_numpy(read_clip(clips[i], folders, start, min(crop, clips[i].samples - start)))
        yield extractor_mel(wav[None], torch.tensor([len(wav)]))


class Statistics:
    """Mean and standard deviation by band of the mels that pass; `into` sets an encoder's."""

    def __init__(self):
        self.total, self.squares, self.count = 0.0, 0.0, 0

    def add(self, mel_BTF: torch.Tensor) -> None:
        x = mel_BTF.flatten(0, 1).double()
        self.total, self.squares, self.count = self.total + x.sum(0), self.squares + x.square().sum(0), self.count + len(x)

    def into(self, encoder: Encoder) -> None:
        mean = self.total / self.count
        encoder.statistics.mean.copy_(mean)
        encoder.statistics.std.copy_((self.squares / self.count - mean.square()).clamp_min(1e-4).sqrt())
