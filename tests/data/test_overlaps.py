"""No held-out audio is trained on: overlapping rows, doubled rows, links, copies, second names; and what is said of them."""

from __future__ import annotations

import os
import shutil
from hashlib import sha256
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from audiolm.config.base import ConfigError
from audiolm.config.corpus import CorpusConfig
from audiolm.config.run import ClusterConfig
from audiolm.data.clips import Clip, read_clips
from audiolm.data.manifest import build_manifest
from audiolm.data.sources import roots

RATE = 8000


def write(path: Path, seconds: float, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32), RATE)
    return path


def people(root: Path, n: int = 8, files: int = 2) -> Path:
    for i in range(n):
        for j in range(files):
            write(root / f"p{i}" / f"{j}.wav", 2, 100 * i + j)
    return root


def folder(root: Path, name: str = "f", **more) -> dict:
    return {"kind": "folder", "name": name, "root": str(root), "speaker": "parent", **more}


def table(root: Path, rows: list[dict], name: str = "m") -> dict:
    pq.write_table(pa.Table.from_pylist(rows), root / f"{name}.parquet")
    return {"kind": "manifest", "name": name, "uri": str(root / f"{name}.parquet"), "root": str(root)}


@pytest.fixture
def build(recording_out):
    """build(*sources, **corpus fields) -> (clips, remarks as one text), after a look for audio that is in two splits."""
    def run(*sources, leaks=False, **fields):
        shutil.rmtree(recording_out.path, ignore_errors=True)
        corpus = CorpusConfig(name="c", sources=sources, **fields)
        facts = build_manifest({"corpus": corpus, "seed": 0, "cluster": ClusterConfig()}, {}, recording_out)
        clips = read_clips(recording_out.path)
        assert bool(shared(clips, roots(corpus))) == leaks
        return clips, "\n".join(facts["remarks"])

    return run


def shared(clips: list[Clip], folders: dict[str, str]) -> list[tuple]:
    """Pairs of stretches with the same audio in different splits, by the files' bytes."""
    parts = [(sha256(Path(folders[c.origin], p.uri).read_bytes()).digest(), p.start, p.start + p.frames, c.split)
             for c in clips for p in c.parts]
    return [(a, b) for a, b in combinations(parts, 2) if a[0] == b[0] and a[3] != b[3] and
            min(a[2], b[2]) - max(a[1], b[1]) > 0.01 * RATE]


def splits(clips: list[Clip]) -> dict[str, str]:
    return {f"{c.origin}/{p.uri}@{p.start // RATE}": c.split for c in clips for p in c.parts}


def test_rows_of_one_recording_that_overlap_share_the_split_that_is_held_out(build, tmp_path):
    people(tmp_path)
    write(tmp_path / "l" / "long.wav", 40, 1)
    long = [(0, 10, "train"), (5, 10, "dev"), (12, 8, "train"), (20, 10, "train"), (30, 5, "test"), (34, 6, "dev")]
    rows = [{"uri": "l/long.wav", "start": a, "duration": n, "split": s} for a, n, s in long]
    rows += [{"uri": f"p{i}/0.wav", "start": None, "duration": None, "split": "train"} for i in range(8)]
    clips, said = build(table(tmp_path, [{**r, "speaker": f"s{i}"} for i, r in enumerate(rows)]))
    found = {k: v for k, v in splits(clips).items() if "long" in k}
    assert found == {"m/l/long.wav@0": "dev", "m/l/long.wav@5": "dev", "m/l/long.wav@12": "dev", "m/l/long.wav@20": "train",
                     "m/l/long.wav@30": "test", "m/l/long.wav@34": "test"}
    assert "3 pieces are the same audio as others" in said and "m/l/long.wav at 0.00 s" in said


def test_a_stretch_within_the_whole_file_is_not_held_out_of_it(build, tmp_path):
    people(tmp_path)
    rows = [{"uri": f"p{i}/0.wav", "start": 0.0, "duration": None, "speaker": f"p{i}"} for i in range(8)]
    rows += [{"uri": f"p{i}/0.wav", "start": 0.5, "duration": 1.0, "speaker": f"excerpt {i}"} for i in range(8)]
    clips, _ = build(table(tmp_path, rows))
    assert {c.split for c in clips} == {"train", "dev", "test"}


def test_windows_that_slide_over_one_file_are_drawn_as_far_as_they_are_apart(build, tmp_path):
    write(tmp_path / "l.wav", 60, 1)
    rows = [{"uri": "l.wav", "start": float(a), "duration": 2.0} for a in (*range(0, 8), *range(20, 28), *range(40, 48))]
    clips, said = build(table(tmp_path, rows))
    assert {c.split for c in clips} == {"train", "dev", "test"} and "split by piece" in said
    clips, said = build(table(tmp_path, [{**r, "start": r["start"] / 2} for r in rows[:8]]))
    assert {c.split for c in clips} == {"train"} and "no dev clip" in said  # one piece, from end to end


def test_neighbours_and_rounded_times_do_not_overlap(build, tmp_path):
    write(tmp_path / "l.wav", 40, 1)
    rows = [{"uri": "l.wav", "start": float(a), "duration": 2.005} for a in range(0, 40, 2)]
    clips, said = build(table(tmp_path, rows))
    assert {c.split for c in clips} == {"train", "dev", "test"} and "same audio" not in said


