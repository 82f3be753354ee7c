"""The sounds that the tables judge, made once for all of them; those who judge see only `Made`.

`plan` lists sounds (clip, mode, number), `make` reads them from the cache or generates them in batches.  A sound is
`{folder}/{key}.wav` (16-bit PCM, read back even when just made); its key hashes the models' folders, the draws, the seed and
the clip's samples, so neither suites nor checkpoints get in each other's way.  Modes: original; resynthesis by the codec; by
its coarse levels; fine (stage 3 from the true coarse codes; these two where there is a stage 3); acoustic (from true semantic
tokens, as long as stage 2 likes); shuffled (the same from tokens in random order, a floor); continuation of the first
prompt_s seconds to the clip's own length.  wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from audiolm import rng, store
from audiolm.dag.run_index import GENERATION_STEPS
from audiolm.data.audio import wav_bytes
from audiolm.data.clips import Clip
from audiolm.data.tokens import run_starts
from audiolm.eval.ladder import continued, prompt_samples
from audiolm.generate.audiolm import AudioLM
from audiolm.generate.load import load_system
from audiolm.generate.params import PAPER_PARAMS, SamplingParams

MODES = ("original", "resynthesis", "levels", "fine", "acoustic", "shuffled", "continuation")
LABELS = {"original": "original", "resynthesis": "codec resynthesis", "levels": "codec resynthesis, coarse levels",
         "fine": "fine from true coarse", "acoustic": "acoustic generation",
         "shuffled": "acoustic generation, shuffled tokens", "continuation": "continuation"}  # in tables

Clips = Sequence[tuple[Clip, np.ndarray]]
Progress = Callable[[int, int, str], None]  # (done, of, unit)


@dataclass(frozen=True)
class SampleSpec:
    """A sound of a clip; `number` tells samples of one mode apart. The first `prompt` samples of the clip are the prompt."""

    clip: str
    speaker: str
    text: str | None
    mode: str
    number: int
    prompt: int

    @property
    def id(self) -> str:
        return f"{self.clip} {self.mode} {self.number}"


@dataclass(frozen=True)
class Sample:
    """A sound; `after_T` is what follows the prompt. Acoustic generation has no prompt."""

    wanted: SampleSpec
    wav_T: np.ndarray

    @property
    def after_T(self) -> np.ndarray:
        return self.wav_T[0 if self.wanted.mode in ("acoustic", "shuffled") else self.wanted.prompt:]


def plan_samples(clips: Clips, modes: Mapping[str, int], prompt_s: float = 3.0) -> list[SampleSpec]:
    """Of each clip so many sounds of each mode. A clip that is not twice as long as prompt_s has half of itself as prompt.
    Raises ValueError for an unknown mode and a clip given twice."""
    if unknown := sorted(set(modes) - set(MODES)):
        raise ValueError(f"modes {unknown}: choose from {', '.join(MODES)}")
    if len({clip.id for clip, _ in clips}) < len(clips):
        raise ValueError("a clip is given twice: give each once, with more samples of a mode")
    prompts = [prompt_samples(wav, prompt_s) for _, wav in clips]
    return [SampleSpec(clip.id, clip.speaker, clip.text, mode, i, prompt) for mode in MODES for (clip, _), prompt
            in zip(clips, prompts, strict=True) for i in range(modes.get(mode, 0))]


def longest_s(paths: Mapping[str, str]) -> float:
    """The longest clip that the stages at `paths` can say or go on to: for the choice of clips, before anything is loaded."""
    exports = [store.get_json(store.join(paths[step], "export", "config.json")) for step in ("lm_semantic", "lm_coarse")]
    return min(about["stage"]["crop_s"] for about in exports)


def make_samples(paths: Mapping[str, str], clips: Clips, wanted: Sequence[SampleSpec], folder: str, seed: int = 0, device: str = "cpu",
         draws: Mapping[str, SamplingParams] | None = None, batch: int = 16, progress: Progress | None = None) -> list[Sample]:
    """The sounds in order. `paths`: the folders of the run's steps; `folder`: the cache, any store. Raises ValueError beyond
    the stages' trained crops and for sounds of clips that are not given."""
    wavs = {clip.id: wav for clip, wav in clips}
    if foreign := sorted({w.clip for w in wanted} - wavs.keys()):
        raise ValueError(f"sounds of {foreign[0]} are wanted, whose audio is not among the {len(wavs)} clips: give it")
    tasks = missing_batches(paths, clips, wanted, folder, seed, draws, batch)
    for done, task in enumerate(tasks):
        make_sample_batch(dict(paths), *task, folder, seed, device, draws)
        if progress:
            progress(done + 1, len(tasks), "batches of sounds")
    name = _names(paths, wavs, seed, draws)
    return [Sample(w, wavs[w.clip] if w.mode == "original" else _read(store.join(folder, name(w)))) for w in wanted]


