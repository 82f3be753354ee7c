"""Listening tests: a person hears pairs of sounds and says which is the recording, or which of two systems is better.

As in the paper (2209.03143 IV-F) both sounds begin with the same recorded prompt, and recordings went through the codec, so
that it does not give them away.  `prepare` writes `page/`, which a rater opens from a disk or a web server, and beside it
key.json, which `score` sets against the raters' answers.  Sides and order follow from the seed alone.
wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from audiolm import rng, store
from audiolm.data.audio import wav_bytes
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.generate.audiolm import AudioLM
from audiolm.generate.prompts import whole_frames
from audiolm.rng import derive
from audiolm.tokenizers.base import SAMPLE_RATE

RECORDING = "recording"
QUESTIONS = {"recording": "Both begin with the same seconds of a recording. Which one is the recording to its end?",
             "preference": "Both begin with the same seconds of a recording. Which one continues it better?"}


def prepare(systems: Mapping[str, AudioLM], wavs: Sequence[np.ndarray], out: str, prompt_s: float, seconds: float,
            seed: int = 0) -> str:
    """Writes the test of one system against recordings, or of two against each other; returns the page's path.

    `wavs` are held-out recordings of at least `prompt_s`; what they have behind prompt_s + seconds is not heard.
    Raises ValueError for recordings without anything behind the prompt.
    """
    from audiolm.render.html import render

    prompt, end = round(prompt_s * SAMPLE_RATE), round((prompt_s + seconds) * SAMPLE_RATE)
    wavs = [whole_frames(wav[:end]) for wav in wavs]
    if short := [i for i, wav in enumerate(wavs) if len(wav) <= prompt]:
        raise ValueError(f"recording {short[0] + 1} of {len(wavs)} has nothing behind {prompt_s:g} s: give longer ones")
    names = list(systems) if len(systems) == 2 else [RECORDING, *systems]
    made = {name: _continued(system, wavs, prompt, seed) for name, system in systems.items()}
    if RECORDING in names:
        made[RECORDING] = [sound.wav_T for sound in next(iter(systems.values())).resynthesis(wavs)]
    kind, pairs = "recording" if RECORDING in names else "preference", {}
    for place, i in enumerate(rng.generator(seed, "listening order").permutation(len(wavs)), 1):
        sides = [names[j] for j in rng.generator(seed, "listening sides", int(i)).permutation(2)]
        number = f"{place:03d}"
        pairs[number] = dict(zip("ab", sides, strict=True))
        for side, name in pairs[number].items():
            wav_T = made[name][i]
            loudness = float(np.sqrt(np.mean(wav_T**2))) or 1.0  # the louder of two sounds is preferred
            wav_T = np.clip(wav_T * 0.05 / loudness, -1, 1)
            store.put(store.join(out, "page", f"{number}-{side}.wav"), wav_bytes(wav_T))
    test = hashlib.sha256(json.dumps([kind, pairs, seed], sort_keys=True).encode()).hexdigest()[:12]
    store.put_json(store.join(out, "key.json"), {"test": test, "kind": kind, "names": names, "pairs": pairs})
    page = store.join(out, "page", "index.html")
    store.put(page, render("listening.html", title="Listening test", question=QUESTIONS[kind], pairs=sorted(pairs),
                           test=test).encode())
    return page


def _continued(system: AudioLM, wavs: Sequence[np.ndarray], prompt: int, seed: int) -> list[np.ndarray]:
    """Each recording's prompt, continued to the recording's length; prompts one by one, in constant memory."""
    made = []
    for i, wav_T in enumerate(wavs):
        seconds = (len(wav_T) - prompt) / SAMPLE_RATE
        (sound,) = system.continuation([wav_T[:prompt]], seconds, [derive(seed, "listening", i)], may_end=False)
        made.append(sound.wav_T)
    return made


def score(key: Mapping, answers: Sequence[Mapping], seed: int = 0) -> dict:
    """Shares of the answers, {"judgements", "raters", "chosen": {name: [share, low, high]}, "chance", "p"}.

    Intervals come from a bootstrap over pairs; `p` is two-sided, of so many right answers where all were guesses (binomial).
    Raises ValueError for answers to another test and for none.
    """
    chosen, groups = [], []
    for rater, given in enumerate(answers, 1):
        if given.get("test") != key["test"]:
            raise ValueError(f"the answers of rater {rater} are to the test {given.get('test')!r}, the key is of "
                             f"{key['test']!r}: give the key.json beside their page")
        for number, side in given["answers"].items():
            chosen.append(key["pairs"][number][side])
            groups.append(number)
    if not chosen:
        raise ValueError("no pair was answered: a rater's page saves the answers as one JSON file")
    shares = {name: list(bootstrap_interval([float(c == name) for c in chosen], groups, seed)) for name in key["names"]}
    return {"kind": key["kind"], "judgements": len(chosen), "raters": len(answers), "chosen": shares, "chance": 0.5,
            "p": _two_sided(sum(c == key["names"][0] for c in chosen), len(chosen))}


def _two_sided(right: int, n: int) -> float:
    """Probability that guesses are at least as far from half of n as `right`."""
    far = abs(2 * right - n)
    return min(1.0, sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= far) / 2**n)
