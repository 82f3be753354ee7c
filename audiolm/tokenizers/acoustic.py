"""The trained codec as a tokenizer (base.Codec): audio to codes and back, loadable without the training code.

Shapes: wav_BT float32 at 16 kHz, lengths_B true samples, codes_TQ int64 of one clip on the CPU, codes_BTQ of a batch.
A clip is padded with zeros to whole semantic frames; the model is causal, so nothing behind a clip's end reaches its
codes.  Long audio goes by chunks with the model's history in front, which gives what the whole gives in bounded memory.
"""

from __future__ import annotations

import math

import torch

from audiolm.models.soundstream import SoundStream
from audiolm.tokenizers.base import ACOUSTIC_HOP, SAMPLE_RATE, TokenSpec, padded_samples
from audiolm.tokenizers.semantic import ArtefactError, read_export

CHUNK_FRAMES = 3000  # 60 s


class AcousticTokenizer:
    def __init__(self, model: SoundStream, digest: str, device: str = "cpu", chunk_frames: int = CHUNK_FRAMES):
        self.model, self.hash, self.device, self.chunk = model.to(device).eval(), digest, device, chunk_frames
        vq = model.quantizer
        self.spec = TokenSpec("soundstream", SAMPLE_RATE, model.hop, vq.n_q, vq.vocab)

    @torch.inference_mode()
    def encode(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor) -> list[torch.Tensor]:
        """codes_TQ (int64, on the CPU) of each clip, T = padded_samples(length) / 320.

        Raises ValueError for wav_BT of another shape, lengths beyond it and samples that are no numbers.
        """
        lengths = [int(n) for n in lengths_B]
        if wav_BT.ndim != 2 or len(lengths) != len(wav_BT) or not all(0 <= n <= wav_BT.shape[1] for n in lengths):
            raise ValueError(f"encode takes mono wav_BT and lengths_B of at most T samples, got shape "
                             f"{tuple(wav_BT.shape)} and lengths {lengths[:8]}: mix channels down, give true lengths")
        samples = padded_samples(max(lengths))
        padded_BT = torch.zeros(len(lengths), samples, device=self.device)
        for row, wav, n in zip(padded_BT, wav_BT, lengths, strict=True):  # what lies behind a clip's end does not count
            row[:n] = wav[:n].float()
            if not row.isfinite().all():
                raise ValueError("the audio holds samples that are NaN or infinite: decode or clean it again")
        hop, pieces = self.model.hop, []
        for start, end, before in _chunks(samples // hop, self.chunk, self.model.encoder_context):
            codes_BTQ = self.model.encode(padded_BT[:, (start - before) * hop:end * hop])
            pieces.append(codes_BTQ[:, before:].cpu())
        codes_BTQ = torch.cat(pieces, 1)
        return [row[:padded_samples(n) // hop].clone() for row, n in zip(codes_BTQ, lengths, strict=True)]

    @torch.inference_mode()
    def decode(self, codes_BTQ: torch.Tensor) -> torch.Tensor:
        """wav_BT float32 on the CPU, T = frames x 320, of any prefix of the levels.

        Raises ValueError for codes of another shape or outside 0 .. vocab - 1.
        """
        if codes_BTQ.ndim != 3 or not 1 <= codes_BTQ.shape[2] <= self.spec.n_q:
            raise ValueError(f"decode takes codes_BTQ with 1 to {self.spec.n_q} levels, got shape "
                             f"{tuple(codes_BTQ.shape)}")
        if not codes_BTQ.numel():
            return torch.zeros(len(codes_BTQ), codes_BTQ.shape[1] * self.model.hop)
        low, high = int(codes_BTQ.min()), int(codes_BTQ.max())
        if low < 0 or high >= self.spec.vocab:
            raise ValueError(f"codes run from {low} to {high}; this codec has codes 0 to {self.spec.vocab - 1} "
                             "(special ids must be taken off first)")
        codes_BTQ, pieces = codes_BTQ.to(self.device), []
        for start, end, before in _chunks(codes_BTQ.shape[1], self.chunk, self.model.decoder_context):
            wav_BT = self.model.decode(codes_BTQ[:, start - before:end])
            pieces.append(wav_BT[:, before * self.model.hop:].cpu())
        return torch.cat(pieces, 1)


def _chunks(frames: int, size: int, context: int) -> list[tuple[int, int, int]]:
    """(start, end, frames of history in front of start) of each chunk."""
    return [(start, min(start + size, frames), min(start, context)) for start in range(0, frames, size)]


def load_codec(path: str, device: str = "cpu") -> AcousticTokenizer:
    """The tokenizer of a finished codec build. Raises ArtefactError where config and weights do not fit."""
    weights, config, digest = read_export(path)
    sizes = ("strides", "enc_channels", "dec_channels", "dim", "n_q", "vocab")
    if config.get("kind") != "soundstream" or any(key not in config for key in sizes):
        raise ArtefactError(f"{path}/export/config.json is no codec's (kind {config.get('kind')!r}): give the path of "
                            "a codec build")
    if config["sample_rate"] != SAMPLE_RATE or math.prod(config["strides"]) != ACOUSTIC_HOP:
        raise ArtefactError(f"{path}/export/config.json: {config['sample_rate']} Hz and strides {config['strides']}; "
                            f"this pipeline takes {SAMPLE_RATE} Hz and a hop of {ACOUSTIC_HOP}")
    model = SoundStream(tuple(config["strides"]), *(config[key] for key in sizes[1:]), norm=False)
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise ArtefactError(f"{path}/export: the weights do not fit the codec that config.json describes: {e}") from e
    return AcousticTokenizer(model, digest, device)
