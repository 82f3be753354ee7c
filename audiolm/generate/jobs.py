"""Generation into a folder: names prompts and samples, finds what is missing, makes it batch by batch.

The driver names the samples (`name_prompts`, `check_prompts`) and keeps those that are not done (`pending_samples`); tasks,
on Ray or inline, make batches of them (`run_task`).
A sample is NAME-N.wav (16 kHz, 16-bit PCM) with NAME-N.json: `settings`, all that the sound depends on, and how it went.
Its spectrogram and its prompt as the model gets it are under page/.  The wav appears last and whole, so a sample whose
wav is there is done, and a stopped command continues.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import posixpath
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import audiolm
from audiolm import store
from audiolm.data.audio import wav_bytes
from audiolm.data.audio_check import check_audio, error_line
from audiolm.data.containers.layout import ENDINGS
from audiolm.data.inputs.walk import shown_name
from audiolm.generate.load import load_system
from audiolm.generate.prompts import read_prompt, sample_seed
from audiolm.places import short_name
from audiolm.render.plots import spectrogram
from audiolm.tokenizers import codec_files
from audiolm.tokenizers.base import SAMPLE_RATE

if TYPE_CHECKING:
    from audiolm.generate.audiolm import AudioLM
    from audiolm.generate.params import SamplingParams

# a sound in pieces, samples of the prompt it begins with, facts for its record (complete once all pieces were taken)
Generated = tuple[Iterable[np.ndarray], int, dict[str, Any]]
NAME_BYTES = 200  # of a prompt's name: the file system takes 255, and -N.wav and -prompt.png are added to it
IO_THREADS = 16  # small files read together: an object store answers many requests as fast as one
PICTURE_S = 60.0  # of a sound, in its spectrogram; a longer one is unreadable and, with --long, would not fit memory


@dataclass(frozen=True)
class GenerationJob:
    """Settings that all samples of a command share."""

    run: str
    index: str
    models: tuple[tuple[str, str], ...]  # folder by step
    mode: str
    sampling: tuple[tuple[str, SamplingParams], ...]  # by stage
    seed: int
    seconds: float | None = None  # None where the prompt's length decides
    prompt_s: float | None = None  # 0: all of a file
    whole: bool = False  # EOS of stage 1 is barred
    long: bool = False
    fast: bool = False  # on a CPU a sample's bits depend on its batch


@dataclass(frozen=True)
class SampleJob:
    """One sample of a prompt, or of none."""

    name: str  # NAME of the files
    number: int  # from 1
    prompt: str = ""  # path as given; "" for none
    uri: str = ""  # the same, absolute: a worker's folder is another
    digest: str = ""  # of its bytes

    @property
    def file(self) -> str:
        return f"{self.name}-{self.number}"


# -- the driver: names, and what is missing --------------------------------------------------------------------------


def name_prompts(inputs: Sequence[str]) -> list[tuple[str, str]]:
    """(NAME, path as given) of files and of the audio files below folders; equal names get a hash of their path.

    Raises ValueError for a folder without audio.
    """
    files = codec_files.find_files(inputs, ENDINGS)
    names = {path: short_name(posixpath.splitext(name)[0].replace("/", "-"), NAME_BYTES) for name, path in files}
    count = Counter(names.values())
    return [(f"{name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}" if count[name] > 1 else name, path)
            for path, name in names.items()]


def check_prompts(prompts: Sequence[tuple[str, str]], count: int) -> tuple[list[SampleJob], list[str]]:
    """(`count` samples of each prompt, an error line for each prompt that is missing or no audio)."""
    def check(path: str) -> tuple[str, str]:
        try:
            if (shown := shown_name(path)) != path:
                raise ValueError(f"{shown}: its name is not UTF-8; rename it")
            return check_audio(path)[0], ""
        except Exception as e:  # noqa: BLE001  a bad prompt, whatever it raises, does not stop the others
            return "", error_line(shown_name(path), e)

    with ThreadPoolExecutor(IO_THREADS) as pool:
        checked = list(pool.map(check, [path for _, path in prompts]))
    samples = [SampleJob(name, n, path, store.absolute(path), digest)
               for (name, path), (digest, error) in zip(prompts, checked, strict=True) if not error
               for n in range(1, count + 1)]
    return samples, [error for _, error in checked if error]


def sample_settings(job: GenerationJob, sample: SampleJob) -> dict[str, Any]:
    """All that a sample's sound depends on, as its JSON has it."""
    return {"mode": job.mode, "prompt": sample.prompt, "prompt_hash": sample.digest, "prompt_s": job.prompt_s,
            "sample": sample.number, "seconds": job.seconds, "seed": job.seed, "whole": job.whole, "long": job.long,
            "fast": job.fast, "draws": {stage: asdict(params) for stage, params in job.sampling}, "models": dict(job.models)}


