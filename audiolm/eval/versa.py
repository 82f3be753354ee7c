"""Export for VERSA (2412.17667): the sounds that the suites score, as lists and configs that its scorer reads.

    OUT/utterances/ITEM/  whole utterances beside their originals, with transcripts where there are some: as in the suite wer
    OUT/continued/ITEM/   what follows the prompt (acoustic generation: all) beside the recorded prompt: as in the suite voice
    OUT/versa.sh          the scorer's command for each list, written last

A list is wav.scp ("KEY PATH" a line), ref.scp and text ("KEY WORDS") with the same keys, score.yaml (metrics that suit the
list) and wav/KEY.wav, 16-bit PCM at 16 kHz.  Paths are relative to OUT, so that the folder may be moved.  Wavs are written
before the lists that name them.  wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from audiolm import store
from audiolm.data.audio import wav_bytes
from audiolm.eval import test_sets
from audiolm.eval.generated import Sample, of_mode
from audiolm.eval.ladder import slug
from audiolm.eval.results import Progress, no_progress
from audiolm.eval.suites import wer
from audiolm.eval.suites.base import SuiteContext, continuations, max_clip_s, samples_for
from audiolm.eval.suites.speakers import MIN_S
from audiolm.tokenizers.base import SAMPLE_RATE

UTTERANCES = {mode: wer.PLAN[mode] for mode in ("original", "resynthesis", "acoustic")}  # samples of each mode a clip
CONTINUED = dict.fromkeys(("original", "resynthesis", "acoustic", "continuation"), 1)
MARKS: dict[str, Any] = {"name": "pseudo_mos", "predictor_types": ["utmos", "dnsmos"]}  # VERSA's names, as its egs/ have them
WORDS: dict[str, Any] = {"name": "whisper_wer", "model_tag": "default", "beam_size": 1, "text_cleaner": "whisper_basic"}
VOICE: dict[str, Any] = {"name": "speaker", "model_tag": "default"}
SAME_SOUND: list[dict[str, Any]] = [{"name": name} for name in ("mcd_f0", "signal_metric", "pesq", "stoi")]
SCRIPT = """#!/bin/sh
# Scores every list with VERSA, https://github.com/wavlab-speech/versa; options as --use_gpu go on to its scorer.
# Sounds that scores.jsonl has are not scored again: remove it after a metric was added or installed.
set -eu
cd "$(dirname "$0")"
status=0
score() {
  list=$1; shift
  "${PYTHON:-python}" -m versa.bin.scorer --io soundfile --resume --pred "$list/wav.scp" \\
    --score_config "$list/score.yaml" --output_file "$list/scores.jsonl" "$@" || status=1
}
"""


@dataclass(frozen=True)
class Line:
    """A sound of a list. `reference`: the path below OUT that it is compared with; `text`: what is said."""

    key: str
    wav_T: np.ndarray
    reference: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class VersaList:
    """A list by its folder below OUT, and VERSA's config of its metrics."""

    name: str
    lines: list[Line]
    metrics: list[dict[str, Any]]


def samples_of(context: SuiteContext) -> tuple[list[Sample], list[Sample]]:
    """(utterances, continued): samples that the suites share.

    Without transcripts the utterances are the continued ones, without a text: their audio may be cut.
    """
    tables, seed = context.config.tables, context.seed
    continued = continuations(context, CONTINUED)
    try:
        clips = test_sets.with_text(context.steps["manifest"], tables.utterances, seed, most_s=max_clip_s(context))
    except ValueError:  # no held-out utterance has a text
        return [replace(s, spec=replace(s.spec, text=None)) for s in continued if s.spec.mode in UTTERANCES], continued
    return samples_for(context, "utterances", UTTERANCES, lambda: clips), continued


def versa_lists(utterances: Sequence[Sample], continued: Sequence[Sample]) -> list[VersaList]:
    """The lists, and last the recorded prompts, which have no metrics. Sounds under MIN_S are left out of `continued`."""
    lists, with_text = [], all(_one_line(s.spec.text) for s in utterances)
    for mode in UTTERANCES:
        metrics = [MARKS, *([WORDS] if with_text else []), *(SAME_SOUND if mode == "resynthesis" else []),
                   *([VOICE] if mode != "original" else [])]
        lines = [Line(key, s.wav_T, None if mode == "original" else _path("utterances/original", original),
                      _one_line(s.spec.text) if with_text else None)
                 for key, original, s in _keyed(utterances, mode)]
        lists.append(VersaList(f"utterances/{mode}", lines, metrics))
    for mode in CONTINUED:
        lines = [Line(key, s.after_T, _path("continued/prompt", original)) for key, original, s in _keyed(continued, mode)
                 if len(s.after_T) >= MIN_S * SAMPLE_RATE]
        lists.append(VersaList(f"continued/{mode}", lines, [MARKS, VOICE]))
    prompts = [Line(key, s.wav_T[:s.spec.prompt]) for key, _, s in _keyed(continued, "original")]
    return [x for x in (*lists, VersaList("continued/prompt", prompts, [])) if x.lines]


def write_lists(lists: Sequence[VersaList], out: str, progress: Progress = no_progress) -> None:
    """Writes the folder. Wavs that are there, and configs, which a user may have edited, are not written again."""
    import yaml

    done, total = 0, sum(len(x.lines) for x in lists)
    for x in lists:
        there = set(store.names(store.join(out, x.name, "wav")))
        for line in x.lines:
            if f"{line.key}.wav" not in there:
                store.put(store.join(out, _path(x.name, line.key)), wav_bytes(line.wav_T))
            progress(done := done + 1, total, "sounds")
    commands = []
    for x in (x for x in lists if x.metrics):
        tables = {"wav.scp": [_path(x.name, line.key) for line in x.lines], "ref.scp": [line.reference for line in x.lines],
                  "text": [line.text for line in x.lines]}
        options = ""
        for name, option in (("wav.scp", ""), ("ref.scp", "--gt"), ("text", "--text")):
            if None not in tables[name]:
                rows = [f"{line.key} {value}\n" for line, value in zip(x.lines, tables[name], strict=True)]
                store.put(store.join(out, x.name, name), "".join(rows).encode())
                options += f" {option} {x.name}/{name}" if option else ""
        if not store.exists(config := store.join(out, x.name, "score.yaml")):
            store.put(config, yaml.safe_dump(x.metrics, sort_keys=False).encode())
        commands.append(f'score {x.name}{options} "$@"\n')
    store.put(store.join(out, "versa.sh"), (SCRIPT + "".join(commands) + "exit $status\n").encode())


def _keyed(samples: Sequence[Sample], mode: str) -> Iterator[tuple[str, str, Sample]]:
    """(key, the key of its clip's original, sample): VERSA's keys are free of spaces, and numbers tell like names apart."""
    number = {clip: i for i, clip in enumerate(dict.fromkeys(s.spec.clip for s in samples))}
    for s in of_mode(samples, mode):
        name = f"{number[s.spec.clip]:04d}-{slug(s.spec.clip)}"
        yield f"{name}-{s.spec.number + 1}", f"{name}-1", s


def _path(name: str, key: str) -> str:
    return f"{name}/wav/{key}.wav"


def _one_line(text: str | None) -> str | None:
    return " ".join((text or "").split()) or None
