"""Speaker embeddings by Resemblyzer's network (GE2E, 1710.10467): same speaker about 0.9 by cosine, others about 0.5.

Only the weights inside the package are used (`pip install --no-deps resemblyzer`; its own code wants a compiler and librosa):
mel powers as librosa makes them (Slaney's scale and norm), windows of 1.6 s, means of unit vectors.  Quiet sound is raised to
-30 dBFS as there; silences stay, as its voice detector is a package of its own.  wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

import importlib.util
import posixpath
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from audiolm.models.mel import filterbank
from audiolm.tokenizers.base import SAMPLE_RATE

INSTALL = "pip install --no-deps resemblyzer"
N_FFT, HOP, MELS = 400, 160, 40
WINDOW, STEP = 160, 80  # frames of 10 ms
DIM, LAYERS = 256, 3
LOUDNESS = 10 ** (-30 / 20)  # of full scale, root mean square


def missing_dependency() -> str | None:
    """Why there are no embeddings here, with the fix; None where there are."""
    return None if importlib.util.find_spec("resemblyzer") else f"resemblyzer not installed: {INSTALL}"


def embedder(device: str = "cpu") -> Callable[[np.ndarray], np.ndarray]:
    """wav_T -> unit vector (256,). Raises ImportError where the package is missing."""
    if why := missing_dependency():
        raise ImportError(why)
    package = importlib.util.find_spec("resemblyzer").submodule_search_locations[0]
    held = torch.load(posixpath.join(package, "pretrained.pt"), map_location="cpu", weights_only=True)["model_state"]
    lstm, linear = torch.nn.LSTM(MELS, DIM, LAYERS, batch_first=True), torch.nn.Linear(DIM, DIM)
    for name, module in (("lstm.", lstm), ("linear.", linear)):
        module.load_state_dict({k.removeprefix(name): v for k, v in held.items() if k.startswith(name)})
        module.to(device).eval()

    @torch.inference_mode()
    def embed(wav_T: np.ndarray) -> np.ndarray:
        mel_TF = mel_power(torch.from_numpy(np.ascontiguousarray(wav_T, np.float32)).to(device))
        mel_TF = F.pad(mel_TF, (0, 0, 0, max(0, WINDOW - len(mel_TF))))
        mel_BTF = mel_TF.unfold(0, WINDOW, STEP).transpose(1, 2)
        _, (hidden_LBD, _) = lstm(mel_BTF.contiguous())
        mean_D = F.normalize(linear(hidden_LBD[-1]).relu(), dim=1).mean(0)
        return F.normalize(mean_D, dim=0).cpu().numpy()

    return embed


def mel_power(wav_T: torch.Tensor) -> torch.Tensor:
    """(T, 40) mel powers, T = samples // 160 + 1, of a sound that is not quieter than LOUDNESS."""
    wav_T = wav_T * (LOUDNESS / wav_T.square().mean().sqrt().clamp_min(1e-6)).clamp_min(1.0)
    spec_FT = torch.stft(wav_T, N_FFT, HOP, N_FFT, torch.hann_window(N_FFT, device=wav_T.device), center=True,
                         pad_mode="constant", return_complex=True).abs().square()
    return spec_FT.T @ filterbank(SAMPLE_RATE, N_FFT, MELS, "slaney", wav_T.device)
