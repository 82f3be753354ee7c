"""Features that HuBERT's first targets are clusters of: MFCCs, by crop and, with warps, by vocal tract.

Vocal tract length normalisation (Lee and Rose 1996): a crop's log-mels are tried under warps of the spectrum, and those
targets count whose features lie nearest to the codebook.  Codebook and warps are fitted in turns.  No reader is known.
Legend: W warps, B rows, T frames at 25 Hz, C features, K clusters; mel_BTF at 100 Hz.
"""

from __future__ import annotations

import torch

from audiolm.models import kmeans
from audiolm.models.conformer import SUBSAMPLE, valid_frames
from audiolm.models.mel import floored, mfcc, standardised, warp_matrix

MFCC_FEATURES = 39  # 13 MFCCs, their differences and the differences of those
MIN_STD = 1e-3  # of a crop's MFCC, in units of their scale: silence is not blown up
WARPS = 9  # odd, so that one of them changes nothing
ROUNDS = 4  # of clustering and choosing warps; few crops change theirs after that
ITERATIONS = 10  # of k-means in a round


def target_features(mel_BTF: torch.Tensor, lengths_B: torch.Tensor, normalise: str = "corpus") -> torch.Tensor:
    """x_BTC at 25 Hz, C = 39: MFCC and differences, zero mean and unit variance over a row's own frames.

    `normalise`: the encoder's; with clip, log-mels have the floor of the encoder's input.
    """
    return _features(_floored(mel_BTF, lengths_B, normalise), lengths_B)


def warped_features(mel_BTF: torch.Tensor, lengths_B: torch.Tensor, normalise: str, cents: float) -> torch.Tensor:
    """x_WBTC: `target_features` under WARPS warps, from -cents to +cents."""
    mel_BTF = _floored(mel_BTF, lengths_B, normalise)
    ratios = [2.0 ** (cents * (2 * w / (WARPS - 1) - 1) / 1200) for w in range(WARPS)]
    return torch.stack([_features(mel_BTF @ warp_matrix(r, mel_BTF.shape[-1], device=mel_BTF.device), lengths_B)
                        for r in ratios])


def nearest_warp(x_WBTC: torch.Tensor, lengths_B: torch.Tensor, codebook_KC: torch.Tensor) -> torch.Tensor:
    """x_BTC of each row's warp of least mean squared distance to the nearest clusters, over the row's own frames."""
    distance_WBT = torch.cdist(x_WBTC, codebook_KC).amin(-1).square()
    best_B = (distance_WBT * valid_frames(lengths_B, x_WBTC.shape[2])).sum(-1).argmin(0)
    return x_WBTC[best_B, torch.arange(len(best_B), device=x_WBTC.device)]


def warped_points(points: list[torch.Tensor], k: int, seed: int) -> list[torch.Tensor]:
    """x_TC of each crop under the warp chosen for it, from its features x_WTC under all: a sample to fit the codebook on.

    Raises ValueError where fewer than k frames differ.
    """
    chosen = [x_WTC[WARPS // 2] for x_WTC in points]
    for _ in range(ROUNDS):
        codebook_KC = kmeans.fit(chosen, k, seed, iterations=ITERATIONS).centroids
        chosen = [nearest_warp(x_WTC[:, None], torch.tensor([x_WTC.shape[1]]), codebook_KC)[0] for x_WTC in points]
    return chosen


def _floored(mel_BTF: torch.Tensor, lengths_B: torch.Tensor, normalise: str) -> torch.Tensor:
    return floored(mel_BTF, valid_frames(lengths_B * SUBSAMPLE, mel_BTF.shape[1])) if normalise == "clip" else mel_BTF


def _features(mel_BTF: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    frames = mel_BTF.shape[1]
    last_B1 = lengths_B[:, None] * SUBSAMPLE - 1
    # The last frame is held for the length of the differences' reach, so that padding and batch do not show.
    held_BT = torch.minimum(torch.arange(frames + 4, device=mel_BTF.device)[None], last_B1)
    c_BTC = mfcc(mel_BTF.gather(1, held_BT[..., None].expand(-1, -1, mel_BTF.shape[-1])))[:, :frames]
    # Normalised by crop, over its own frames: the targets say little of the speaker or the microphone.
    c_BTC = standardised(c_BTC, valid_frames(lengths_B * SUBSAMPLE, frames), MIN_STD)
    return c_BTC.unflatten(1, (-1, SUBSAMPLE)).mean(2)
