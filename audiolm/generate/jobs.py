"""What a generation asks for, under which names, and what of it is done (generate.jobs makes the rest).

A sample is NAME-N.wav (16 kHz, 16-bit PCM) with its NAME-N.json (`settings`: all that the sound depends on; and how it
went) in one folder, its picture and its prompt as the model heard it below page/.  The wav comes last and whole, so a
sample whose wav is there is done.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import posixpath
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

import audiolm
from audiolm import store
from audiolm.data.audio import wav_bytes
from audiolm.data.audio_check import check_audio, error_line
from audiolm.data.sources import AUDIO
from audiolm.generate.load import load_system
from audiolm.generate.prompts import read_prompt, seed_of
from audiolm.render.plots import spectrogram
from audiolm.tokenizers import codec_files
from audiolm.tokenizers.base import SAMPLE_RATE
from audiolm.tokenizers.codec_files import appearing

if TYPE_CHECKING:
    from audiolm.generate.audiolm import AudioLM
    from audiolm.generate.params import SamplingParams

CHECK_THREADS = 16  # files looked at together


@dataclass(frozen=True)
class GenerationJob:
    """What all samples of a command share."""

    run: str
    index: str
    models: tuple[tuple[str, str], ...]  # folder by step
    mode: str
    draws: tuple[tuple[str, SamplingParams], ...]  # by stage
    seed: int
    seconds: float | None = None  # None where the prompt's length decides
    prompt_s: float | None = None  # 0: all of a file
    whole: bool = False
    long: bool = False


@dataclass(frozen=True)
class SampleJob:
    name: str  # NAME of the files
    number: int  # from 1
    prompt: str = ""  # as it was given; "" for none
    place: str = ""  # where it is read: absolute
    digest: str = ""  # of its bytes

    @property
    def file(self) -> str:
        return f"{self.name}-{self.number}"


def name_prompts(inputs: Sequence[str]) -> list[tuple[str, str]]:
    """(NAME, path as given) of files and of the audio files below folders; names that come twice get a hash of their path.

    Raises ValueError for a folder without audio.
    """
    found = {path: posixpath.splitext(name)[0].replace("/", "-") for name, path in codec_files.find_files(inputs, AUDIO)}
    often = Counter(found.values())
    return [(f"{name}-{hashlib.sha256(path.encode()).hexdigest()[:6]}" if often[name] > 1 else name, path)
            for path, name in found.items()]


def check_prompts(prompts: Sequence[tuple[str, str]], count: int) -> tuple[list[SampleJob], list[str]]:
    """`count` samples of each prompt, and a line for each that is missing or no audio."""
    def one(path: str) -> tuple[str, str]:
        try:
            return check_audio(path)[0], ""
        except Exception as e:  # noqa: BLE001  whatever a file or a place raises, the others have their turn
            return "", error_line(path, e)

    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        looked = list(pool.map(one, [path for _, path in prompts]))
    good = [(name, path, digest) for (name, path), (digest, wrong) in zip(prompts, looked, strict=True) if not wrong]
    return ([SampleJob(name, n, path, store.absolute(path), digest) for name, path, digest in good
             for n in range(1, count + 1)], [wrong for _, wrong in looked if wrong])


def sample_settings(asked: GenerationJob, sample: SampleJob) -> dict[str, Any]:
    """All that a sample's sound depends on, as its JSON has it."""
    return {"mode": asked.mode, "prompt": sample.prompt, "prompt_hash": sample.digest, "prompt_s": asked.prompt_s,
            "sample": sample.number, "seconds": asked.seconds, "seed": asked.seed, "whole": asked.whole, "long": asked.long,
            "draws": {stage: asdict(draw) for stage, draw in asked.draws}, "models": dict(asked.models)}


