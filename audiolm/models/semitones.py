"""What sounds in each semitone: a masked model's input, and its first targets, for music.

Log-mels of 25 ms windows blur low keys, and MFCCs hold no pitch: clusters of them explain 4 % of which piano keys sound,
clusters of these 42 %.  A musical scale as teacher of a masked model: MERT (2306.00107) predicts a constant-Q transform.
Legend: B rows, T frames at 100 Hz, or 25 Hz where said, K keys.
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
QUIET = 0.1  # of a row's mean norm: frames below it stay quiet where norms are made equal


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


def semitone_targets(x_BTK: torch.Tensor, lengths_B: torch.Tensor, subsample: int) -> torch.Tensor:
    """Means of `subsample` frames, of norm 1, so that loudness is left out; quiet frames stay below it. Lengths in means."""
    x_BTK = x_BTK.unflatten(1, (-1, subsample)).mean(2)
    valid_BT = torch.arange(x_BTK.shape[1], device=x_BTK.device)[None] < lengths_B[:, None]
    norm_BT = x_BTK.norm(dim=-1)
    mean_B1 = (norm_BT * valid_BT).sum(1, keepdim=True) / lengths_B[:, None].clamp_min(1)
    return x_BTK / norm_BT.maximum(QUIET * mean_B1).clamp_min(1e-6)[..., None]


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # a cached bank may take part in a backward pass later
def _keys(sample_rate: int, device: torch.device) -> torch.Tensor:
    """(WINDOW // 2 + 1, K): triangles that reach a semitone to either side of each key, of area 1."""
    hz_F = torch.arange(1, WINDOW // 2 + 1, dtype=torch.float64) * sample_rate / WINDOW
    midi_F = 69 + 12 * (hz_F / 440).log2()
    bank_FK = (1 - (midi_F[:, None] - torch.arange(LOWEST, LOWEST + KEYS)).abs()).clamp_min(0)
    bank_FK = bank_FK / bank_FK.sum(0).clamp_min(1e-9)
    return F.pad(bank_FK, (0, 0, 1, 0)).float().to(device)  # the bin of 0 Hz belongs to no key