def sample_records(folder: str) -> dict[str, dict[str, Any]]:
    """JSON records of the finished samples in a folder, by file name without its ending."""
    files = set(store.names(folder))
    names = sorted(n[:-5] for n in files if n.endswith(".json") and f"{n[:-5]}.wav" in files)

    def record(name: str) -> dict | None:
        try:
            data = store.get_json(store.join(folder, f"{name}.json"))
        except ValueError:  # no JSON
            return None
        return data if isinstance(data, dict) and "settings" in data else None

    with ThreadPoolExecutor(IO_THREADS) as pool:
        return {name: data for name, data in zip(names, pool.map(record, names), strict=True) if data}


def pending_samples(job: GenerationJob, samples: Sequence[SampleJob], folder: str, force: bool) -> list[SampleJob]:
    """Samples that are not done yet, all with `force`. Raises ValueError for a wav of other settings or not ours."""
    files, records = set(store.names(folder)), sample_records(folder)
    pending = []
    for sample in samples:
        if force or f"{sample.file}.wav" not in files:
            pending.append(sample)
            continue
        path, fix = store.join(folder, f"{sample.file}.wav"), "name another --out, or make it anew with --force"
        if sample.file not in records:
            raise ValueError(f"{path} is there and was not made by generate.py: {fix}")
        old, new = records[sample.file]["settings"], json.loads(json.dumps(sample_settings(job, sample)))
        for key, value in new.items():
            if value != old.get(key):
                raise ValueError(f"{path} was made with another {key} ({old.get(key)}, now {value}): {fix}")
    return pending


# -- a task: one batch of samples ------------------------------------------------------------------------------------


def run_task(job: GenerationJob, samples: Sequence[SampleJob], folder: str, device: str) -> list[str]:
    """Makes a batch of samples into `folder`; returns an error line for each prompt that failed."""
    lm = load_system(job.models, device, job.sampling)
    lm.exact_batches(not job.fast)
    prompts: dict[str, np.ndarray] = {}
    errors: dict[str, str] = {}
    for sample in {s.prompt: s for s in samples if s.prompt}.values():  # each prompt once
        try:
            wav_T = read_prompt(sample.uri, job.prompt_s)
        except Exception as e:  # noqa: BLE001  a bad prompt, whatever it raises, does not stop the others
            errors[sample.prompt] = error_line(sample.prompt, e)
            continue
        prompts[sample.prompt] = wav_T
        name = store.join(folder, "page", f"{sample.name}-prompt")
        store.put(f"{name}.wav", wav_bytes(wav_T))
        store.put(f"{name}.png", spectrogram(wav_T[:round(PICTURE_S * SAMPLE_RATE)], "prompt"))
    good = [s for s in samples if s.prompt not in errors]
    return [*errors.values(), *_make(lm, job, good, prompts, folder)]


def _make(lm: AudioLM, job: GenerationJob, samples: Sequence[SampleJob], prompts: dict[str, np.ndarray],
          folder: str) -> list[str]:
    """Makes the samples as one batch; where that fails, each alone, so that one prompt does not stop the others."""
    if not samples:
        return []
    try:
        for sample, sound in zip(samples, _generate(lm, job, samples, prompts), strict=True):
            _publish(folder, job, sample, *sound)
        return []
    except ValueError as e:
        if len(samples) == 1:
            return [error_line(samples[0].prompt or job.mode, e)]
    return [line for sample in samples for line in _make(lm, job, [sample], prompts, folder)]


