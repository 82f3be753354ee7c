"""The export for VERSA, read by the rules of its scorer (versa/bin/scorer.py and scorer_shared.py of its version 1.0)."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from audiolm.eval.generated import Sample, SampleSpec
from audiolm.eval.versa import versa_lists, write_lists
from tests.worlds.sounds import PROMPT, SR, talk

# What the metrics say of themselves in VERSA: (needs a reference, needs a text).
METRICS = {"pseudo_mos": (False, False), "whisper_wer": (False, True), "speaker": (True, False), "mcd_f0": (True, False),
           "signal_metric": (True, False), "pesq": (True, False), "stoi": (True, False)}
CLIPS = {"a b/c.flac/0 1": "one\n  two ", "a-b-c-flac-0-1": "three"}  # the same but for marks


def samples(modes: dict[str, int], texts: bool = True, after: int = SR) -> list[Sample]:
    """Sounds of 0.5 s of prompt and more; those of mode `original` differ from the others."""
    return [Sample(SampleSpec(clip, "p", text if texts else None, mode, n, PROMPT),
                   talk(100 + 10 * n, (PROMPT + after) / SR, 100 * i + len(mode)))
            for mode, number in modes.items() for n in range(number) for i, (clip, text) in enumerate(CLIPS.items())]


UTTERANCES = samples({"original": 1, "resynthesis": 1, "acoustic": 3})
CONTINUED = samples({"original": 1, "resynthesis": 1, "acoustic": 1, "continuation": 1})


def loaded(path: Path) -> dict[str, str]:
    """A list as `--io soundfile` and `--text` read it, and as kaldiio does."""
    table = {}
    for line in path.read_text().splitlines():
        key, value = line.strip().split(maxsplit=1)
        assert key not in table and not value.endswith("|") and not set(value) & set(":[]"), line
        table[key] = value
    return table


def options_of(out: Path, elsewhere: Path) -> list[argparse.Namespace]:
    """What versa.sh calls: the scorer's options, one call a list, also where a list fails."""
    stub = elsewhere / "python"
    stub.write_text('#!/bin/sh\necho "$PWD" "$@"\nexit 3\n')
    stub.chmod(0o755)
    done = subprocess.run(["sh", str(out / "versa.sh"), "--use_gpu"], cwd=elsewhere, capture_output=True, text=True,
                          env={"PYTHON": str(stub), "PATH": "/usr/bin:/bin"})
    assert done.returncode == 1
    parser = argparse.ArgumentParser()
    for name in ("pred", "score_config", "gt", "text", "output_file", "io"):
        parser.add_argument(f"--{name}")
    for name in ("use_gpu", "resume"):
        parser.add_argument(f"--{name}", action="store_true")
    calls = []
    for line in done.stdout.splitlines():
        where, m, module, *rest = shlex.split(line)
        assert (where, m, module) == (str(out), "-m", "versa.bin.scorer")
        calls.append(parser.parse_args(rest))
    return calls


def test_versas_scorer_can_read_every_list(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_lists(versa_lists(UTTERANCES, CONTINUED), str(out))
    (tmp_path / "out").rename(tmp_path / "moved")  # its paths are its own
    out, found = tmp_path / "moved", {}
    for call in options_of(out, tmp_path):
        name = call.pred.removesuffix("/wav.scp")
        assert call.io == "soundfile" and call.use_gpu and call.resume and call.output_file == f"{name}/scores.jsonl"
        wavs, refs, texts = (loaded(out / path) if path else None for path in (call.pred, call.gt, call.text))
        assert len(wavs) > 0 and all(table is None or table.keys() == wavs.keys() for table in (refs, texts))
        for path in (*wavs.values(), *(refs or {}).values()):
            wav_T, rate = soundfile.read(out / path)
            assert rate == SR and wav_T.ndim == 1 and len(wav_T) >= SR / 2 and wav_T.std() > 0
        config = yaml.safe_load((out / call.score_config).read_text())
        for needs_reference, needs_text in (METRICS[entry["name"]] for entry in config):
            assert (refs or not needs_reference) and (texts or not needs_text)
        found[name] = wavs, refs, texts, {entry["name"] for entry in config}
    assert set(found) == {*(f"utterances/{m}" for m in ("original", "resynthesis", "acoustic")),
                          *(f"continued/{m}" for m in ("original", "resynthesis", "acoustic", "continuation"))}
    assert [len(found[f"utterances/{m}"][0]) for m in ("original", "resynthesis", "acoustic")] == [2, 2, 6]
    assert sorted(found["utterances/acoustic"][2].values()) == ["one two"] * 3 + ["three"] * 3
    assert found["utterances/original"][1] is None and found["continued/continuation"][2] is None
    assert found["utterances/resynthesis"][3] == set(METRICS) and found["continued/original"][3] == {"pseudo_mos", "speaker"}

    def heard(path: str) -> np.ndarray:
        return soundfile.read(out / path, dtype="float32")[0]

    def sound(made: list[Sample], mode: str, clip: str, number: int = 0) -> Sample:
        return next(s for s in made if (s.spec.mode, s.spec.clip, s.spec.number) == (mode, clip, number))

    for i, clip in enumerate(CLIPS):  # each sound beside its own reference
        wavs, refs, *_ = found["utterances/acoustic"]
        for key in (k for k in wavs if k.startswith(f"000{i}-")):
            number = int(key[-1]) - 1
            np.testing.assert_allclose(heard(wavs[key]), sound(UTTERANCES, "acoustic", clip, number).wav_T, atol=1e-4)
            np.testing.assert_allclose(heard(refs[key]), sound(UTTERANCES, "original", clip).wav_T, atol=1e-4)
        wavs, refs, *_ = found["continued/continuation"]
        (key,) = (k for k in wavs if k.startswith(f"000{i}-"))
        np.testing.assert_allclose(heard(wavs[key]), sound(CONTINUED, "continuation", clip).wav_T[PROMPT:], atol=1e-4)
        np.testing.assert_allclose(heard(refs[key]), sound(CONTINUED, "original", clip).wav_T[:PROMPT], atol=1e-4)


@pytest.mark.parametrize("texts", [False, True])
def test_lists_without_all_texts_or_without_sounds(texts):
    utterances = samples({"original": 1, "resynthesis": 1}, texts)
    lists = {x.name: x for x in versa_lists(utterances, samples({"original": 1, "continuation": 1}, after=SR // 4))}
    assert set(lists) == {"utterances/original", "utterances/resynthesis", "continued/prompt"}  # 0.25 s says nothing
    names = [m["name"] for m in lists["utterances/original"].metrics]
    assert names == ["pseudo_mos", "whisper_wer"][:1 + texts] and bool(lists["utterances/original"].lines[0].text) == texts
