"""A sweep of temperatures: held-out clips generated and continued anew at each, to show what too cold and too hot do.

One temperature holds for all stages; the other sampling parameters stay.  Mel distance is the ladder's: to the original, of a
continuation after its prompt only.  Distinct codes: the share of coarse codes that are different ones within a level of a
sample (mean over levels, after the prompt only, where there is one).  A stage that is stuck has few, noise has many.  Shorter
audio has more of them, so the originals' own stand beside it, whole and after the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from audiolm import rng
from audiolm.data.clips import Clip
from audiolm.eval.ladder import continued, prompt_samples, save_wavs, slug
from audiolm.eval.metrics.audio_quality import mel_distance
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.results import Progress, Result, no_progress
from audiolm.eval.suites.base import SuiteContext, ladder_clips, load_audiolm, save_rungs
from audiolm.generate.audiolm import AudioLM
from audiolm.generate.sound import Sound
from audiolm.tokenizers.base import ACOUSTIC_HOP

TEMPERATURES = (0.4, 0.6, 0.8, 1.0)  # around the paper's: 0.6, 0.8 and 0.6 by stage
TABLE = "temperatures"


def sweep(lm: AudioLM, clips: Sequence[tuple[Clip, np.ndarray]], prompt_s: float, folder: str, seed: int = 0,
          temperatures: Sequence[float] = TEMPERATURES,
          progress: Progress = no_progress) -> tuple[list[Result], list[dict[str, Any]]]:
    """(rows, rungs as eval.ladder returns them), wavs under {folder}/wav/; the same seeds at each temperature.

    `clips` as eval.ladder.held_out returns them, within the trained crops."""
    wavs, names = [wav for _, wav in clips], [clip.id for clip, _ in clips]
    seeds, q = [rng.derive(seed, "sweep", i) for i in range(len(wavs))], lm.acoustic_stage.levels[1]
    semantic, prompts, whole = lm.tokenize(wavs), [prompt_samples(w, prompt_s) for w in wavs], [0] * len(wavs)
    rows, rungs = [], []

    def add(item: str, role: str, sounds: Sequence[Sound], skip: Sequence[int], began: float) -> None:
        """Appends an item's two rows, and its rung unless it repeats another's audio."""
        seconds = time.monotonic() - began
        mel = [mel_distance(w[k:], s.wav_T[k:]) for w, s, k in zip(wavs, sounds, skip, strict=True)]
        share = [100 * distinct(s.codes_TQ[k // ACOUSTIC_HOP:, :q]) for s, k in zip(sounds, skip, strict=True)]
        for metric, values in (("mel distance, nats", mel), ("distinct codes, %", share)):
            interval = bootstrap_interval(values, names, seed)
            rows.append(Result(TABLE, item, metric, *interval, len(names), "clips", role, seconds=seconds))
        if skip is whole or role == "ours":
            files = save_wavs(folder, f"t-{slug(item)}", clips, [s.wav_T for s in sounds])
            rungs.append({"rung": item, "mel": float(np.mean(mel)), "files": files})

    began, originals = time.monotonic(), lm.resynthesis(wavs)
    add("originals through the codec", "ceiling", originals, whole, began)
    add("originals through the codec, after the prompt", "ceiling", originals, prompts, began)
    modes = {"acoustic generation": whole, "continuation": prompts}
    jobs = [(mode, temperature) for mode in modes for temperature in temperatures]
    for n, (mode, temperature) in enumerate(jobs, 1):
        began = time.monotonic()
        at = replace(lm, sampling={name: replace(params, temperature=temperature) for name, params in lm.sampling.items()})
        if mode == "continuation":
            sounds = continued(at, wavs, prompts, seeds)
        else:
            sounds = at.acoustic(semantic, seeds, [len(w) for w in wavs])
        add(f"{mode}, T {temperature:g}", "ours", sounds, modes[mode], began)
        progress(n, len(jobs), "sounds")
    return rows, rungs


def distinct(codes_TQ: np.ndarray) -> float:
    """The share of a level's codes that are different ones, mean over levels."""
    return float(np.mean([len(np.unique(level_T)) for level_T in codes_TQ.T]) / len(codes_TQ))


def temperatures_suite(context: SuiteContext) -> list[Result]:
    """Mel distance and distinct codes at each temperature of tables.temperatures."""
    cfg = context.config
    rows, rungs = sweep(load_audiolm(context), ladder_clips(context), cfg.samples.prompt_s, context.folder, context.seed,
                        cfg.tables.temperatures, context.progress)
    save_rungs(context, rungs)
    return rows
