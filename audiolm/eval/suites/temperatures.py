"""A sweep of temperatures: held-out clips generated and continued anew at each, to hear what too cold and too hot do.

One temperature holds for all stages; what else a draw has stays.  Mel distance is the ladder's (to the original; of a
continuation after its prompt only); distinct codes, the share of coarse codes that are different ones within a level of a
sound (mean over levels, after the prompt only, where there is one): a stage that is stuck has few, noise has many.  Shorter
sounds have more of them, so the originals' own stand beside it, whole and after the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from audiolm import rng, store
from audiolm.data.clips import Clip
from audiolm.eval.ladder import continued, prompt_samples, saved, slug
from audiolm.eval.metrics.audio_quality import mel_distance
from audiolm.eval.results import Progress, Result, bootstrap_interval, no_progress
from audiolm.eval.suites.base import ladder_clips, load_audiolm
from audiolm.generate.audiolm import AudioLM, Sound
from audiolm.tokenizers.base import ACOUSTIC_HOP

if TYPE_CHECKING:
    from audiolm.eval.suites.base import SuiteContext

TEMPERATURES = (0.4, 0.6, 0.8, 1.0)
TABLE = "temperatures"


def sweep(lm: AudioLM, clips: Sequence[tuple[Clip, np.ndarray]], prompt_s: float, folder: str, seed: int = 0,
          temperatures: Sequence[float] = TEMPERATURES, progress: Progress = no_progress) -> tuple[list[Result], list[dict[str, Any]]]:
    """Rows, and as eval.ladder gives them [{"rung", "mel", "files"}] with the wavs under {folder}/wav/; the same seeds at each
    temperature. `clips` as eval.ladder.held_out gives them, within the trained crops."""
    wavs, names = [wav for _, wav in clips], [clip.id for clip, _ in clips]
    seeds, q = [rng.derive(seed, "sweep", i) for i in range(len(wavs))], lm.stage("coarse").levels[1]
    zs, prompts, whole = lm.tokenize(wavs), [prompt_samples(w, prompt_s) for w in wavs], [0] * len(wavs)
    rows, rungs = [], []

    def tell(item: str, role: str, sounds: Sequence[Sound], skip: Sequence[int], began: float) -> None:
        took = time.monotonic() - began
        mel = [mel_distance(w[k:], s.wav_T[k:]) for w, s, k in zip(wavs, sounds, skip, strict=True)]
        share = [100 * distinct(s.codes_TQ[k // ACOUSTIC_HOP:, :q]) for s, k in zip(sounds, skip, strict=True)]
        rows.extend(Result(TABLE, item, metric, *bootstrap_interval(values, names, seed), len(names), "clips", role, seconds=took)
                    for metric, values in (("mel distance, nats", mel), ("distinct codes, %", share)))
        if skip is whole or role == "ours":
            files = saved(folder, f"t-{slug(item)}", clips, [s.wav_T for s in sounds])
            rungs.append({"rung": item, "mel": float(np.mean(mel)), "files": files})

    began, originals = time.monotonic(), lm.resynthesis(wavs)
    tell("originals through the codec", "ceiling", originals, whole, began)
    tell("originals through the codec, after the prompt", "ceiling", originals, prompts, began)
    modes = {"acoustic generation": whole, "continuation": prompts}
    jobs = [(mode, temperature) for mode in modes for temperature in temperatures]
    for n, (mode, temperature) in enumerate(jobs, 1):
        began = time.monotonic()
        own = replace(lm, sampling={name: replace(params, temperature=temperature) for name, params in lm.sampling.items()})
        if mode == "continuation":
            made = continued(own, wavs, prompts, seeds)
        else:
            made = own.acoustic(zs, seeds, [len(w) for w in wavs])
        tell(f"{mode}, T {temperature:g}", "ours", made, modes[mode], began)
        progress(n, len(jobs), "sounds")
    return rows, rungs


def distinct(codes_TQ: np.ndarray) -> float:
    """The share of a level's codes that are different ones, mean over levels."""
    return float(np.mean([len(np.unique(level_T)) for level_T in codes_TQ.T]) / len(codes_TQ))


def temperatures_suite(ask: SuiteContext) -> list[Result]:
    """How the sound changes with the temperature."""

    cfg = ask.config
    rows, rungs = sweep(load_audiolm(ask), ladder_clips(ask), cfg.samples.prompt_s, ask.folder, cfg.run.seed,
                        cfg.tables.temperatures, ask.out.progress)
    store.put_json(store.join(ask.folder, "sounds.json"), [
        {"group": r["rung"], "title": f["clip"], "file": f["file"], "prompt_s": None} for r in rungs for f in r["files"]])
    return rows
