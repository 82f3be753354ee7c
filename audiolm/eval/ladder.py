"""The stage ladder: held-out clips rebuilt with one more stage of the system at each rung, to locate where quality is lost.

Rungs: the codec with all levels; with the coarse levels Q'; fine from true coarse codes; coarse (and fine) from true semantic
tokens; the full continuation of a prompt.  Each has its audio and its mel distance (mean L1 of log-mels, nats) to the original.
A continuation is scored only after its prompt.  wav_T: float32 mono at 16 kHz, whole 40 ms frames.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from audiolm import rng, store
from audiolm.config.corpus import ClipFilter
from audiolm.data.audio import wav_bytes
from audiolm.data.clips import Clip, read_clip, read_clips
from audiolm.eval.metrics.audio_quality import mel_distance
from audiolm.generate.audiolm import AudioLM
from audiolm.generate.sound import Sound
from audiolm.lm.stages import SEMANTIC_HZ
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP


def held_out(manifest: str, roots: dict[str, str], n: int, seconds: float,
             where: ClipFilter | None) -> list[tuple[Clip, np.ndarray]]:
    """The clips of `choose_held_out` with wav_T, each cut to `seconds`."""
    return [(c, read_clip(c, roots, 0, samples)) for c, samples in choose_held_out(manifest, n, seconds, where)]


def choose_held_out(manifest: str, n: int, seconds: float, where: ClipFilter | None) -> list[tuple[Clip, int]]:
    """At most n (clip, samples of its first `seconds`) of the test split (dev where there is none); no randomness.

    They are evenly spaced among the clips that are long enough, else the longest ones. Raises ValueError where nothing is
    held out."""
    clips = read_clips(manifest, split="test", where=where) or read_clips(manifest, split="dev", where=where)
    clips = [c for c in clips if c.samples >= 2 * SEMANTIC_HOP]
    if not clips:
        raise ValueError("no held-out clips to evaluate on: give the corpus a test or dev share, or widen `where`")
    long = [c for c in clips if c.seconds >= seconds]
    if len(long) < n:
        long = sorted(clips, key=lambda c: (-c.samples, c.id))[:n]
    chosen = [long[(2 * i + 1) * len(long) // (2 * n)] for i in range(n)] if len(long) > n else long
    return [(c, min(c.samples, round(seconds * SAMPLE_RATE)) // SEMANTIC_HOP * SEMANTIC_HOP) for c in chosen]


def seconds_within(lm: AudioLM, seconds: float) -> float:
    """`seconds`, or the crop that the stages were trained on where that is shorter."""
    return min(seconds, lm.longest / SEMANTIC_HZ)


def ladder(lm: AudioLM, clips: Sequence[tuple[Clip, np.ndarray]], prompt_s: float, seed: int,
           folder: str) -> list[dict[str, Any]]:
    """Rungs as [{"rung", "mel", "files": [{"clip", "file"}]}], wavs under {folder}/wav/."""
    wavs = [wav for _, wav in clips]
    seeds = [rng.derive(seed, "ladder", i) for i in range(len(wavs))]
    return [{"rung": name, "mel": mel, "files": save_wavs(folder, f"{number}-{slug(name)}", clips, rebuilt)}
            for number, (name, mel, rebuilt) in enumerate(rungs(lm, wavs, prompt_s, seeds))]


def rungs(lm: AudioLM, wavs: Sequence[np.ndarray], prompt_s: float,
          seeds: Sequence[int]) -> list[tuple[str, float, Sequence[np.ndarray]]]:
    """(name, mel distance, a wav_T for each of `wavs`) of every rung, from the original upwards."""
    q = lm.acoustic_stage.levels[1]
    codes, semantic = lm.encode(wavs), lm.tokenize(wavs)
    made = [("original", wavs), (f"codec, {lm.codec.spec.n_q} levels", decoded(lm, codes, wavs))]
    if lm.has_fine:  # else all levels are coarse, and these two rungs equal the codec
        coarse = [c[:, :q] for c in codes]
        made += [(f"codec, {q} levels", decoded(lm, coarse, wavs)),
                 ("fine from true coarse", decoded(lm, lm.fine(coarse, seeds), wavs))]
    sounds = lm.acoustic(semantic, seeds, [len(w) for w in wavs])
    made.append((f"{lm.acoustic_stage.name} from true semantic", [s.wav_T for s in sounds]))
    prompts = [prompt_samples(w, prompt_s) for w in wavs]
    made.append(("continuation", [s.wav_T for s in continued(lm, wavs, prompts, seeds)]))
    table = []
    for name, rebuilt in made:
        skip = prompts if name == "continuation" else [0] * len(wavs)  # a prompt is the codec's work
        mel = np.mean([mel_distance(w[s:], r[s:]) for w, r, s in zip(wavs, rebuilt, skip, strict=True)])
        table.append((name, float(mel), rebuilt))
    return table


def save_wavs(folder: str, name: str, clips: Sequence[tuple[Clip, np.ndarray]],
              wavs: Sequence[np.ndarray]) -> list[dict[str, str]]:
    """Writes a rung's wavs; returns [{"clip", "file"}]."""
    files = [{"clip": clip.id, "file": f"wav/{name}-{slug(clip.id)}.wav"} for clip, _ in clips]
    for file, wav in zip(files, wavs, strict=True):
        store.put(store.join(folder, file["file"]), wav_bytes(wav))
    return files


def decoded(lm: AudioLM, codes: Sequence[np.ndarray], wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The codes' audio, each as long as its clip."""
    return [lm.decode(c, len(w)) for c, w in zip(codes, wavs, strict=True)]


def prompt_samples(wav_T: np.ndarray, prompt_s: float) -> int:
    """Samples of a prompt, in whole frames; at most half of a short clip, so that something is left to continue."""
    return max(1, min(round(prompt_s * SAMPLE_RATE), len(wav_T) // 2) // SEMANTIC_HOP) * SEMANTIC_HOP


def continued(lm: AudioLM, wavs: Sequence[np.ndarray], prompts: Sequence[int], seeds: Sequence[int]) -> list[Sound]:
    """Each wav's first `prompts` samples, continued to the wav's length."""
    sounds: dict[int, Sound] = {}
    rest = [len(w) - p for w, p in zip(wavs, prompts, strict=True)]
    for samples in sorted(set(rest)):  # one batch for all continuations of a length
        at = [i for i, r in enumerate(rest) if r == samples]
        sounds |= zip(at, lm.continuation([wavs[i][:prompts[i]] for i in at], samples / SAMPLE_RATE, [seeds[i] for i in at],
                                          may_end=False), strict=True)
    return [sounds[i] for i in range(len(wavs))]


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
