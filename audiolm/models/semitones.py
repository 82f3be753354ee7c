"""What sounds in each semitone: a masked model's input for music, as log-mels of 25 ms windows blur low keys.

Legend: B rows, T frames at 100 Hz, K keys.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from audiolm.models.mel import HOP

WINDOW = 4096  # samples, 256 ms: neighbours are apart from about 150 Hz on; 512 ms told fewer keys
LOWEST, KEYS = 28, 81  # MIDI numbers 28 to 108, 41 Hz to 4.2 kHz; a window holds too few periods of lower keys
POWER = 0.3  # of magnitudes, about as loudness grows
AROUND = 3  # semitones to either side, whose mean a key must exceed: noise and hammers excite all alike


def semitones(wav_BT: torch.Tensor, sample_rate: int = 16_000) -> torch.Tensor:
    """x_BTK: each key's magnitude above its neighbours' mean; T = samples // 160, zeros around the sound.

    Raises ValueError where the samples are no multiple of 160.
    """
    if wav_BT.shape[-1] % HOP:
        raise ValueError(f"semitones take a multiple of {HOP} samples, got {wav_BT.shape[-1]}; pad with zeros")
    side = (WINDOW - HOP) // 2  # a window is centred on its frame
    spectrum_BFT = torch.stft(F.pad(wav_BT.float(), (side, side)), WINDOW, HOP, center=False, return_complex=True,
                              window=torch.hann_window(WINDOW, device=wav_BT.device)).abs()
    x_BTK = (spectrum_BFT.transpose(1, 2) @ _keys(sample_rate, wav_BT.device)) ** POWER
    return F.relu(x_BTK - F.avg_pool1d(x_BTK, 2 * AROUND + 1, 1, AROUND, count_include_pad=False))


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # a cached bank may take part in a backward pass later
def _keys(sample_rate: int, device: torch.device) -> torch.Tensor:
    """(WINDOW // 2 + 1, K): triangles that reach a semitone to either side of each key, of area 1."""
    hz_F = torch.arange(1, WINDOW // 2 + 1, dtype=torch.float64) * sample_rate / WINDOW
    midi_F = 69 + 12 * (hz_F / 440).log2()
    bank_FK = (1 - (midi_F[:, None] - torch.arange(LOWEST, LOWEST + KEYS)).abs()).clamp_min(0)
    bank_FK = bank_FK / bank_FK.sum(0).clamp_min(1e-9)
    return F.pad(bank_FK, (0, 0, 1, 0)).float().to(device)  # the bin of 0 Hz belongs to no key
