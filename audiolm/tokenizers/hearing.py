"""The sound of codes and semantic ids together: the spectral codec with a decoder that hears (models/spectral/hearing.py)."""

from __future__ import annotations

import numpy as np
import torch

from audiolm.models.spectral.codec import SpectralCodec
from audiolm.models.spectral.hearing import HearingDecoder, HearingSizes
from audiolm.tokenizers.acoustic import AcousticTokenizer
from audiolm.tokenizers.artifact import ArtifactError, fill_module, read_export, require_keys

SIZES = ("latent", "k", "unit", "values", "width", "layers", "slow")


class HearingCodec:
    """Frozen. Shapes: codes_TQ at 50 Hz, z_N at 25 Hz, T = 2 N."""

    def __init__(self, codec: SpectralCodec, decoder: HearingDecoder, device: str = "cpu"):
        self.codec, self.decoder, self.device = codec, decoder.to(device).eval(), device

    @torch.inference_mode()
    def decode(self, codes_TQ: np.ndarray, z_N: np.ndarray, true: int = 0, voice_TQ: np.ndarray | None = None) -> torch.Tensor:
        """wav_T float32 on the CPU of T x 320 samples; a clip is held whole.

        The first `true` frames are a recording's, which the codec's own decoder may trust.  voice_TQ: codes in the voice that
        is wanted; None: codes_TQ.
        """
        x_BDT = self._latents(codes_TQ)
        voice_BD = (x_BDT if voice_TQ is None else self._latents(voice_TQ)).mean(2)
        frames_BTF = self.codec.expand(*self.decoder(x_BDT, voice_BD, torch.from_numpy(z_N)[None].to(self.device)))
        if true:
            frames_BTF[:, :true] = self.codec.expand(x_BDT)[:, :true]
        return self.codec.sound(frames_BTF)[0].float().cpu()

    def _latents(self, codes_TQ: np.ndarray) -> torch.Tensor:
        return self.codec.quantizer.decode(torch.from_numpy(np.ascontiguousarray(codes_TQ))[None].to(self.device))


def load_hearing(build: str, codec: AcousticTokenizer, device: str = "cpu") -> HearingCodec:
    """The decoder of a finished lm_decoder build, around the codec that it was trained with.

    Raises ArtifactError for another codec, and where config and weights do not fit.
    """
    weights, config, _ = read_export(build)
    require_keys(build, config, HearingDecoder.kind, (*SIZES, "codec"), "hearing decoder")
    if config["codec"] != codec.hash:
        raise ArtifactError(f"{build} was trained on the codes of {config['codec']}, these are of {codec.hash}: give the codec "
                            "it was trained with, or train it again")
    decoder = HearingDecoder(HearingSizes(**{key: config[key] for key in SIZES}))
    fill_module(build, decoder, weights, "hearing decoder")
    return HearingCodec(codec.model, decoder, device)
