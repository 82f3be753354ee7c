"""Step `samples`: n wavs of each mode from the trained system (2209.03143 III-D), checked and playable.

Modes: unconditional, acoustic generation from a clip's true semantic tokens, continuation of prompts from speakers of the
test split (dev where there is none), and codec resynthesis of the same clips.  Leaves wav/NAME.wav (16 kHz, 16-bit PCM) and
samples.json in the build, and each wav with a spectrogram PNG under ui/.  Shapes: wav_T float32 mono at 16 kHz.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from audiolm import rng, store
from audiolm.data.audio import wav_bytes
from audiolm.data.clips import Clip, read_clip, read_clips
from audiolm.data.parallel import cluster_device, parallel_map
from audiolm.data.sources import roots
from audiolm.generate.load import load
from audiolm.generate.params import params_from_config
from audiolm.generate.prompts import SILENT_PEAK, whole_frames
from audiolm.generate.sound import Sound
from audiolm.tokenizers.base import SAMPLE_RATE

MODES = ("unconditional", "acoustic", "continuation", "resynthesis")
OPEN_ENDED = ("unconditional", "continuation")  # stage 1 may end them before the seconds asked for


def make_samples(config: Mapping[str, Any], inputs: Mapping[str, Any], out: Any) -> dict[str, Any]:
    """Step function. config: samples, corpus, seed, cluster; inputs: manifest, kmeans, codec, semantic_tokens and the
    stages (no lm_fine where Q' = Q). One task a mode.

    Returns counts, seconds of audio, real-time factors (below 1: faster than the sound lasts), the median of the seconds
    that stage 1 ended too early and semantic tokens a second by mode (of resynthesis: of the real clips).
    Raises ValueError for a wav that is not finite.
    """
    device = cluster_device(config["cluster"], out.inline)
    paths = {name: artifact.path for name, artifact in inputs.items()}
    settings = {k: config[k] for k in ("samples", "corpus", "seed")}
    mean_run = inputs["semantic_tokens"].facts["mean_run"]
    results = parallel_map(make_mode, [(mode, settings, paths, mean_run, out.path, device) for mode in MODES], out=out,
                           cluster=config["cluster"], unit="modes", gpu=device == "cuda")
    entries = [entry for mode_entries, _ in results for entry in mode_entries]
    out.check()
    store.put_json(store.join(out.path, "samples.json"), entries)
    facts: dict[str, Any] = {"wavs": len(entries), "audio_s": round(sum(e["seconds"] for e in entries), 3),
                             "silent": sum(e["peak"] < SILENT_PEAK for e in entries)}
    for mode, (mode_entries, spent_s) in zip(MODES, results, strict=True):
        seconds = sum(e["seconds"] for e in mode_entries)
        facts |= {f"rtf/{mode}{part and '.' + part}": round(spent / seconds, 4) for part, spent in spent_s.items()}
        if mode in OPEN_ENDED:
            facts[f"short_s/{mode}"] = float(np.median([e["short_s"] for e in mode_entries]))
        if rates := [e["semantic_per_s"] for e in mode_entries if e["semantic_per_s"]]:
            facts[f"semantic_per_s/{mode}"] = round(float(np.mean(rates)), 3)
    return facts


def make_mode(mode: str, config: Mapping[str, Any], paths: Mapping[str, str], mean_run: float, folder: str,
              device: str) -> tuple[list[dict], dict[str, float]]:
    """One task: (a mode's entries of samples.json, wall-clock seconds in all ("") and by stage)."""
    samples, seed = config["samples"], config["seed"]
    lm = load(paths, device, mean_run, params_from_config(samples))
    clip_s = samples.prompt_s + samples.seconds
    held_out = read_clips(paths["manifest"], "test") or read_clips(paths["manifest"], "dev")
    clips = pick_clips(held_out, samples.n, clip_s, seed)
    wavs = [whole_frames(read_clip(clip, roots(config["corpus"]), 0, min(clip.samples, round(clip_s * SAMPLE_RATE))))
            for clip in clips]
    prompts = [whole_frames(wav[:round(samples.prompt_s * SAMPLE_RATE)]) for wav in wavs]
    seeds = [rng.derive(seed, f"sample {mode}", i) for i in range(samples.n)]
    began = time.perf_counter()
    if mode == "acoustic":  # as long as stage 2 makes it, not as long as the clip
        sounds = lm.acoustic(lm.tokenize(wavs), seeds)
    else:
        sounds = lm.generate(mode, prompts if mode == "continuation" else wavs, samples.seconds, seeds)
    spent_s = {"": time.perf_counter() - began, **lm.spent_s}
    sources = [None] * samples.n if mode == "unconditional" else clips
    asked_s = samples.seconds if mode in OPEN_ENDED else None
    return [_publish(folder, mode, i, sound, asked_s, source)
            for i, (sound, source) in enumerate(zip(sounds, sources, strict=True))], spent_s


def pick_clips(clips: Sequence[Clip], n: int, seconds: float, seed: int) -> list[Clip]:
    """n clips of as many speakers as there are; of a speaker, clips that last `seconds` come first, else the longest.

    Raises ValueError where there are none.
    """
    if not clips:
        raise ValueError("the manifest has no test and no dev clips for prompts: set corpus.dev=0.05, or give a test split")
    order = rng.generator(seed, "sample clips").permutation(len(clips))
    speakers: dict[str, list[Clip]] = {}
    for i in order:
        speakers.setdefault(clips[i].speaker, []).append(clips[i])
    for own in speakers.values():
        own.sort(key=lambda c: -min(c.seconds, seconds))
    rounds = [own[i] for i in range(len(clips)) for own in speakers.values() if i < len(own)]
    return [rounds[i % len(rounds)] for i in range(n)]


def _publish(path: str, mode: str, i: int, sound: Sound, asked_s: float | None, clip: Clip | None) -> dict:
    """Writes one sound's wav and spectrogram; returns its entry of samples.json. `asked_s`: beyond a prompt."""
    from audiolm.render.plots import spectrogram

    wav_T, prompt_s = sound.wav_T, sound.prompt / SAMPLE_RATE if sound.prompt else None
    name, title = f"{mode}-{i + 1}", f"{mode} {i + 1}" + (f", {clip.id}" if clip else "")
    data = wav_bytes(wav_T)
    store.put(store.join(path, "wav", f"{name}.wav"), data)
    store.put(store.join(path, "ui", f"{name}.wav"), data)
    store.put(store.join(path, "ui", f"{name}.png"), spectrogram(wav_T, title, prompt_s))
    return {"file": f"wav/{name}.wav", "mode": mode, "title": title, "seconds": round(len(wav_T) / SAMPLE_RATE, 4),
            "prompt_s": prompt_s, "short_s": None if asked_s is None else round(asked_s - sound.new_s, 4), "ended": sound.ended,
            "semantic_per_s": sound.semantic_per_s, "clip": clip.id if clip else None,
            "text": clip.text if clip else None, "peak": round(float(np.abs(wav_T).max()), 5)}