def test_doubled_rows_are_said(build, tmp_path):
    people(tmp_path)
    rows = [{"uri": f"p{i % 8}/0.wav", "start": 0.0, "duration": 1.0} for i in range(10)]
    clips, said = build(table(tmp_path, rows))
    assert len(clips) == 10 and "2 pieces are there more than once" in said and "m/p0/0.wav at 0.00 s" in said
    assert "more than once" not in build(table(tmp_path, rows[:8]))[1]


@pytest.mark.parametrize("twice", [shutil.copy, os.link, lambda a, b: os.symlink(a, b), lambda a, b: os.symlink(a, b)])
def test_a_file_under_another_speaker_or_name_shares_the_split(twice, build, tmp_path):
    """By copy and by link: under a second speaker the two are one; among many of them none is held out of another."""
    people(tmp_path / "in", n=12)
    for i in range(6):  # every other speaker's first file has a second name below a speaker's folder of its own
        target = tmp_path / "in" / f"alias{i}" / "other name.wav"
        target.parent.mkdir()
        twice(tmp_path / "in" / f"p{2 * i}" / "0.wav", target)
    clips, said = build(folder(tmp_path / "in"), dev=0.2, test=0.2)
    assert {c.split for c in clips} == {"train", "dev", "test"} and "6 pieces are there more than once" in said
    held = {c.speaker: c.split for c in clips}
    assert all(held[f"alias{i}"] == held[f"p{2 * i}"] for i in range(6))


def test_the_same_recording_in_two_sources_keeps_the_test_set_whole(build, tmp_path):
    a, b = people(tmp_path / "a"), tmp_path / "b"
    for i in (2, 5):
        (b / f"q{i}").mkdir(parents=True)
        shutil.copy(a / f"p{i}" / "1.wav", b / f"q{i}" / "x.wav")
    clips, said = build(folder(a, "a"), folder(b, "b", split="test"))
    found = splits(clips)
    assert found["a/p2/1.wav@0"] == found["a/p5/1.wav@0"] == found["b/q2/x.wav@0"] == "test"
    assert sum(s == "test" for s in found.values()) >= 4 and "take their split" in said
    assert {"train", "dev"} <= set(found.values())


def test_a_jingle_in_every_folder_holds_nobody_out(build, tmp_path):
    people(tmp_path / "in", n=10)
    for i in range(10):
        write(tmp_path / "in" / f"p{i}" / "jingle.wav", 1, 7)
    clips, said = build(folder(tmp_path / "in"))
    found = splits(clips)
    assert {s for k, s in found.items() if "jingle" in k} == {"train"} and "9 pieces are there more than once" in said
    assert {s for k, s in found.items() if "jingle" not in k} == {"train", "dev", "test"}


def test_a_corpus_of_one_recording_in_many_files_says_so_loudly(build, tmp_path):
    for i in range(6):
        write(tmp_path / "in" / f"p{i}" / "a.wav", 1, 7)
    clips, said = build(folder(tmp_path / "in"), leaks=True)
    assert {"train", "dev"} <= {c.split for c in clips} and "TRAINED ON AND HELD OUT" in said


def test_names_that_differ_in_case_or_spaces_are_one_speaker(build, tmp_path):
    root = tmp_path / "in"
    people(root, n=10)
    for i in range(10):
        write(root / f"P{i} " / "0.wav", 2, 1000 + i)
    clips, _ = build(folder(root), dev=0.2, test=0.2)
    found = {c.speaker: c.split for c in clips}
    assert len(found) == 20 and all(found[f"p{i}"] == found[f"P{i} "] for i in range(10)) and len(set(found.values())) == 3
    clips, _ = build(folder(root), hold_out={"dev": ("P3",), "test": (" p4",)})
    found = {c.speaker: c.split for c in clips}
    assert (found["p3"], found["P3 "], found["p4"], found["P4 "]) == ("dev", "dev", "test", "test")
    with pytest.raises(ConfigError, match="hold_out names .'nobody'., who have no audio"):
        build(folder(root), hold_out={"dev": ("nobody", "p3")})


def test_one_speaker_cannot_be_held_out_as_dev_and_as_test_under_two_spellings():
    with pytest.raises(ValueError, match=r"hold_out names \['anna'\] as dev and as test"):
        CorpusConfig(name="c", sources=[folder(Path("x"))], hold_out={"dev": ("Anna",), "test": ("anna ",)})


def test_a_speaker_held_out_under_one_of_two_names_takes_the_other_along(build, tmp_path):
    """The second name has a copy of a file of the first: they are one person, of whom no other audio is trained on."""
    root = people(tmp_path / "in")
    write(root / "alias" / "own.wav", 2, 999)
    shutil.copy(root / "p1" / "0.wav", root / "alias" / "copy.wav")
    found = splits(build(folder(root), hold_out={"dev": ("p1",)})[0])
    assert {found[f"f/{n}@0"] for n in ("p1/0.wav", "p1/1.wav", "alias/copy.wav", "alias/own.wav")} == {"dev"}


def test_one_name_in_train_and_held_out_is_said(build, tmp_path):
    a, b = people(tmp_path / "a"), people(tmp_path / "b", n=3)
    for i, p in enumerate(sorted(b.rglob("*.wav"))):
        write(p, 2, 5000 + i)
    _, said = build(folder(a, "a", split="train"), folder(b, "b", split="dev"))
    assert "3 speakers' names are in train and are held out: p0, p1, p2; if they are the same people" in said
