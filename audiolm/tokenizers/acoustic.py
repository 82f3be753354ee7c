"""The trained codec as a tokenizer (base.Codec), loadable without the training code.

Shapes: wav_BT float32 at 16 kHz, lengths_B true samples, codes_TQ int64 of one clip on the CPU,
codes_BTQ of a batch. A clip is padded with zeros to whole semantic frames; the model is causal, so
its codes do not depend on what follows. Long audio goes by chunks with the model's history in
front: bounded memory, and the codes of the whole clip. `encode_stream` and `decode_stream` take
blocks of any length and cut the same chunks.
Source: SoundStream 2107.03312.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from audiolm.models.precision import no_tf32
from audiolm.models.soundstream import SoundStream, SoundStreamSizes
from audiolm.models.spectral.codec import SpectralCodec, SpectralSizes
from audiolm.models.transfer import send
from audiolm.tokenizers import hf_codec
from audiolm.tokenizers.artifact import ArtifactError, fill_module, read_export, require_keys
from audiolm.tokenizers.base import (
    ACOUSTIC_HOP,
    SAMPLE_RATE,
    TokenSpec,
    check_codes,
    check_finite,
    clip_lengths,
    code_vectors,
    padded_samples,
)

CHUNK_FRAMES = 3000  # 60 s: history costs little beside it, and activations stay below a few GB


class AcousticTokenizer:
    def __init__(self, model: SoundStream | SpectralCodec, digest: str, device: str = "cpu", chunk_frames: int = CHUNK_FRAMES):
        self.model, self.hash, self.device, self.chunk = model.to(device).eval(), digest, torch.device(device), chunk_frames
        vq = model.quantizer
        self.spec = TokenSpec(model.kind, SAMPLE_RATE, model.hop, vq.n_q, vq.vocab)

    @torch.inference_mode()
    def encode(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor) -> list[torch.Tensor]:
        """codes_TQ (int64, on the CPU) of each clip, T = padded_samples(length) / 320.

        Raises ValueError for wav_BT of another shape, lengths beyond it and samples that are no
        numbers.
        """
        lengths = clip_lengths(wav_BT, lengths_B)
        # Copy the true samples alone: callers may leave anything behind a clip's end.
        padded_BT = torch.zeros(len(lengths), padded_samples(max(lengths)), device=wav_BT.device)
        for row, wav, n in zip(padded_BT, wav_BT, lengths, strict=True):
            row[:n] = wav[:n].float()
        check_finite(padded_BT)
        codes_BTQ = torch.cat(list(self._codes([padded_BT])), 1)
        # Clone: a view would keep the codes of the whole batch alive.
        return [row[:padded_samples(n) // self.model.hop].clone() for row, n in zip(codes_BTQ, lengths, strict=True)]

    @torch.inference_mode()
    def decode(self, codes_BTQ: torch.Tensor) -> torch.Tensor:
        """wav_BT float32 on the CPU, T = frames x 320, of any prefix of the levels.

        Raises ValueError for codes of another shape or outside 0 .. vocab - 1.
        """
        self._check(codes_BTQ)
        return torch.cat([torch.zeros(len(codes_BTQ), 0), *self._waves([codes_BTQ])], 1)

    # Streams give the same chunks as above, so a long file needs the memory of one chunk.
    @torch.inference_mode()
    def encode_stream(self, blocks: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
        """Yields codes_TQ by chunks; joined, they equal `encode` of the joined blocks.

        Blocks are wav_T float32 of any lengths.

        Raises ValueError for blocks of another shape and samples that are no numbers, with their
        time in seconds.
        """
        for codes_BTQ in self._codes(_whole_frames(blocks)):
            yield codes_BTQ[0]

    @torch.inference_mode()
    def decode_stream(self, codes: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yields wav_T by chunks; joined, they equal `decode` of the joined codes_TQ.

        Raises ValueError as `decode` does.
        """
        for wav_BT in self._waves(self._check(codes_TQ[None]) for codes_TQ in codes):
            yield wav_BT[0]

    def _codes(self, parts_BT: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        model, hop = self.model, self.model.hop
        for wav_BT, before, own in chunks(parts_BT, self.chunk * hop, model.encoder_context * hop,
                                          model.encoder_lookahead * hop):
            # Drop the frames of the history, which the chunk before gave, and of the lookahead. At
            # both ends the model pads with zeros itself.
            with no_tf32():  # not around `yield`, as the caller's own work goes on there
                codes_BTQ = model.encode(send(wav_BT, self.device))
            yield codes_BTQ[:, before // hop:][:, :own // hop].cpu()

    def _waves(self, parts_BTQ: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        model, hop, known_BT = self.model, self.model.hop, None
        for codes_BTQ, before, own in chunks(parts_BTQ, self.chunk, model.decoder_context, model.decoder_lookahead):
            codes_BTQ = codes_BTQ.to(self.device)
            # Phases that are found and not decoded go on from the sound before the chunk.
            wav_BT = model.decode(codes_BTQ) if known_BT is None else model.decode_after(codes_BTQ, known_BT)
            wav_BT = wav_BT[:, :(before + own) * hop]
            yield wav_BT[:, before * hop:].cpu()
            known_BT = wav_BT[:, -model.decoder_context * hop:]

    @torch.inference_mode()
    def code_vectors(self) -> torch.Tensor:
        """codes_QVE float32: what each code adds to the latent."""
        return code_vectors(lambda codes_BTQ: self.model.quantizer.decode(codes_BTQ.to(self.device)), self.spec)

    def _check(self, codes_BTQ: torch.Tensor) -> torch.Tensor:
        check_codes(codes_BTQ, self.spec)
        return codes_BTQ


def chunks(parts: Iterable[torch.Tensor], size: int, history: int,
           lookahead: int = 0) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Cuts joined tensors (time is dimension 1) into chunks of `size`, wherever the parts end:
    (chunk, before, own).

    A chunk is `before` steps of history (`history`, fewer at the start), its own steps, and
    `lookahead` steps (fewer at the end). Holds one chunk and one part.
    """
    held, have, before = [], 0, 0
    for part in itertools.chain(parts, (None,)):  # None: the end, where a shorter chunk is due
        if part is not None:
            held.append(part)
            have += part.shape[1]
        # A chunk is complete with its history, its own steps and its lookahead; at the end one own
        # step is enough.
        enough = before + (1 if part is None else size + lookahead)
        if have < enough:
            continue
        joined = held[0] if len(held) == 1 else torch.cat(held, 1)
        while (have := joined.shape[1]) >= enough:
            own = min(size, have - before)
            yield joined[:, :before + own + lookahead], before, own
            # Keep the last `history` steps before the next chunk's own.
            done, before = before + own, min(before + own, history)
            joined = joined[:, done - before:]
            enough = before + (1 if part is None else size + lookahead)
        held = [joined]


def _whole_frames(blocks: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
    """The blocks as wav_BT of one row, then zeros up to whole semantic frames.
    """
    n = 0
    for wav_T in blocks:
        if wav_T.ndim != 1:
            raise ValueError(f"encode_stream takes mono blocks wav_T, got shape {wav_T.shape}: mix channels down")
        if not np.isfinite(wav_T).all():
            at_s = (n + int(np.argmin(np.isfinite(wav_T)))) / SAMPLE_RATE
            raise ValueError(f"the sample at {at_s:.3f} s is NaN or infinite: decode or clean the audio again")
        n += len(wav_T)
        yield torch.from_numpy(wav_T)[None]
    yield torch.zeros(1, padded_samples(n) - n)


def load_codec(path: str, device: str = "cpu") -> AcousticTokenizer | hf_codec.PretrainedCodec:
    """The tokenizer of a finished codec build, trained here or imported.

    Raises ArtifactError where config and weights do not fit, and for another rate or hop than the
    pipeline's.
    """
    weights, config, digest = read_export(path)
    if config.get("kind") in hf_codec.CLASSES:
        codec = hf_codec.from_export(path, weights, config, digest, device)
        _check_rate(path, {"sample_rate": codec.spec.sample_rate}, codec.spec.hop)
        return codec
    model = _spectral(path, config) if config.get("kind") == SpectralCodec.kind else _soundstream(path, config)
    fill_module(path, model, weights, "codec")
    return AcousticTokenizer(model, digest, device)


def _soundstream(path: str, config: dict) -> SoundStream:
    sizes = ("strides", "enc_channels", "dec_channels", "dim", "n_q", "vocab", "quantizer", "code_dim")
    require_keys(path, config, SoundStream.kind, sizes, "codec")
    _check_rate(path, config, math.prod(config["strides"]))
    # An export has its weight norm folded in.
    return SoundStream(SoundStreamSizes(**{key: config[key] for key in sizes}), norm=False)


def _spectral(path: str, config: dict) -> SpectralCodec:
    sizes = SpectralSizes.EXPORTED
    require_keys(path, config, SpectralCodec.kind, sizes, "codec")
    model = SpectralCodec(SpectralSizes(**{key: config[key] for key in sizes}))
    _check_rate(path, config, model.hop)
    return model


def _check_rate(path: str, config: dict, hop: int) -> None:
    if (config["sample_rate"], hop) != (SAMPLE_RATE, ACOUSTIC_HOP):
        raise ArtifactError(f"{path}/export/config.json: {config['sample_rate']} Hz and a hop of {hop}; this pipeline takes "
                            f"{SAMPLE_RATE} Hz and a hop of {ACOUSTIC_HOP}")