def missing_batches(paths: Mapping[str, str], clips: Clips, wanted: Sequence[SampleSpec], folder: str, seed: int = 0,
            draws: Mapping[str, SamplingParams] | None = None, batch: int = 16) -> list[tuple[list[SampleSpec], list[np.ndarray]]]:
    """What is not in the cache, as tasks (sounds of one mode, each one's clip wav_T) for `make_batch`, wherever it runs."""
    wavs = {clip.id: wav for clip, wav in clips}
    name, there = _names(paths, wavs, seed, draws), set(store.names(folder))
    tasks = []
    for mode in MODES[1:]:
        left = sorted((w for w in wanted if w.mode == mode and name(w) not in there), key=lambda w: len(wavs[w.clip]))
        tasks += [(left[i:i + batch], [wavs[w.clip] for w in left[i:i + batch]]) for i in range(0, len(left), batch)]
    return tasks


def make_sample_batch(paths: Mapping[str, str], wanted: Sequence[SampleSpec], wavs: Sequence[np.ndarray], folder: str, seed: int,
               device: str, draws: Mapping[str, SamplingParams] | None = None) -> None:
    """One task: generates sounds of one mode and puts them into the cache."""
    steps = {name: paths[name] for name in GENERATION_STEPS if name in paths}
    lm = load_system(tuple(steps.items()), device, tuple(draws.items()) if draws else None)
    name = _names(paths, dict(zip((w.clip for w in wanted), wavs, strict=True)), seed, draws)
    seeds = [rng.derive(seed, f"{w.mode} {w.clip}", w.number) for w in wanted]
    for w, wav_T in zip(wanted, _generate(lm, wanted, wavs, seeds), strict=True):
        store.put(store.join(folder, name(w)), wav_bytes(wav_T))


def _generate(lm: AudioLM, wanted: Sequence[SampleSpec], wavs: Sequence[np.ndarray], seeds: Sequence[int]) -> list[np.ndarray]:
    mode = wanted[0].mode
    if mode in ("levels", "fine"):
        coarse = [codes_TQ[:, :lm.stage("coarse").levels[1]] for codes_TQ in lm.encode(wavs)]
        codes = lm.fine(coarse, seeds) if mode == "fine" else coarse
        return [lm.decode(codes_TQ, len(wav)) for codes_TQ, wav in zip(codes, wavs, strict=True)]
    if mode == "resynthesis":
        return [lm.decode(codes_TQ, len(wav)) for codes_TQ, wav in zip(lm.encode(wavs), wavs, strict=True)]
    if mode == "continuation":
        return [sound.wav_T for sound in continued(lm, wavs, [w.prompt for w in wanted], seeds)]
    zs = lm.tokenize(wavs)
    zs = zs if mode == "acoustic" else [shuffled(z_T, s) for z_T, s in zip(zs, seeds, strict=True)]
    return [sound.wav_T for sound in lm.acoustic(zs, seeds)]


def white_noise(wav_T: np.ndarray, seed: int, clip: str) -> np.ndarray:
    """As long and as loud as a clip's sound, float64: a floor."""
    return np.sqrt(np.square(wav_T).mean()) * rng.generator(seed, f"white noise {clip}").standard_normal(len(wav_T))


def by_item(made: Sequence[Sample], roles: Mapping[str, str], floor: str) -> dict[str, tuple[str, list[Sample]]]:
    """(role, sounds) of each mode by its name in tables, and last the originals once more, which `floor` is made of."""
    own = {LABELS[mode]: (role, [m for m in made if m.wanted.mode == mode]) for mode, role in roles.items()}
    return {**own, floor: ("floor", own[LABELS["original"]][1])}


def shuffled(z_T: np.ndarray, seed: int) -> np.ndarray:
    """The same tokens in another order; runs of one token stay whole, so that each lasts as long as before."""
    runs = np.split(z_T, np.flatnonzero(run_starts(z_T))[1:])
    return np.concatenate([runs[i] for i in rng.generator(seed, "shuffled tokens").permutation(len(runs))])


def _names(paths: Mapping[str, str], wavs: Mapping[str, np.ndarray], seed: int,
           draws: Mapping[str, SamplingParams] | None) -> Callable[[SampleSpec], str]:
    """wanted -> its file's name. The codec alone decides a resynthesis, and all samples of a clip share a hash of its audio."""
    heard = {clip: hashlib.blake2b(np.ascontiguousarray(wav, np.float32).tobytes(), digest_size=16).hexdigest()
             for clip, wav in wavs.items()}
    how = {stage: asdict(draw) for stage, draw in {**PAPER_PARAMS, **(draws or {})}.items()}

    def name(w: SampleSpec) -> str:
        needed = {"resynthesis": ("codec",), "continuation": GENERATION_STEPS}.get(
            w.mode, tuple(m for m in GENERATION_STEPS if m != "lm_semantic"))
        made_of = {m: store.absolute(paths[m]) for m in needed if m in paths}
        depends = [made_of, w.mode, heard[w.clip]]
        if w.mode != "resynthesis":
            depends += [how, seed, w.clip, w.number, w.prompt if w.mode == "continuation" else 0]
        return hashlib.blake2b(json.dumps(depends, sort_keys=True).encode(), digest_size=16).hexdigest() + ".wav"

    return name


def _read(path: str) -> np.ndarray:
    import soundfile

    return soundfile.read(io.BytesIO(store.get(path)), dtype="float32")[0]