def sample_records(folder: str) -> dict[str, dict[str, Any]]:
    """The JSON of each sample in a folder whose wav is there, by file name without its ending."""
    there = set(store.names(folder))
    names = [name for name in sorted(n[:-5] for n in there if n.endswith(".json")) if f"{name}.wav" in there]

    def one(name: str) -> dict | None:
        try:
            found = store.get_json(store.join(folder, f"{name}.json"))
        except ValueError:
            return None
        return found if isinstance(found, dict) and "settings" in found else None

    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        return {name: found for name, found in zip(names, pool.map(one, names), strict=True) if found}


def pending_samples(asked: GenerationJob, samples: Sequence[SampleJob], folder: str, force: bool) -> list[SampleJob]:
    """The samples that are not done yet, all with `force`. Raises ValueError for a file of other settings or not ours."""
    there, made = set(store.names(folder)), sample_records(folder)
    todo = []
    for sample in samples:
        path, old = store.join(folder, f"{sample.file}.wav"), made.get(sample.file)
        if force or f"{sample.file}.wav" not in there:
            todo.append(sample)
            continue
        fix = "name another --out, or make it anew with --force"
        if old is None:
            raise ValueError(f"{path} is there and was not made by generate.py: {fix}")
        new = json.loads(json.dumps(sample_settings(asked, sample)))
        if other := [k for k in new if new[k] != old["settings"].get(k)]:
            k = other[0]
            raise ValueError(f"{path} was made with another {k} ({old['settings'].get(k)}, now {new[k]}): {fix}")
    return todo


SHOWN_S = 60.0  # of a sound, in its picture


@dataclass
class Generated:
    """A sound as it comes; `facts` is whole once all pieces came."""

    pieces: Iterable[np.ndarray]
    prompt: int  # samples of the prompt that it begins with
    facts: dict[str, Any] = field(default_factory=dict)


def run_task(asked: GenerationJob, samples: Sequence[SampleJob], folder: str, device: str) -> list[str]:
    """Makes the samples; returns a line for each prompt that failed."""
    lm = load_system(asked.models, device, asked.draws)
    prompts, wrong = {}, {}
    for sample in samples:
        if not sample.prompt or sample.prompt in prompts or sample.prompt in wrong:
            continue
        try:
            wav_T = read_prompt(sample.place, asked.prompt_s)
        except Exception as e:  # noqa: BLE001  whatever a file or a place raises, the others have their turn
            wrong[sample.prompt] = error_line(sample.prompt, e)
            continue
        prompts[sample.prompt] = wav_T
        name = store.join(folder, "page", f"{sample.name}-prompt")
        store.put(f"{name}.wav", wav_bytes(wav_T))
        store.put(f"{name}.png", spectrogram(wav_T[:round(SHOWN_S * SAMPLE_RATE)], "prompt"))
    return [*wrong.values(), *_make(lm, asked, [s for s in samples if s.prompt not in wrong], prompts, folder)]


def _make(lm: AudioLM, asked: GenerationJob, samples: Sequence[SampleJob], prompts: dict[str, np.ndarray], folder: str) -> list[str]:
    """All together; where that fails, each alone."""
    if not samples:
        return []
    try:
        for sample, made in zip(samples, _generate(lm, asked, samples, prompts), strict=True):
            _publish(folder, asked, sample, made)
        return []
    except ValueError as e:
        if len(samples) == 1:
            return [error_line(samples[0].prompt or asked.mode, e)]
    return [line for sample in samples for line in _make(lm, asked, [sample], prompts, folder)]


