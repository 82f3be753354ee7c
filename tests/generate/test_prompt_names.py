"""Prompts of any name: long ones get a short sample name, and one that cannot be used stops no other."""

from __future__ import annotations

import os

import numpy as np
import pytest
import soundfile as sf

from audiolm import store
from audiolm.generate.jobs import check_prompts, name_prompts

JAPANESE = "水本ゆかりです｡私､こんなかわいい服は初めて着ました…｡なんだかうれしくって､楽しいです｡歌いたくなる気分って"


@pytest.fixture
def prompts(tmp_path):
    """A folder of prompts with the given names."""
    def make(*names):
        for name in names:
            path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as f:
                sf.write(f, 0.1 * np.random.default_rng(0).standard_normal(8000), 16_000, format="WAV")
        return tmp_path
    return make


def test_names_that_barely_fit_leave_room_for_what_is_added(prompts):
    long = ["a" * 251 + ".wav", "a" * 250 + "b.wav", "b" * 220 + ".wav", JAPANESE + ".wav", "c" * 200 + ".wav",
            "s/" + "d" * 251 + ".wav"]
    folder = prompts(*long, "x.wav")
    named = name_prompts([str(folder)])
    names = {os.path.relpath(path, folder): name for name, path in named}
    assert len(set(names.values())) == len(names) == 7 and all(len(n.encode()) <= 200 for n in names.values())
    assert names["x.wav"] == "x" and names["c" * 200 + ".wav"] == "c" * 200 and names["b" * 220 + ".wav"].startswith("b" * 190)
    samples, errors = check_prompts(named, 2)
    assert len(samples) == 14 and not errors
    for sample in samples:
        store.put(f"{folder}/page/{sample.name}-prompt.png", b"x")
        store.put(f"{folder}/out/{sample.file}.wav", b"x")
    assert len(store.names(f"{folder}/out")) == 14


def test_odd_names_and_what_is_no_file_stop_no_other(prompts, tmp_path):
    good = ["::.wav", "12::30.wav", "a#1.wav", "a?b.wav", "100%41.wav", "<b>.wav", "new\nline.wav", "-n.wav", "q'uo\"te.wav",
            "X.WAV", "x.wav", "sub/x.wav", "std::vec/y.wav"]
    folder = prompts(*good, b"mod\xe0.wav", ".hidden.wav")
    os.mkfifo(folder / "pipe.wav")
    (folder / "self.wav").symlink_to("self.wav")
    (folder / "broken.wav").symlink_to("nowhere")
    (folder / "linked").symlink_to(folder / "sub")
    named = name_prompts([str(folder), str(folder / "sub/x.wav")])
    samples, errors = check_prompts([*named, ("long", f"{folder}/{'z' * 300}.wav"), ("nul", f"{folder}/a\0b.wav"),
                                     ("folder", str(folder / "sub"))], 1)
    assert sorted(os.path.relpath(s.prompt, folder) for s in samples) == sorted(good)
    text = "\n".join(errors)
    assert len(errors) == 7 and text.encode() and "mod\\xe0.wav: its name is not UTF-8" in text
    for name in ("pipe.wav", "self.wav", "broken.wav", "z" * 300, "a\0b.wav", "sub"):
        assert name in text


def test_a_file_with_the_longest_name_is_written_whole(tmp_path):
    path = f"{tmp_path}/{'n' * 255}"
    store.put(path, b"1")
    store.put(path, b"2")
    store.put(f"{tmp_path}/{'ж' * 127}", b"1", exclusive=True)
    assert store.get(path) == b"2" and len(os.listdir(tmp_path)) == 2
    with pytest.raises(OSError, match="File name too long.*" + "n" * 256):
        store.put(f"{tmp_path}/{'n' * 256}", b"1")
    assert len(os.listdir(tmp_path)) == 2
