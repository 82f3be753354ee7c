"""workflows/generate.py on a tiny system: files, page, samples that are skipped or refused, batches inline and on Ray."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf

import audiolm
from audiolm import store
from audiolm.generate.prompts import read_prompt
from audiolm.models.lm.block import ROWS
from audiolm.models.lm.transformer import Transformer
from tests.worlds.basics import ROOT
from tests.worlds.tiny_system import CROPS_S, build, token_store, voice
from workflows import generate as command

SHORT = ("--seconds", "0.6", "--prompt-s", "0.6", "--whole", "--samples", "2")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """The index of a run of a whole tiny system."""
    return index(str(tmp_path_factory.mktemp("store")))


def index(folder: str, dedupe: bool = True) -> str:
    paths = {**build(folder, dedupe=dedupe), "semantic_tokens": token_store(folder)}
    store.put_json(f"{folder}/runs/tiny.json", {"run": "tiny", "steps": {n: {"path": p} for n, p in paths.items()}})
    return f"{folder}/runs/tiny.json"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder, with two prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for i, name in enumerate("ab"):
        sf.write(f"{name}.wav", voice(0.9, i), 16_000)
    return tmp_path


@pytest.fixture
def do(run, here, capsys):
    """Runs the command; returns (exit status, stdout, stderr)."""
    def do(*argv: str, of: str = run) -> tuple[int, str, str]:
        status = command.main(["--run", of, "--device", "cpu", *argv])
        return status, *capsys.readouterr()

    return do


def sounds(folder: str) -> dict[str, bytes]:
    return {name: store.get(f"{folder}/{name}") for name in store.names(folder) if name.endswith(".wav")}


def test_three_lines_of_python_continue_a_sound(run, here):
    lm = audiolm.load(run, "cpu")
    one, two = lm.continue_("a.wav", 0.6, samples=2, prompt_s=0.6)
    assert one.prompt == 9600 and len(one.wav_T) <= 19_200 and not np.array_equal(one.codes_TQ, two.codes_TQ)
    wav, rate = sf.read("a.wav")
    again = lm.continue_(np.stack([wav, wav], 1), 0.6, prompt_s=0.6, sample_rate=rate)[0]  # two channels
    np.testing.assert_array_equal(again.wav_T[:9600], one.wav_T[:9600])
    with pytest.raises(ValueError, match="silent"):
        lm.continue_(np.zeros(16_000), 0.6)
    with pytest.raises(ValueError, match="exceed the 2 s"):
        lm.continue_(wav, 1.5, prompt_s=0)


def test_prompts_become_files_with_a_record(do, run):
    status, stdout, stderr = do("--prompt", "a.wav", "b.wav", *SHORT, "--out", "out", "--temperature", "semantic=0.7", "fine=0")
    assert (status, stderr) == (0, "") and "4 of 4 samples to make" in stdout and "DONE" in stdout
    assert "4 files, 2.4 s of audio; median |generated - requested| 0.00 s; semantic tokens/s" in stdout
    files = [f"{name}-{i}.{ending}" for name in "ab" for i in (1, 2) for ending in ("json", "wav")]
    assert store.names("out") == [*files, "index.html", "page"]
    for name in ("a-1", "b-2"):
        wav, rate = sf.read(f"out/{name}.wav")
        record = store.get_json(f"out/{name}.json")
        assert rate == 16_000 and len(wav) == 9600 + 9600 and np.abs(wav).max() > 0
        assert record["seconds"] == record["prompt_s"] == 0.6 and record["ended"] is False and record["run"] == "tiny"
        settings = record["settings"]
        assert {s: d["temperature"] for s, d in settings["draws"].items()} == {"semantic": 0.7, "coarse": 0.8, "fine": 0}
        assert settings["prompt"] == f"{name[0]}.wav"
        assert settings["models"] == {step: entry["path"] for step, entry in store.get_json(run)["steps"].items()}
        assert set(record["stages_s"]) == {"tokenize", "semantic", "coarse", "fine", "decode"} and record["rtf"] > 0
        assert record["semantic_per_s"] > 0 and 0 < record["prompt_semantic_per_s"] <= 25
    page = store.get("out/index.html").decode()
    for path in ("a-1.wav", "page/a-1.png", "page/b-prompt.wav", "page/b-prompt.png", "b-2.json"):
        assert f'"{path}"' in page and store.exists(f"out/{path}")
    assert sf.info("out/page/a-prompt.wav").frames == 9600 and store.get("out/page/a-1.png")[:4] == b"\x89PNG"


def test_fast_leaves_the_padding_out_for_one_command(do, monkeypatch):
    rows, draw = [], Transformer.advance
    monkeypatch.setattr(Transformer, "advance", lambda self, *args: rows.append(self.rows) or draw(self, *args))
    options = ("--prompt", "a.wav", *SHORT, "--out", "out")
    for extra, expected in (("--fast",), 1), (("--force",), ROWS):
        rows.clear()
        assert do(*options, *extra)[0] == 0 and set(rows) == {expected}


def test_what_is_done_is_skipped_and_what_differs_is_refused(do, here):
    options = ("--prompt", "a.wav", *SHORT, "--out", "out")
    assert do(*options)[0] == 0
    first, stamp = sounds("out"), (here / "out/a-1.wav").stat().st_mtime_ns
    status, stdout, _ = do(*options)
    assert status == 0 and "0 of 2 samples to make" in stdout and "2 files" in stdout
    assert (here / "out/a-1.wav").stat().st_mtime_ns == stamp
    (here / "out/a-2.wav").unlink()  # as after a kill
    assert "1 of 2 samples" in do(*options)[1] and sounds("out") == first
    status, stdout, stderr = do(*options, "--seed", "1")
    assert status == 2 and "out/a-1.wav was made with another seed (0, now 1)" in stderr and "--force" in stderr
    assert sounds("out") == first
    assert do(*options, "--seed", "1", "--force")[0] == 0 and sounds("out")["a-1.wav"] != first["a-1.wav"]
    sf.write("a.wav", voice(0.9, 7), 16_000)  # the same name, another sound
    assert "another prompt_hash" in do(*options, "--seed", "1")[2]
    status, _, stderr = do("--prompt", "a.wav", *SHORT, "--out", ".")
    assert status == 0
    sf.write("mine-1.wav", voice(0.9), 16_000)
    os.rename("a.wav", "mine.wav")
    status, _, stderr = do("--prompt", "mine.wav", *SHORT, "--out", ".")
    assert status == 2 and "mine-1.wav is there and was not made by generate.py" in stderr


def test_same_seed_same_bytes_whatever_the_batch(do):
    assert do("--prompt", "a.wav", "b.wav", *SHORT, "--out", "both")[0] == 0
    assert do("--prompt", "a.wav", *SHORT, "--out", "alone", "--batch", "1")[0] == 0
    assert do("--prompt", "b.wav", *SHORT, "--out", "alone")[0] == 0
    both = sounds("both")
    assert both == sounds("alone") and len(set(both.values())) == 4


def test_bad_prompts_are_reported_and_skipped(do, here):
    t = np.arange(44_100) / 44_100
    sf.write("stereo.flac", np.stack([np.sin(700 * t), np.sin(900 * t)], 1) / 2, 44_100)
    sf.write("silent.wav", np.zeros(16_000), 16_000)
    sf.write("short.wav", voice(0.3), 16_000)
    sf.write("long.wav", voice(CROPS_S["coarse"]), 16_000)
    sf.write("nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    (here / "empty.wav").write_bytes(b"")
    (here / "text.wav").write_bytes(b"no sound " * 99)
    bad = {"silent.wav": "silent.wav: the prompt is silent (peak 0.0e+00", "short.wav": "lasts 0.30 s: give at least 0.5 s",
           "long.wav": "exceed the 2 s the coarse stage was trained on", "nan.wav": "NaN or infinite", "empty.wav": "is empty",
           "text.wav": "no audio that can be read", "gone.wav": "no such file"}
    argv = ("--prompt", "a.wav", *bad, "stereo.flac", "--prompt-s", "0", "--seconds", "0.5", "--samples", "1", "--out", "out")
    status, stdout, stderr = do(*argv)
    assert status == 1 and len(stderr.splitlines()) == len(bad)
    for name, text in bad.items():
        assert any(line.startswith("error: ") and name in line and text in line for line in stderr.splitlines()), (name, stderr)
    assert sorted(sounds("out")) == ["a-1.wav", "stereo-1.wav"] and "2 files" in stdout
    assert len(read_prompt("stereo.flac", 0)) == 16_000  # mixed down, at 16 kHz
    status, stdout, _ = do(*argv)  # those that are done stay so
    assert status == 1 and "4 of 6 samples to make" in stdout and sorted(sounds("out")) == ["a-1.wav", "stereo-1.wav"]


def test_folders_and_the_other_modes(do):
    for path in ("in/a.wav", "in/deep/a.wav", "other/a.wav"):
        store.put(path, store.get("b.wav"))
    assert do("--prompt", "in", "other/a.wav", *SHORT[:5], "--samples", "1", "--out", "out")[0] == 0
    names = sorted(sounds("out"))
    assert len(names) == 3 and "deep-a-1.wav" in names and all(n.startswith("a-") and len(n) > 8 for n in names if n[0] == "a")
    assert do("--mode", "unconditional", "--seconds", "0.5", "--samples", "3", "--whole", "--out", "new")[0] == 0
    assert {n: sf.info(f"new/{n}").frames for n in sounds("new")} == {f"unconditional-{i}.wav": 8000 for i in (1, 2, 3)}
    for mode, count in (("acoustic", 4), ("resynthesis", 1)):
        assert do("--mode", mode, "--prompt", "b.wav", "--out", mode)[0] == 0
        assert {n: sf.info(f"{mode}/{n}").frames for n in sounds(mode)} == {f"b-{i + 1}.wav": 14_080 for i in range(count)}
    assert len(set(sounds("acoustic").values())) == 4


def test_prompts_and_files_may_lie_on_s3(do, s3_server, tmp_path):
    place = f"s3://tests/{tmp_path.name}"
    for name in "ab":
        store.put(f"{place}/in/{name}.wav", store.get(f"{name}.wav"))
    options = ("--prompt", f"{place}/in", *SHORT[:5], "--samples", "1", "--out", f"{place}/out")
    assert do(*options)[0] == 0 and "0 of 2 samples" in do(*options)[1]
    assert len(set(sounds(f"{place}/out").values())) == 2 and b"a-1.wav" in store.get(f"{place}/out/index.html")


@pytest.mark.parametrize(("argv", "message"), [
    ((), "needs --prompt"), (("--mode", "unconditional", "--prompt", "a.wav"), "takes no --prompt"),
    (("--mode", "acoustic", "--prompt", "a.wav", "--seconds", "2"), "lasts as long as its prompt"),
    (("--mode", "resynthesis", "--prompt", "a.wav", "--long"), "--long goes with"),
    (("--prompt", "a.wav", "--seconds", "nan"), "--seconds nan"),
    (("--prompt", "a.wav", "--samples", "0"), "--samples 0"), (("--prompt", "a.wav", "--prompt-s", "0.1"), "--prompt-s 0.1"),
    (("--prompt", "a.wav", "--temperature", "1", "2"), "--temperature 1 2"),
    (("--prompt", "a.wav", "--top-k", "soft=1"), "--top-k soft=1"), (("--prompt", "a.wav", "--top-p", "2"), "top_p (2.0)"),
    (("--prompt", "a.wav", "--temperature", "coarse=-1"), "temperature (-1.0)")])
def test_wrong_usage(do, argv, message):
    status, _, stderr = do(*argv, "--out", "out")
    assert status == 2 and message in stderr and stderr.count("\n") == 1 and not store.exists("out")


def test_the_run_is_found_or_the_fix_is_named(do, run, tmp_path):
    options = ("--prompt", "a.wav", *SHORT, "--out", "out")
    assert do(*options, "--store", run.rsplit("/", 2)[0], of="tiny")[0] == 0
    assert "there is no run index ./outputs/runs/nope.json" in do(*options, of="nope")[2]
    assert "is not a run's index" in do(*options, of=f"{run.rsplit('/', 2)[0]}/done.json")[2]
    about = store.get_json(run)
    for step in ("lm_fine", "lm_coarse", "semantic_tokens"):
        steps = {n: e for n, e in about["steps"].items() if n != step}
        store.put_json(f"{tmp_path}/young.json", {**about, "steps": steps})
        status, _, stderr = do(*options, of=f"{tmp_path}/young.json")
        assert status == 2 and f"names no finished step {step}" in stderr and "full_pipeline.py" in stderr


def test_a_model_may_end_a_sound_before(do):
    status, stdout, _ = do("--mode", "unconditional", "--seconds", "1.5", "--samples", "6", "--out", "out")
    records = [store.get_json(f"out/unconditional-{i}.json") for i in range(1, 7)]
    assert status == 0 and any(t["ended"] for t in records) and "median |generated - requested| 0.00" not in stdout
    for i, t in enumerate(records, 1):
        assert t["seconds"] == sf.info(f"out/unconditional-{i}.wav").duration <= 1.5 and (t["ended"] or t["seconds"] == 1.5)


def test_long_form_is_for_stages_that_keep_repeats(do, tmp_path, monkeypatch):
    options = ("--prompt", "a.wav", *SHORT[2:], "--seconds", "5", "--long", "--out", "out")
    status, _, stderr = do(*options)
    assert status == 1 and "lm.lengths: false" in stderr and not sounds("out")
    monkeypatch.setitem(CROPS_S, "coarse", 4.0)  # a window has to hold more than its overlap
    status, stdout, _ = do(*options, of=index(f"{tmp_path}/free", dedupe=False))
    assert status == 0 and "2 files, 10.0 s of audio" in stdout
    assert {n: sf.info(f"out/{n}").frames for n in sounds("out")} == {"a-1.wav": 89_600, "a-2.wav": 89_600}


def test_batches_as_ray_tasks_make_the_same_files(do, run, here):
    (here / "empty.wav").write_bytes(b"")
    options = ("--prompt", "a.wav", "empty.wav", "b.wav", *SHORT)
    assert do(*options, "--out", "plain")[0] == 1
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, f"{ROOT}/workflows/generate.py", "--run", run, "--device", "cpu", *options,
                           "--batch", "1", "--ray", "--out", "ray"], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "error: empty.wav is empty" in done.stderr, (done.stdout, done.stderr)
    assert "ray: 1 node(s)" in done.stdout and "4 files" in done.stdout
    assert sounds("ray") == sounds("plain")
