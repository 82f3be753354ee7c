"""Speaker embeddings: an x-vector model of transformers by path, or Resemblyzer's network (GE2E, 1710.10467).

Resemblyzer's cosines are about 0.9 for one speaker, 0.5 for two; each model has a scale of its own.  Of its package only the
weights are used (`pip install --no-deps resemblyzer`), because its code needs a compiler and librosa.  Its inputs are mel
powers as librosa computes them (Slaney's scale and norm), in windows of 1.6 s; an embedding is the mean of their unit vectors.
Quiet sound is raised to -30 dBFS as there.  Silences stay, since its voice detector is a package of its own.
wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

import importlib.util
import posixpath
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from audiolm.eval.models import hf_scorers
from audiolm.models.mel import filterbank
from audiolm.tokenizers.base import SAMPLE_RATE

INSTALL = "pip install --no-deps resemblyzer"
N_FFT, HOP, MELS = 400, 160, 40
WINDOW, STEP = 160, 80  # frames of 10 ms
DIM, LAYERS = 256, 3
LOUDNESS = 10 ** (-30 / 20)  # of full scale, root mean square


def missing_dependency(model: str | None = None) -> str | None:
    """The missing package, with the fix; None where embeddings can be computed."""
    if model is not None:
        return hf_scorers.missing_dependency()
    return None if importlib.util.find_spec("resemblyzer") else f"resemblyzer not installed: {INSTALL}"


def embedder(model: str | None = None, device: str = "cpu") -> Callable[[np.ndarray], np.ndarray]:
    """wav_T -> unit vector, by the model at path `model` (None: Resemblyzer). Raises ImportError where `missing_dependency`
    names a package, ValueError where `model` holds no x-vector model."""
    if why := missing_dependency(model):
        raise ImportError(why)
    if model is not None:
        return hf_scorers.voice_embedder(model, device)
    package = importlib.util.find_spec("resemblyzer").submodule_search_locations[0]
    state = torch.load(posixpath.join(package, "pretrained.pt"), map_location="cpu", weights_only=True)["model_state"]
    lstm, linear = torch.nn.LSTM(MELS, DIM, LAYERS, batch_first=True), torch.nn.Linear(DIM, DIM)
    for name, module in (("lstm.", lstm), ("linear.", linear)):
        module.load_state_dict({k.removeprefix(name): v for k, v in state.items() if k.startswith(name)})
        module.to(device).eval()

    @torch.inference_mode()
    def embed(wav_T: np.ndarray) -> np.ndarray:
        mel_TF = mel_power(torch.from_numpy(np.ascontiguousarray(wav_T, np.float32)).to(device))
        # windows of 1.6 s, half overlapping; a shorter sound is padded to one
        mel_TF = F.pad(mel_TF, (0, 0, 0, max(0, WINDOW - len(mel_TF))))
        mel_BTF = mel_TF.unfold(0, WINDOW, STEP).transpose(1, 2)
        _, (hidden_LBD, _) = lstm(mel_BTF.contiguous())
        mean_D = F.normalize(linear(hidden_LBD[-1]).relu(), dim=1).mean(0)
        return F.normalize(mean_D, dim=0).cpu().numpy()

    return embed


def mel_power(wav_T: torch.Tensor) -> torch.Tensor:
    """(T, 40) mel powers, T = samples // 160 + 1, of a sound raised to LOUDNESS where it is quieter."""
    wav_T = wav_T * (LOUDNESS / wav_T.square().mean().sqrt().clamp_min(1e-6)).clamp_min(1.0)
    spec_FT = torch.stft(wav_T, N_FFT, HOP, N_FFT, torch.hann_window(N_FFT, device=wav_T.device), center=True,
                         pad_mode="constant", return_complex=True).abs().square()
    return spec_FT.T @ filterbank(SAMPLE_RATE, N_FFT, MELS, "slaney", wav_T.device)
