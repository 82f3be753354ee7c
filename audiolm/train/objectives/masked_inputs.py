"""Inputs and exports of masked models, whatever their objective: crops, masked spans, augmentation, validation pieces.

Input statistics come from a bounded sample of training clips, the same on every rank.  They are float32 buffers of the
encoder, so that checkpoints and exports carry them.
Draws depend on (seed, purpose, step, row): a row's mask and augmentation are the same whichever rank loads it.
Legend: B rows, T frames at 25 Hz, F mel bands at 100 Hz.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from audiolm import rng
from audiolm.config.semantic import MaskedModelConfig
from audiolm.data.clip_table import ClipTable, read_clip_table
from audiolm.data.clips import read_clip
from audiolm.data.crops import AudioCrops
from audiolm.data.sources import roots
from audiolm.models.augment import Augmentation, augment, draw_augmentation
from audiolm.models.conformer import LAYER_CONVENTION, SPECTRA, Encoder, EncoderSizes
from audiolm.models.semitones import KEYS
from audiolm.models.transfer import pin, send
from audiolm.tokenizers.artifact import MASKED_FORMAT
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP, padded_samples
from audiolm.tokenizers.extractor import FAMILY, extractor_mel, frames_of
from audiolm.train.objectives.base import Context, whole_frames

FIT_S = 3600.0  # audio that input statistics and MFCC targets are measured on
EVAL_S = 900.0  # dev audio of one validation: 58 MB, kept in memory
MIN_VARIANCE = 1e-4  # variance of a mel band, at least: a band that is silent everywhere is not blown up
Sample = Iterable[tuple[torch.Tensor, torch.Tensor]]  # (mel_1TF, frames_1)


@dataclass(frozen=True)
class MaskedBatch:
    """Rows of audio with the frames to predict, on the CPU, which so knows all that follows from lengths and masks."""

    wav_BT: torch.Tensor  # whole frames, zeros past a row's length
    lengths_B: torch.Tensor  # samples
    frames_B: torch.Tensor
    mask_BT: torch.Tensor  # frames to predict
    step: int  # -1 in validation
    rows: list[int]  # of the step's global batch; in validation the piece's number
    draws: list[Augmentation] | None = None

    @property
    def audio_s(self) -> float:
        return float(self.lengths_B.sum()) / SAMPLE_RATE

    @property
    def full(self) -> bool:
        """True where no row has padding."""
        return bool((self.frames_B == self.mask_BT.shape[1]).all())

    def pinned(self, device: torch.device) -> MaskedBatch:
        """The batch on its way to a GPU, see `transfer.pin`; called in the loader's thread, as page-locking copies."""
        return replace(self, wav_BT=pin(self.wav_BT, device), mask_BT=pin(self.mask_BT, device))


def span_mask(frames: int, span: int, share: float, generator: np.random.Generator) -> np.ndarray:
    """mask_T with exactly round(share x frames) frames set (at least 1), in spans of `span` that may touch.

    An exact share, where HuBERT's spans overlap at random: no row of a batch is without masked frames.
    """
    want = min(frames, max(1, round(share * frames)))
    mask_T = np.zeros(frames, bool)
    for start in generator.permutation(max(1, frames - span + 1)):
        left = want - int(mask_T.sum())
        if left <= 0:
            break
        unmasked = np.flatnonzero(~mask_T[start:start + span])[:left]
        mask_T[start + unmasked] = True
    return mask_T


