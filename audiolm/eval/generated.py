"""Samples: the audio that the suites score, generated once for all of them.

`plan_samples` lists them (clip, mode, number); `make_samples` reads them from the cache or generates them in batches.  A sample
is `{folder}/{key}.wav` (16-bit PCM, read back even when just made).  Its key hashes the models' folders, the sampling
parameters, the seed and the clip's audio, so suites and checkpoints do not collide.  wav_T: float32 mono at 16 kHz.
Modes: original; resynthesis by the codec; levels, by its coarse levels alone; fine, by stage 3 from the true coarse codes;
acoustic, from true semantic tokens; shuffled, the same from tokens in random order (a floor); continuation of the first
prompt_s seconds to the clip's own length.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from audiolm import rng, store
from audiolm.dag.run_index import GENERATION_STEPS
from audiolm.data.audio import wav_bytes
from audiolm.data.clips import Clip
from audiolm.data.tokens import run_starts
from audiolm.eval.ladder import continued, decoded, prompt_samples
from audiolm.generate.audiolm import AudioLM
from audiolm.generate.load import load_system
from audiolm.generate.params import PAPER_PARAMS, SamplingParams
from audiolm.tokenizers.artifact import identities

MODES = ("original", "resynthesis", "levels", "fine", "acoustic", "shuffled", "continuation")
LABELS = {"original": "original", "resynthesis": "codec resynthesis", "levels": "codec resynthesis, coarse levels",
          "fine": "fine from true coarse", "acoustic": "acoustic generation",
          "shuffled": "acoustic generation, shuffled tokens", "continuation": "continuation"}  # in tables

Clips = Sequence[tuple[Clip, np.ndarray]]  # (clip, wav_T)
Params = Mapping[str, SamplingParams]  # by stage


@dataclass(frozen=True)
class SampleSpec:
    """A sample to make of a clip, the `number`th of its mode. The first `prompt` audio samples of the clip are the prompt."""

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
    """A sample's audio; `after_T` is the part that follows the prompt. Acoustic generation has no prompt."""

    spec: SampleSpec
    wav_T: np.ndarray

    @property
    def after_T(self) -> np.ndarray:
        return self.wav_T[0 if self.spec.mode in ("acoustic", "shuffled") else self.spec.prompt:]


def plan_samples(clips: Clips, modes: Mapping[str, int], prompt_s: float = 3.0) -> list[SampleSpec]:
    """Specs of so many samples of each mode for each clip. A clip shorter than twice prompt_s gives half of itself as prompt.

    Raises ValueError for an unknown mode and a clip given twice."""
    if unknown := sorted(set(modes) - set(MODES)):
        raise ValueError(f"modes {unknown}: choose from {', '.join(MODES)}")
    if len({clip.id for clip, _ in clips}) < len(clips):
        raise ValueError("a clip is given twice: give each once, with more samples of a mode")
    prompts = [prompt_samples(wav, prompt_s) for _, wav in clips]
    return [SampleSpec(clip.id, clip.speaker, clip.text, mode, i, prompt) for mode in MODES for (clip, _), prompt
            in zip(clips, prompts, strict=True) for i in range(modes.get(mode, 0))]


def longest_s(paths: Mapping[str, str]) -> float:
    """The longest clip, in seconds, that the stages at `paths` can generate; read from their exports, without loading them."""
    exports = [store.get_json(store.join(paths[step], "export", "config.json")) for step in ("lm_semantic", "lm_coarse")
               if step in paths]  # a parallel decoder draws sounds of any length
    return min(about["stage"]["crop_s"] for about in exports)


def make_samples(paths: Mapping[str, str], clips: Clips, specs: Sequence[SampleSpec], folder: str, seed: int = 0,
                 device: str = "cpu", draws: Params | None = None, batch: int = 16) -> list[Sample]:
    """The samples in order. `paths`: the folders of the run's steps; `folder`: the cache, any store.

    Raises ValueError beyond the stages' trained crops and for samples of clips that are not given."""
    wavs = {clip.id: wav for clip, wav in clips}
    if foreign := sorted({s.clip for s in specs} - wavs.keys()):
        raise ValueError(f"sounds of {foreign[0]} are wanted, whose audio is not among the {len(wavs)} clips: give it")
    for missing in missing_batches(paths, clips, specs, folder, seed, draws, batch):
        make_sample_batch(dict(paths), *missing, folder, seed, device, draws)
    name = _file_names(paths, wavs, seed, draws)
    return [Sample(s, wavs[s.clip] if s.mode == "original" else _read(store.join(folder, name(s)))) for s in specs]


def missing_batches(paths: Mapping[str, str], clips: Clips, specs: Sequence[SampleSpec], folder: str, seed: int = 0,
                    draws: Params | None = None, batch: int = 16) -> list[tuple[list[SampleSpec], list[np.ndarray]]]:
    """Samples that the cache lacks, as batches of one mode and like lengths: (specs, each one's clip wav_T)."""
    wavs = {clip.id: wav for clip, wav in clips}
    name, cached = _file_names(paths, wavs, seed, draws), set(store.names(folder))
    batches = []
    for mode in MODES[1:]:
        missing = sorted((s for s in specs if s.mode == mode and name(s) not in cached), key=lambda s: len(wavs[s.clip]))
        for chunk in (missing[i:i + batch] for i in range(0, len(missing), batch)):
            batches.append((chunk, [wavs[s.clip] for s in chunk]))
    return batches


