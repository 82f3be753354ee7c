"""Step `samples`: what the trained system sounds like (paper III-D), n wavs of each mode, checked and playable.

Unconditional, acoustic generation from a clip's true semantic tokens, continuation of prompts from speakers of the test
split, and codec resynthesis of the same clips.  Leaves wav/NAME.wav (16 kHz, 16-bit PCM) and samples.json in the build,
and the wavs with a spectrogram PNG each under ui/.  Shapes: wav_T float32 mono at 16 kHz.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from audiolm import rng, store
from audiolm.data.audio import read_clip
from audiolm.data.manifest import Clip, read_clips, roots
from audiolm.lm.generation import AudioLM, Sound, load, whole_frames
from audiolm.tokenizers.base import SAMPLE_RATE

MODES = ("unconditional", "acoustic", "continuation", "resynthesis")
MODELS = ("kmeans", "codec", "lm_semantic", "lm_coarse", "lm_fine")


def make_samples(config: Mapping[str, Any], inputs: Mapping[str, Any], out: Any) -> dict[str, Any]:
    """Step function. config: samples, corpus, lm, seed, cluster; inputs: manifest, kmeans, codec, both token stores and
    the stages (no lm_fine where Q' = Q). Returns counts, seconds of audio and real-time factors (below 1: faster than
    the sound lasts). Raises ValueError for a wav that is not finite or not of the length asked for.
    """
    asked, corpus, seed = config["samples"], config["corpus"], config["seed"]
    device = _device(config["cluster"].device)
    system = load({name: inputs[name].path for name in MODELS if name in inputs}, device,
                  mean_run=inputs["semantic_tokens"].facts["mean_run"],
                  temperatures={s: getattr(asked, f"temperature_{s}") for s in ("semantic", "coarse", "fine")})
    clips = pick(read_clips(inputs["manifest"].path, "test"), asked.n, asked.prompt_s + asked.seconds, seed)
    wavs = [_excerpt(clip, roots(corpus), asked.prompt_s + asked.seconds) for clip in clips]
    prompts = [whole_frames(wav[:round(asked.prompt_s * SAMPLE_RATE)]) for wav in wavs]

    entries, spent_s = [], {}
    for done, mode in enumerate(MODES):
        out.check()
        out.progress(done, len(MODES), "modes", mode)
        seeds = [rng.derive(seed, f"sample {mode}", i) for i in range(asked.n)]
        began = time.perf_counter()
        if mode == "unconditional":
            sounds, lengths = system.unconditional(asked.seconds, seeds), [round(asked.seconds * SAMPLE_RATE)] * asked.n
        elif mode == "acoustic":
            sounds, lengths = system.acoustic(system.tokenize(wavs), seeds, [len(w) for w in wavs]), [*map(len, wavs)]
        elif mode == "continuation":
            sounds = system.continuation(prompts, asked.seconds, seeds)
            lengths = [len(p) + round(asked.seconds * SAMPLE_RATE) for p in prompts]
        else:
            sounds, lengths = system.resynthesis(wavs), [*map(len, wavs)]
        spent_s[mode] = time.perf_counter() - began
        sources = [None] * asked.n if mode == "unconditional" else clips
        cuts_s = [len(p) / SAMPLE_RATE if mode == "continuation" else None for p in prompts]
        entries += [_publish(out.path, mode, i, sound, n, source, cuts_s[i])
                    for i, (sound, n, source) in enumerate(zip(sounds, lengths, sources, strict=True))]
    out.check()
    store.put_json(store.join(out.path, "samples.json"), entries)
    out.progress(len(MODES), len(MODES), "modes")
    return _facts(system, entries, spent_s)


def pick(clips: Sequence[Clip], n: int, seconds: float, seed: int) -> list[Clip]:
    """n clips of as many speakers as there are; in each round clips that last `seconds` come first, else the longest.

    Raises ValueError where there are none.
    """
    if not clips:
        raise ValueError("the manifest has no test clips for prompts: raise corpus.test or give a test split")
    order = rng.generator(seed, "sample clips").permutation(len(clips))
    speakers: dict[str, list[Clip]] = {}
    for i in order:
        speakers.setdefault(clips[i].speaker, []).append(clips[i])
    for own in speakers.values():
        own.sort(key=lambda c: -min(c.seconds, seconds))
    rounds = [own[i] for i in range(len(clips)) for own in speakers.values() if i < len(own)]
    return [rounds[i % len(rounds)] for i in range(n)]


def _excerpt(clip: Clip, source_roots: dict[str, str], seconds: float) -> np.ndarray:
    """The clip's start: `seconds`, or all of it in whole semantic frames where it is shorter."""
    wav = read_clip(clip, source_roots, 0, min(clip.samples, round(seconds * SAMPLE_RATE)))
    return whole_frames(wav)


def _publish(path: str, mode: str, i: int, sound: Sound, samples: int, clip: Clip | None,
             prompt_s: float | None) -> dict:
    """Checks one sound, writes its wav and spectrogram; returns its line of samples.json."""
    from audiolm.eval.plots import spectrogram

    wav_T = sound.wav_T
    if len(wav_T) != samples or not np.isfinite(wav_T).all():
        raise ValueError(f"{mode} sample {i} has {len(wav_T)} samples (expected {samples}), "
                         f"{int((~np.isfinite(wav_T)).sum())} of them not finite: look at the codec step")
    name, title = f"{mode}-{i + 1}", f"{mode} {i + 1}" + (f", {clip.id}" if clip else "")
    data = wav_bytes(wav_T)
    store.put(store.join(path, "wav", f"{name}.wav"), data)
    store.put(store.join(path, "ui", f"{name}.wav"), data)
    store.put(store.join(path, "ui", f"{name}.png"), spectrogram(wav_T, title, prompt_s))
    return {"file": f"wav/{name}.wav", "mode": mode, "title": title, "seconds": round(len(wav_T) / SAMPLE_RATE, 4),
            "prompt_s": prompt_s, "clip": clip.id if clip else None,
            "text": clip.text if clip else None, "peak": round(float(np.abs(wav_T).max()), 5)}


def wav_bytes(wav_T: np.ndarray) -> bytes:
    """A 16 kHz, 16-bit PCM file; what lies beyond full scale is clipped, never wrapped."""
    import soundfile

    sink = io.BytesIO()
    soundfile.write(sink, np.clip(wav_T, -1.0, 1.0), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return sink.getvalue()


def _device(wanted: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _facts(system: AudioLM, entries: list[dict], spent_s: dict[str, float]) -> dict[str, Any]:
    seconds = {mode: sum(e["seconds"] for e in entries if e["mode"] == mode) for mode in MODES}
    generated = {"semantic": seconds["unconditional"] + seconds["continuation"],
                 **dict.fromkeys(("coarse", "fine"), sum(seconds.values()) - seconds["resynthesis"]),
                 "decode": sum(seconds.values())}
    facts: dict[str, Any] = {"wavs": len(entries), "audio_s": round(sum(seconds.values()), 3),
                             "silent": sum(e["peak"] < 1e-4 for e in entries)}
    facts |= {f"rtf/{mode}": round(spent_s[mode] / seconds[mode], 4) for mode in MODES}
    facts |= {f"rtf/stage.{s}": round(system.spent_s[s] / generated[s], 4) for s in generated if s in system.spent_s}
    return facts