def _generate(lm: AudioLM, job: GenerationJob, samples: Sequence[SampleJob], prompts: dict[str, np.ndarray]) -> list[Generated]:
    seeds = [sample_seed(job.seed, s.prompt, s.number) for s in samples]
    wavs = [prompts.get(s.prompt) for s in samples]
    lm.spent_s.clear()
    if job.long:
        return [_stream(lm, job, wavs[0], seeds[0])]
    began = time.perf_counter()
    sounds = lm.generate(job.mode, wavs, job.seconds, seeds, may_end=not job.whole)
    wall_s, generated = time.perf_counter() - began, []
    for sound, wav_T in zip(sounds, wavs, strict=True):
        facts = _facts(lm, wav_T, sound.ended, sound.new_s, wall_s, len(samples))
        if job.mode in ("continuation", "unconditional"):  # ids a second as stage 2 reads them, and in the prompt
            facts["semantic_per_s"] = sound.semantic_per_s
            facts["prompt_semantic_per_s"] = round(sound.z_prompt * SAMPLE_RATE / sound.prompt, 3) if sound.prompt else None
        generated.append(([sound.wav_T], sound.prompt, facts))
    return generated


def _stream(lm: AudioLM, job: GenerationJob, prompt_T: np.ndarray | None, seed: int) -> Generated:
    """A sound that is generated while it is written, in constant memory."""
    from audiolm.generate.long_form import stream

    prompt, facts = 0 if prompt_T is None else len(prompt_T), {}

    def pieces() -> Iterable[np.ndarray]:
        began, new = time.perf_counter(), -prompt
        for wav_T in stream(lm, prompt_T, job.seconds, seed, not job.whole):
            new += len(wav_T)
            yield wav_T
        ended = new < round(job.seconds * SAMPLE_RATE)
        facts.update(_facts(lm, prompt_T, ended, new / SAMPLE_RATE, time.perf_counter() - began))

    return pieces(), prompt, facts


def _facts(lm: AudioLM, prompt_T: np.ndarray | None, ended: bool, seconds: float, wall_s: float,
           batch: int = 1) -> dict[str, Any]:
    """Record of how it went: seconds generated, a sample's share of its batch's wall clock by stage, real-time factor."""
    return {"seconds": seconds, "wall_s": round(wall_s / batch, 4),
            "stages_s": {stage: round(spent / batch, 4) for stage, spent in lm.spent_s.items()},
            "rtf": round(wall_s / batch / seconds, 4) if seconds else None,
            "prompt_s": None if prompt_T is None else len(prompt_T) / SAMPLE_RATE, "ended": ended, "device": lm.device}


def _publish(folder: str, job: GenerationJob, sample: SampleJob, pieces: Iterable[np.ndarray], prompt: int,
             facts: dict[str, Any]) -> None:
    """Writes a sample's spectrogram, JSON and, last and whole, its wav."""
    import soundfile

    path, picture, room = store.join(folder, f"{sample.file}.wav"), [], round(PICTURE_S * SAMPLE_RATE)
    with codec_files.appearing(path) as temporary:
        with soundfile.SoundFile(temporary, "w", SAMPLE_RATE, 1, "PCM_16", format="WAV") as f:
            for wav_T in pieces:
                f.write(np.clip(wav_T, -1.0, 1.0))
                if room:
                    picture.append(wav_T[:room])
                    room -= len(picture[-1])
        png = spectrogram(np.concatenate(picture), f"sample {sample.number}", prompt / SAMPLE_RATE)
        store.put(store.join(folder, "page", f"{sample.file}.png"), png)
        store.remove(path)  # a wav of other settings must not lie beside this JSON
        store.put_json(store.join(folder, f"{sample.file}.json"), {
            "settings": sample_settings(job, sample), "run": job.run, "index": job.index, "name": sample.name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "audiolm": audiolm.__version__,
            **facts})