def make_sample_batch(paths: Mapping[str, str], specs: Sequence[SampleSpec], wavs: Sequence[np.ndarray], folder: str, seed: int,
                      device: str, draws: Params | None = None) -> None:
    """One task: generates a batch of one mode and writes it to the cache."""
    steps = {name: paths[name] for name in GENERATION_STEPS if name in paths}
    lm = load_system(tuple(steps.items()), device, tuple(draws.items()) if draws else None)
    name = _file_names(paths, dict(zip((s.clip for s in specs), wavs, strict=True)), seed, draws)
    # A seed of its own for each sample: batches may be cut anywhere.
    seeds = [rng.derive(seed, f"{s.mode} {s.clip}", s.number) for s in specs]
    for spec, wav_T in zip(specs, _generate(lm, specs, wavs, seeds), strict=True):
        store.put(store.join(folder, name(spec)), wav_bytes(wav_T))


def _generate(lm: AudioLM, specs: Sequence[SampleSpec], wavs: Sequence[np.ndarray], seeds: Sequence[int]) -> list[np.ndarray]:
    mode = specs[0].mode
    if mode == "continuation":
        return [sound.wav_T for sound in continued(lm, wavs, [s.prompt for s in specs], seeds)]
    if mode in ("resynthesis", "levels", "fine"):
        codes = lm.encode(wavs)
        if mode != "resynthesis":
            codes = [codes_TQ[:, :lm.stage("coarse").levels[1]] for codes_TQ in codes]
        return decoded(lm, lm.fine(codes, seeds) if mode == "fine" else codes, wavs)
    semantic = lm.tokenize(wavs)
    if mode == "shuffled":
        semantic = [shuffled(z_T, s) for z_T, s in zip(semantic, seeds, strict=True)]
    return [sound.wav_T for sound in lm.acoustic(semantic, seeds)]


def white_noise(wav_T: np.ndarray, seed: int, clip: str) -> np.ndarray:
    """Noise of the length and root mean square of a clip's audio, float64: a floor."""
    return np.sqrt(np.square(wav_T).mean()) * rng.generator(seed, f"white noise {clip}").standard_normal(len(wav_T))


def by_item(samples: Sequence[Sample], roles: Mapping[str, str]) -> dict[str, tuple[str, list[Sample]]]:
    """{label in tables: (role, samples)} for each mode of `roles`."""
    return {LABELS[mode]: (role, of_mode(samples, mode)) for mode, role in roles.items()}


def of_mode(samples: Sequence[Sample], mode: str) -> list[Sample]:
    return [s for s in samples if s.spec.mode == mode]


def as_floor(samples: Sequence[Sample], change: Callable[[np.ndarray, str], np.ndarray]) -> list[Sample]:
    """Originals' audio after the prompt, changed by (wav_T, clip id) into a floor of a metric."""
    return [Sample(replace(s.spec, prompt=0), change(s.after_T, s.spec.clip)) for s in of_mode(samples, "original")]


def shuffled(z_T: np.ndarray, seed: int) -> np.ndarray:
    """The same tokens in random order; runs of one token stay whole, so that each lasts as long as before."""
    runs = np.split(z_T, np.flatnonzero(run_starts(z_T))[1:])
    return np.concatenate([runs[i] for i in rng.generator(seed, "shuffled tokens").permutation(len(runs))])


def _file_names(paths: Mapping[str, str], wavs: Mapping[str, np.ndarray], seed: int,
                draws: Params | None) -> Callable[[SampleSpec], str]:
    """spec -> its file's name. A resynthesis depends on the codec alone; samples of a clip share a hash of its audio."""
    audio = {clip: hashlib.blake2b(np.ascontiguousarray(wav, np.float32).tobytes(), digest_size=16).hexdigest()
             for clip, wav in wavs.items()}
    params = {stage: asdict(draw) for stage, draw in {**PAPER_PARAMS, **(draws or {})}.items()}
    models_of = identities({m: paths[m] for m in GENERATION_STEPS if m in paths})

    def name(spec: SampleSpec) -> str:
        models = {"resynthesis": ("codec",), "continuation": GENERATION_STEPS}.get(
            spec.mode, tuple(m for m in GENERATION_STEPS if m != "lm_semantic"))
        depends = [{m: models_of[m] for m in models if m in models_of}, spec.mode, audio[spec.clip]]
        if spec.mode != "resynthesis":
            depends += [params, seed, spec.clip, spec.number, spec.prompt if spec.mode == "continuation" else 0]
        return hashlib.blake2b(json.dumps(depends, sort_keys=True).encode(), digest_size=16).hexdigest() + ".wav"

    return name


def _read(path: str) -> np.ndarray:
    import soundfile

    return soundfile.read(io.BytesIO(store.get(path)), dtype="float32")[0]
