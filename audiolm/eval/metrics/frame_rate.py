"""Features at a multiple of their extractor's rate: it reads the sound several times, each time moved by a part of a frame."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Extract = Callable[[np.ndarray], np.ndarray]  # wav_T to (frames, D)


def at_multiple(extract: Extract, hop: int, times: int) -> Extract:
    """`extract` at `times` its rate; 1 leaves it as it is. `hop`, in samples, is a multiple of 2 x `times`.

    Frame i of `extract` is centred at (i + 0.5) hop, frame i of the result at (i + 0.5) hop / times.  Pass r gives the frames
    r, r + times, ...: it reads the sound later or earlier by the difference, with zeros in front where it is later.
    """
    step = hop // times

    def features(wav_T: np.ndarray) -> np.ndarray:
        later = [(hop - step) // 2 - r * step for r in range(times)]  # samples
        passes = [extract(np.pad(wav_T, (n, 0)) if n > 0 else wav_T[-n:]) for n in later]
        frames_TD = np.empty((sum(map(len, passes)), passes[0].shape[1]), np.float32)
        for r, x_TD in enumerate(passes):
            frames_TD[r::times] = x_TD
        return frames_TD[:max(1, -(-len(wav_T) // step))]  # no frame begins behind the sound

    return features