class MaskedInputs:
    """Batches from `crops`, and validation pieces: `held` are this rank's, by number."""

    def __init__(self, sizes: MaskedModelConfig, crops: AudioCrops, held: dict[int, torch.Tensor], seed: int):
        self.sizes, self.crops, self.held, self.seed = sizes, crops, held, seed

    def batch(self, step: int, rows: Sequence[int]) -> MaskedBatch:
        """Rows of step's global batch, on the CPU."""
        a = self.sizes.augment
        wav_BT, lengths_B = self.crops.batch(step, rows)
        # Two generators a row, one a purpose: turning augmentation on or off moves no mask.
        draws = [draw_augmentation((a.pitch, a.noise, a.reverb), a.pitch_cents, a.snr_db, a.reverb_s,
                                   rng.generator(self.seed, "augment", step, row)) for row in rows]
        return self._masked(wav_BT, lengths_B, [rng.generator(self.seed, "mask", step, row) for row in rows], step,
                            list(rows), draws if a.pitch or a.noise or a.reverb else None)

    def pieces(self) -> Iterator[MaskedBatch]:
        """Validation pieces: one row each, whole crops of dev clips, masked alike at every call, not augmented."""
        for i, piece in self.held.items():
            yield self._masked(piece[None], torch.tensor([len(piece)]), [rng.generator(self.seed, "mask-eval", i)], -1, [i],
                               None)

    def _masked(self, wav_BT, lengths_B, generators: list, step: int, rows: list[int], draws) -> MaskedBatch:
        # Crops have one width, whatever their rows' lengths: on a GPU each other one would be compiled anew.
        frames, width = frames_of(lengths_B), padded_samples(wav_BT.shape[1])
        mask_BT = torch.zeros(len(frames), width // SEMANTIC_HOP, dtype=torch.bool)
        span = whole_frames(self.sizes.mask_span_s)
        for row, n, generator in zip(mask_BT, frames, generators, strict=True):
            row[:n] = torch.from_numpy(span_mask(n, span, self.sizes.mask_share, generator))
        wav_BT = F.pad(wav_BT, (0, width - wav_BT.shape[1]))
        return MaskedBatch(wav_BT, lengths_B, torch.tensor(frames), mask_BT, step, rows, draws)

    def mels(self, batch: MaskedBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(clean mel_BTF, the model's input mel_BTF, frames_B) on the device; one tensor for both without augmentation."""
        wav_BT, frames_B = send(batch.wav_BT, device), send(batch.frames_B, device)
        spectrum = SPECTRA[self.sizes.spectrum]
        clean_BTF = spectrum(wav_BT)
        if batch.draws is None:
            return clean_BTF, clean_BTF, frames_B
        return clean_BTF, augment(wav_BT, batch.lengths_B, batch.draws, spectrum=spectrum), frames_B


def masked_inputs(config: Mapping[str, Any], inputs: Mapping[str, str], ctx: Context) -> tuple[MaskedInputs, Sample]:
    """The inputs of a step (config: model, where, corpus, seed, and train, its training run) and a sample to measure.

    Raises ValueError for a split without clips.
    """
    sizes, where, folders = config["model"], config["where"], roots(config["corpus"])
    train, dev = (read_clip_table(inputs["manifest"], split, where) for split in ("train", "dev"))
    for split, clips in (("train", train), ("dev", dev)):
        if not len(clips):
            raise ValueError(f"the masked model needs {split} clips and the manifest has none for semantic.where = "
                             f"{where.source}: widen semantic.where" + (" or raise corpus.dev" if split == "dev" else ""))
    crop = whole_frames(sizes.crop_s) * SEMANTIC_HOP
    own = list(enumerate(eval_pieces(dev, crop)))[ctx.rank::ctx.world]
    held = {j: torch.from_numpy(read_clip(dev[i], folders, at, n)) for j, (i, at, n) in own}
    crops = AudioCrops(train, folders, crop, config["train"].batch, config["seed"], ctx.cache_mb)
    return MaskedInputs(sizes, crops, held, config["seed"]), fit_sample(train, folders, crop, config["seed"], sizes.spectrum)


def eval_pieces(clips: ClipTable, crop: int) -> list[tuple[int, int, int]]:
    """(clip, start, samples) of whole crops that cover the dev clips, evenly thinned to EVAL_S."""
    every = [(i, at, min(crop, n - at)) for i, n in enumerate(clips.samples.tolist()) for at in range(0, n, crop)
             if at == 0 or n - at >= crop // 2]  # a clip's rest counts from half a crop on
    keep = min(len(every), max(1, int(EVAL_S * SAMPLE_RATE / crop)))
    return [every[j * len(every) // keep] for j in range(keep)]


def fit_sample(clips: ClipTable, folders: dict[str, str], crop: int, seed: int, spectrum: str = "mel") -> Sample:
    """The input's spectrum of random crops of at most FIT_S together, in a fixed order, read as they are asked for."""
    chosen, seconds = [], 0.0
    for i in map(int, rng.generator(seed, "fit-clips").permutation(len(clips))):
        if seconds >= FIT_S:
            break
        chosen.append(i)
        seconds += min(int(clips.samples[i]), crop) / SAMPLE_RATE
    for i in sorted(chosen):
        samples = int(clips.samples[i])
        start = int(rng.generator(seed, "fit-crop", i).integers(max(0, samples - crop) + 1))
        wav = torch.from_numpy(read_clip(clips[i], folders, start, min(crop, samples - start)))
        yield extractor_mel(wav[None], torch.tensor([len(wav)]), spectrum)


@torch.no_grad()
def measure_inputs(encoder: Encoder, sample: Sample) -> None:
    """Sets an encoder's input statistics: mean and standard deviation of each mel band over the sample's frames."""
    total, squares, count = 0.0, 0.0, 0
    for mel_BTF, _ in sample:
        x_NF = mel_BTF.flatten(0, 1).double()
        total, squares, count = total + x_NF.sum(0), squares + x_NF.square().sum(0), count + len(x_NF)
    mean_F = total / count
    encoder.statistics.mean.copy_(mean_F)
    encoder.statistics.std.copy_((squares / count - mean_F.square()).clamp_min(MIN_VARIANCE).sqrt())


def encoder_sizes(sizes: MaskedModelConfig) -> EncoderSizes:
    bands = {"n_mels": KEYS, "spectrum": "semitones"} if sizes.spectrum == "semitones" else {}
    return EncoderSizes(sizes.dim, sizes.layers, sizes.heads, sizes.ff, sizes.conv_kernel, sizes.dropout,
                        normalise=sizes.normalise, **bands)


def export_encoder(encoder: Encoder, objective: str, more: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and config for `tokenizers.semantic.load_extractor`."""
    return ({f"encoder.{name}": value for name, value in encoder.state_dict().items()},
            {"format": MASKED_FORMAT, "family": FAMILY, "layer_convention": LAYER_CONVENTION, "objective": objective,
             "encoder": encoder.sizes.to_json(), "sample_rate": SAMPLE_RATE, **more})
