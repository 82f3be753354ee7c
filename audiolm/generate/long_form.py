"""Sound of any length in constant memory: slide and prompt (AudioLM baseline of SoundStorm, 2305.09636).

Windows of 10 s; each is prompted with the last 3 s of the one before, in all stages.  The cut goes through the
semantic tokens in time, so stage 2 must know how long each lasts: `lm.lengths`, or no deduplication.
Shapes: wav_T float32 mono at 16 kHz, z_T at 25 Hz, codes_TQ at 50 Hz.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from audiolm.data.tokens import RATIO
from audiolm.generate.audiolm import AudioLM
from audiolm.generate.prompts import whole_frames
from audiolm.lm.stages import SEMANTIC_HZ
from audiolm.rng import derive
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP, padded_samples

WINDOW_S, OVERLAP = 10.0, 0.3  # the overlap is a share of the window, 3 s as the paper's prompts
HOLD = 8  # semantic frames (0.32 s) that wait for the next window: a codec that is not causal needs what follows


def stream(lm: AudioLM, prompt_T: np.ndarray | None, seconds: float, seed: int, may_end: bool = True,
           window_s: float = WINDOW_S, overlap_s: float | None = None) -> Iterator[np.ndarray]:
    """Pieces of a prompt and at most `seconds` beyond it; windows are at most as long as the trained crops.

    Raises ValueError for deduplicated stages, a prompt that fills the window, and an overlap that leaves nothing new.
    """
    if lm.acoustic_stage.dedupe:
        raise ValueError("the stages were trained with lm.lengths: false, so deduplicated tokens do not tell how long they "
                         "last and windows cannot slide over them: train with lm.lengths=true, or ask for at most the trained "
                         "crop")
    prompt_T = None if prompt_T is None else whole_frames(prompt_T)
    head = 0 if prompt_T is None else len(prompt_T) // SEMANTIC_HOP
    window = min(int(window_s * SEMANTIC_HZ), lm.longest)
    overlap = int(OVERLAP * window if overlap_s is None else overlap_s * SEMANTIC_HZ)
    if not HOLD < overlap < window:
        raise ValueError(f"the overlap ({overlap / SEMANTIC_HZ:g} s) must lie between {HOLD / SEMANTIC_HZ:g} s and the window "
                         f"({window / SEMANTIC_HZ:g} s, at most what the stages were trained on)")
    if head >= window:
        raise ValueError(f"the prompt ({head / SEMANTIC_HZ:g} s) fills the window of {window / SEMANTIC_HZ:g} s: give a "
                         "shorter one")
    samples = head * SEMANTIC_HOP + round(seconds * SAMPLE_RATE)
    if seconds <= 0:
        raise ValueError(f"seconds ({seconds:g}) must be above 0")
    return _windows(lm, prompt_T, samples, seed, may_end, window, overlap)


def _windows(lm: AudioLM, prompt_T: np.ndarray | None, samples: int, seed: int, may_end: bool, window: int,
             overlap: int) -> Iterator[np.ndarray]:
    """The pieces: z_T and codes_TQ hold one window, whose end is semantic frame `done` of the sound."""
    total = padded_samples(samples) // SEMANTIC_HOP
    z_T, codes_TQ = np.zeros(0, np.int64), np.zeros((0, lm.codec.spec.n_q), np.int64)
    if prompt_T is not None:
        z_T, codes_TQ = lm.tokenize([prompt_T])[0], lm.encode([prompt_T])[0]
    head = done = len(z_T)  # semantic frames, of the prompt and in all
    yielded, ended, number, voice_TQ = 0, False, 0, codes_TQ
    while done < total and not ended:
        # all stages continue what the window holds; each window has a seed of its own
        held, seeds = len(z_T), [derive(seed, "window", number)]
        (z_T,), (ended,) = lm.semantic([z_T], [min(window - held, total - done)], seeds, may_end)
        codes_TQ = lm.codes([z_T], seeds, [codes_TQ])[0]
        done, number = done + len(z_T) - held, number + 1
        # the whole window is decoded, so that the codec has its context; only what is new and final is yielded
        voice_TQ = voice_TQ if len(voice_TQ) else codes_TQ  # the prompt's, else the first window's
        wav_T = lm.decode(codes_TQ, SEMANTIC_HOP * len(z_T), z_T, RATIO * max(0, head - (done - len(z_T))), voice_TQ)
        last = ended or done >= total
        start, end = SEMANTIC_HOP * (done - len(z_T)), min(samples, SEMANTIC_HOP * (done if last else done - HOLD))
        yield wav_T[yielded - start:max(yielded, end) - start]
        yielded = max(yielded, end)
        z_T, codes_TQ = z_T[-overlap:], codes_TQ[-RATIO * overlap:]