def _generate(lm: AudioLM, asked: GenerationJob, samples: Sequence[SampleJob], prompts: dict[str, np.ndarray]) -> list[Generated]:
    seeds = [seed_of(asked.seed, s.prompt, s.number) for s in samples]
    wavs, may_end = [prompts.get(s.prompt) for s in samples], not asked.whole
    lm.spent_s.clear()
    if asked.long:
        return [_long(lm, asked, wavs[0], seeds[0])]
    began = time.perf_counter()
    if asked.mode == "unconditional":
        sounds = lm.unconditional(asked.seconds, seeds, may_end)
    elif asked.mode == "continuation":
        sounds = lm.continuation(wavs, asked.seconds, seeds, may_end)
    elif asked.mode == "acoustic":
        sounds = lm.acoustic(lm.tokenize(wavs), seeds, [*map(len, wavs)])
    else:
        sounds = lm.resynthesis(wavs)
    n, wall_s = len(samples), time.perf_counter() - began
    spent_s = {stage: seconds / n for stage, seconds in lm.spent_s.items()}
    made = []
    for sound, wav_T in zip(sounds, wavs, strict=True):
        more_s = (len(sound.wav_T) - sound.prompt) / SAMPLE_RATE
        facts = {**_took(more_s, wall_s / n, spent_s), **_about(lm, wav_T, sound.ended)}
        if asked.mode in ("continuation", "unconditional"):  # tokens a second as stage 2 reads them
            facts["semantic_per_s"] = round((len(sound.z) - sound.z_prompt) / more_s, 3) if more_s else None
            facts["prompt_semantic_per_s"] = round(sound.z_prompt * SAMPLE_RATE / sound.prompt, 3) if sound.prompt else None
        made.append(Generated([sound.wav_T], sound.prompt, facts))
    return made


def _long(lm: AudioLM, asked: GenerationJob, prompt_T: np.ndarray | None, seed: int) -> Generated:
    """A sound that is generated while it is written."""
    from audiolm.generate.long_form import stream

    made = Generated((), 0 if prompt_T is None else len(prompt_T))

    def pieces() -> Iterable[np.ndarray]:
        began, samples = time.perf_counter(), 0
        for wav_T in stream(lm, prompt_T, asked.seconds, seed, not asked.whole):
            samples += len(wav_T)
            yield wav_T
        more = samples - made.prompt
        made.facts |= {**_took(more / SAMPLE_RATE, time.perf_counter() - began, lm.spent_s),
                       **_about(lm, prompt_T, more < round(asked.seconds * SAMPLE_RATE))}

    made.pieces = pieces()
    return made


def _took(seconds: float, wall_s: float, spent_s: dict[str, float]) -> dict[str, Any]:
    """Seconds generated, seconds it took (a sample's share of its batch), by stage, and their ratio."""
    return {"seconds": seconds, "wall_s": round(wall_s, 4), "stages_s": {k: round(v, 4) for k, v in spent_s.items()},
            "rtf": round(wall_s / seconds, 4) if seconds else None}


def _about(lm: AudioLM, prompt_T: np.ndarray | None, ended: bool) -> dict[str, Any]:
    return {"prompt_s": None if prompt_T is None else len(prompt_T) / SAMPLE_RATE, "ended": ended, "device": lm.device}


def _publish(folder: str, asked: GenerationJob, sample: SampleJob, made: Generated) -> None:
    """Writes a sample's picture, JSON and, last and whole, its wav."""
    path, shown, room = store.join(folder, f"{sample.file}.wav"), [], round(SHOWN_S * SAMPLE_RATE)
    with appearing(path) as aside:
        with soundfile.SoundFile(aside, "w", SAMPLE_RATE, 1, "PCM_16", format="WAV") as f:
            for wav_T in made.pieces:
                if not np.isfinite(wav_T).all():
                    raise ValueError("the codec decoded samples that are not finite: look at the codec step's losses")
                f.write(np.clip(wav_T, -1.0, 1.0))
                if room:
                    shown.append(wav_T[:room])
                    room -= len(shown[-1])
        picture = spectrogram(np.concatenate(shown), f"sample {sample.number}", made.prompt / SAMPLE_RATE)
        store.put(store.join(folder, "page", f"{sample.file}.png"), picture)
        store.remove(path)  # of other settings: it must not stand beside this JSON
        store.put_json(store.join(folder, f"{sample.file}.json"), {
            "settings": sample_settings(asked, sample), "run": asked.run, "index": asked.index, "name": sample.name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "audiolm": audiolm.__version__,
            **made.facts})
