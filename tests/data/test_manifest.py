"""The manifest: what is rejected and why, cuts, joins, splits, shards, changed corpora."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from audiolm.config.base import ConfigError
from audiolm.config.corpus import ClipFilter, CorpusConfig
from audiolm.config.run import ClusterConfig
from audiolm.data import manifest as manifest_module
from audiolm.data.audio import decode, resample
from audiolm.data.clips import read_clip, read_clips
from audiolm.data.listing import changed_files
from audiolm.data.manifest import build_manifest
from audiolm.data.sources import roots
from tests.worlds.basics import ROOT

QUICKSTART = ROOT / "workflows" / "quickstart" / "flac"


def noise(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))).astype(np.float32)


def write(path: Path, wav: np.ndarray, rate: int = 16000, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, wav, rate, **more)
    return path


def folder(root, **more) -> dict:
    return {"kind": "folder", "name": "f", "root": str(root), **more}


def libri(root, name: str = "l", **more) -> dict:
    return {"kind": "librispeech", "name": name, "root": str(root), **more}


def speakers(root: Path, hours: dict[str, float], utterances: int = 2) -> Path:
    """{speaker: seconds} as SPEAKER/1/SPEAKER-1-NNNN.wav; nobody says what another one says."""
    for speaker, seconds in hours.items():
        for i in range(utterances):
            name = f"{speaker}-1-{i:04d}"
            write(root / speaker / "1" / f"{name}.wav", noise(seconds / utterances, 8000, int.from_bytes(name.encode())), 8000)
    return root


@pytest.fixture
def build(recording_out, tmp_path):
    """build(*sources, **corpus fields) -> (corpus, facts, clips), each time into a folder of its own."""
    count = iter(range(100))

    def run(*sources, seed=0, **fields):
        recording_out.path = str(tmp_path / f"manifest{next(count)}")
        corpus = CorpusConfig(name="c", sources=sources, **fields)
        facts = build_manifest({"corpus": corpus, "seed": seed, "cluster": ClusterConfig()}, {}, recording_out)
        return corpus, facts, read_clips(recording_out.path)

    run.out = recording_out
    return run


def rejected(build) -> dict[str, str]:
    return {r["uri"]: r["reason"] for r in pq.read_table(f"{build.out.path}/rejected.parquet").to_pylist()}


def test_every_kind_of_unusable_file_is_listed_with_its_reason(build, tmp_path):
    root = tmp_path / "in"
    for i in range(3):
        write(root / f"good{i}.wav", noise(1))
    write(root / "fine.opus", noise(2), format="OGG", subtype="OPUS")
    (root / "text.wav").write_bytes(b"this is not audio at all, " * 20)
    (root / "none.flac").write_bytes(b"")
    write(root / "noframes.wav", noise(0))
    write(root / "short.wav", noise(0.3))
    write(root / "silent.wav", np.zeros(16000, np.float32))
    write(root / "faint.wav", 1e-5 * noise(1), subtype="FLOAT")
    bad = noise(1)
    for name, bad[700] in (("nan", np.nan), ("inf", np.inf)):
        write(root / f"{name}.wav", bad, subtype="FLOAT")
    zero = bytearray(write(root / "zero_hz.wav", noise(1)).read_bytes())
    zero[24:28] = bytes(4)
    (root / "zero_hz.wav").write_bytes(zero)
    write(root / "slow.wav", noise(1), 300)
    formats = {"wav": {}, "flac": {}, "mp3": {"format": "MP3"}, "ogg": {"format": "OGG", "subtype": "VORBIS"},
               "opus": {"format": "OGG", "subtype": "OPUS"}}
    for kind, more in formats.items():
        path = write(root / f"cut.{kind}", noise(4), **more)
        path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    _, facts, clips = build(folder(root), max_rejected=0.9)
    assert rejected(build) == {
        "text.wav": "unreadable", "none.flac": "empty", "noframes.wav": "empty", "short.wav": "too short",
        "silent.wav": "silent", "faint.wav": "silent", "nan.wav": "non-finite", "inf.wav": "non-finite",
        "zero_hz.wav": "sample rate", "slow.wav": "sample rate", **{f"cut.{k}": "truncated" for k in formats}}
    assert sorted(c.parts[0].uri for c in clips) == ["fine.opus", "good0.wav", "good1.wav", "good2.wav"]
    assert facts["rejected"] == {"total": 15, "unreadable": 1, "empty": 2, "too short": 1, "silent": 2,
                                 "non-finite": 2, "sample rate": 2, "truncated": 5}
    assert "rejected 15 (5 truncated, 2 empty, 2 non-finite" in facts["summary"]
    with pytest.raises(ConfigError, match=r"78.9% of the files.*corpus.max_rejected \(0.05\)\n  f/cut.flac: truncated"):
        build(folder(root))
    with pytest.raises(ConfigError, match=r"no usable file: 1 of 1 .*1 silent"):
        build(folder(root, glob="silent.wav"), max_rejected=1.0)


def test_a_stream_that_never_knew_its_length_is_whole(build, tmp_path):
    """Programs that write WAV to a pipe leave 0xFFFFFFFF as its length."""
    for i in range(3):
        path = write(tmp_path / "in" / f"{i}.wav", noise(1))
        data = bytearray(path.read_bytes())
        data[4:8] = data[40:44] = b"\xff" * 4
        path.write_bytes(data)
    _, _, clips = build(folder(tmp_path / "in"))
    assert [c.frames for c in clips] == [16000] * 3


def test_mp3_without_a_length_is_taken_whole(build, tmp_path):
    """Without a Xing tag libsndfile guesses the length from the first frame, which is right at a constant rate only."""
    swell = noise(40) * np.linspace(0, 1, 40 * 16000, dtype=np.float32) ** 4
    write(tmp_path / "in" / "cbr.mp3", swell, format="MP3", bitrate_mode="CONSTANT", compression_level=0.5)
    write(tmp_path / "in" / "vbr.mp3", swell, format="MP3", bitrate_mode="VARIABLE", compression_level=0.3)
    data = (tmp_path / "in" / "cbr.mp3").read_bytes()
    (tmp_path / "in" / "cbr.mp3").write_bytes(data[data.index(data[:2], 150):])  # the tag is the first frame
    data = (tmp_path / "in" / "vbr.mp3").read_bytes()
    first = data.index(data[:2], 150)  # a frame above the mean rate, from which half the true length is guessed
    (tmp_path / "in" / "vbr.mp3").write_bytes(data[:4] + bytes(first - 4) + data[first:])
    _, _, clips = build(folder(tmp_path / "in"))
    assert sorted(c.parts[0].uri for c in clips) == ["cbr.mp3", "vbr.mp3"] and all(abs(c.seconds - 40) < 0.2 for c in clips)


def test_long_files_are_cut_at_quiet_places_and_lose_nothing(build, tmp_path):
    x = noise(23.7)
    quiet = [int(16000 * s) for s in (4.55, 9.65, 14.15, 18.75)]
    for at in quiet:
        x[at - 1600:at + 1600] *= 0.01
    path = write(tmp_path / "in" / "long.wav", x, subtype="FLOAT")
    write(tmp_path / "in" / "other.wav", noise(5))
    corpus, _, clips = build(folder(tmp_path / "in"), max_s=6.0, dev=0, test=0)
    pieces = sorted((p for c in clips for p in c.parts if p.uri == "long.wav"), key=lambda p: p.start)
    assert len(pieces) == 5 and all(p.frames <= 6 * 16000 and p.text is None for p in pieces)
    assert [a.start + a.frames for a in pieces[:-1]] == [b.start for b in pieces[1:]]
    assert (pieces[0].start, pieces[-1].start + pieces[-1].frames) == (0, len(x))
    assert all(min(abs(p.start - q) for q in quiet) <= 1600 for p in pieces[1:])
    by_start = {c.parts[0].start: read_clip(c, roots(corpus)) for c in clips if c.parts[0].uri == "long.wav"}
    np.testing.assert_array_equal(np.concatenate([by_start[p.start] for p in pieces]), decode(str(path))[0])


def test_a_silent_piece_is_dropped_but_the_file_stays_usable(build, tmp_path):
    write(tmp_path / "in" / "a.wav", np.concatenate([noise(5), np.zeros(5 * 16000, np.float32), noise(5)]))
    write(tmp_path / "in" / "b.wav", noise(3))
    _, facts, clips = build(folder(tmp_path / "in"), max_s=3.0)
    rows = pq.read_table(f"{build.out.path}/rejected.parquet").to_pylist()
    assert rows and {r["reason"] for r in rows} == {"silent"} and all(r["frames"] > 0 for r in rows)
    assert sum(c.frames for c in clips) + sum(r["frames"] for r in rows) == 18 * 16000
    assert facts["files"] == 2


def test_joined_utterances_keep_ids_offsets_and_texts(build, tmp_path):
    root, words = tmp_path / "in", {}
    for speaker in ("7", "8", "9"):
        lines = []
        for i in range(12):
            rate = 24000 if speaker == "9" else 16000
            wav = noise(1 + 0.1 * i, rate, seed=i)
            if (speaker, i) == ("7", 4):
                wav = wav * 0
            write(root / speaker / "3" / f"{speaker}-3-{i:04d}.flac", wav, rate)
            words[f"{speaker}-3-{i:04d}"] = f"WORDS {speaker} {i}"
            lines.append(f"{speaker}-3-{i:04d} WORDS {speaker} {i}\n")
        (root / speaker / "3" / f"{speaker}-3.trans.txt").write_text("".join(lines))
    corpus, facts, clips = build(libri(root), join_s=6.0)
    assert facts["parts"] == 35 and facts["rejected"] == {"total": 1, "silent": 1}
    seven = [[int(p.id[-4:]) for p in c.parts] for c in clips if c.speaker == "7"]
    assert sorted(seven) == [[0, 1, 2, 3], [5, 6, 7], [8, 9, 10], [11]]  # nothing is joined over the silent one
    for c in clips:
        assert c.seconds <= 6.0 and c.text == " ".join(words[p.id] for p in c.parts)
        assert {p.uri.split("/")[0] for p in c.parts} == {c.speaker}
        assert c.id == f"l/{c.parts[0].id}" + (f"+{len(c.parts) - 1}" if len(c.parts) > 1 else "")
        whole_T, edge = read_clip(c, roots(corpus)), 0 if c.sample_rate == 16000 else 200
        assert len(whole_T) == c.samples
        for p in c.parts:
            part_T = resample(decode(str(root / p.uri))[0], c.sample_rate, 16000)
            at = round(p.offset * 16000 / c.sample_rate)
            np.testing.assert_allclose(whole_T[at + edge:at + len(part_T) - edge], part_T[edge:len(part_T) - edge],
                                       atol=0 if edge == 0 else 0.02)
    assert all(len(c.parts) == 1 for c in build(libri(root), join_s=0)[2])


def test_rates_and_splits_are_never_mixed_in_a_clip(build, tmp_path):
    for i in range(6):
        rate = 16000 if i < 3 else 22050
        write(tmp_path / "in" / "train-a" / "1" / "1" / f"1-1-{i}.wav", noise(1, rate, i), rate)
        write(tmp_path / "in" / "dev-a" / "1" / "1" / f"1-1-{i + 6}.wav", noise(1, seed=i + 6), 16000)
    _, _, clips = build(libri(tmp_path / "in"))
    assert sorted((c.split, c.sample_rate, len(c.parts)) for c in clips) == [
        ("dev", 16000, 6), ("train", 16000, 3), ("train", 22050, 3)]


def test_quickstart_corpus_as_it_is_laid_out(build):
    corpus, facts, clips = build(libri(QUICKSTART, "quickstart"), shard_s=100)
    assert (facts["files"], facts["parts"], facts["rejected"]["total"]) == (84, 84, 0)
    assert build.out.seen[-1] == (84, 84, "files")
    by_split = {s: {c.speaker for c in clips if c.split == s} for s in ("train", "dev", "test")}
    assert by_split == {"train": {str(n) for n in range(9001, 9008)}, "dev": {"9008"}, "test": {"9009", "9010"}}
    assert abs(sum(c.seconds for c in clips) - 464.9) < 0.1 and all(c.text for c in clips)
    assert max(c.seconds for c in clips) > 25 and changed_files(build.out.path, corpus)["added"] == []


def test_split_by_speaker_is_disjoint_near_the_shares_and_drawn_from_the_seed(build, tmp_path):
    root = speakers(tmp_path / "in", {f"{n}": 2.0 + n % 4 for n in range(100, 140)})
    _, facts, clips = build(libri(root), dev=0.1, test=0.2)
    names = {s: {c.speaker for c in clips if c.split == s} for s in ("train", "dev", "test")}
    assert sum(map(len, names.values())) == 40 == len(set.union(*names.values()))
    hours = facts["hours"]["l"]
    total = sum(hours.values())
    assert abs(hours["dev"] / total - 0.1) < 0.02 and abs(hours["test"] / total - 0.2) < 0.02
    again = {s: {c.speaker for c in build(libri(root), dev=0.1, test=0.2)[2] if c.split == s} for s in names}
    other = {s: {c.speaker for c in build(libri(root), dev=0.1, test=0.2, seed=1)[2] if c.split == s} for s in names}
    assert again == names != other


def test_speakers_named_by_hold_out_are_held_out_of_a_train_folder(build, tmp_path):
    speakers(tmp_path / "in" / "train-clean-100", dict.fromkeys(map(str, range(10, 20)), 2))
    held = {(c.split, c.speaker) for c in build(libri(tmp_path / "in"), hold_out={"dev": ("11",), "test": ("12",)})[2]}
    assert held == {("dev", "11"), ("test", "12"), *(("train", str(n)) for n in (10, *range(13, 20)))}
    with pytest.raises(ConfigError, match=r"names \['9'\], who have no audio.* 10, 11"):
        build(libri(tmp_path / "in"), hold_out={"dev": ("9",)})


def test_each_source_gives_its_share_and_one_speaker_sources_stay_train(build, tmp_path):
    a = speakers(tmp_path / "a", {f"{n}": 3 for n in range(10)})
    b = speakers(tmp_path / "b", {f"{n}": 1 for n in range(20, 30)})
    alone = speakers(tmp_path / "c", {"LJ": 4})
    _, facts, clips = build(libri(a, "a"), libri(b, "b"), libri(alone, "c"), dev=0.1, test=0.1)
    assert {s: set(h) for s, h in facts["hours"].items()} == {"a": {"train", "dev", "test"},
                                                             "b": {"train", "dev", "test"}, "c": {"train"}}
    assert facts["remarks"] == ["source c: one speaker only, all of it is train"]
    path = build.out.path
    assert {c.source for c in read_clips(path, "dev", ClipFilter(source=("a", "c")))} == {"a"}
    assert len(read_clips(path, where=ClipFilter(source=("b",)))) == len([c for c in clips if c.source == "b"])


def test_a_corpus_without_dev_holds_speakers_out_and_one_without_train_says_the_fix(build, tmp_path):
    speakers(tmp_path / "in" / "train-clean-100", {f"{n}": 2 for n in range(10)})
    _, facts, clips = build(libri(tmp_path / "in"), test=0.1)
    assert {c.split for c in clips} == {"train", "dev", "test"}
    assert not {c.speaker for c in clips if c.split == "dev"} & {c.speaker for c in clips if c.split != "dev"}
    assert facts["remarks"] == ["the corpus names no dev: held out of source l by speaker: 1 as dev, 1 as test"]
    speakers(tmp_path / "in" / "test-clean", {"20": 2, "21": 2})
    assert build(libri(tmp_path / "in"))[1]["speakers"] == {"train": 9, "dev": 1, "test": 2}
    with pytest.raises(ConfigError, match=r"no train clip, only \['dev'\].*splits: \{dev-clean: train\}"):
        build(folder(tmp_path / "in", split="dev"))


def test_a_corpus_of_one_speaker_is_split_by_chapter_file_or_piece(build, tmp_path):
    for chapter in range(4):
        for i in range(3):
            write(tmp_path / "in" / "LJ" / f"{chapter}" / f"LJ-{chapter}-{i}.wav", noise(1, 8000, 3 * chapter + i), 8000)
    _, facts, clips = build(libri(tmp_path / "in"))
    assert {c.split for c in clips} == {"train", "dev", "test"} and len(clips) == 4
    assert "one speaker only: split by chapter" in facts["remarks"][0]
    write(tmp_path / "long" / "a.wav", noise(20, 8000), 8000)
    _, facts, clips = build(folder(tmp_path / "long"), max_s=4.0)
    assert {c.split for c in clips} == {"train", "dev", "test"}
    assert "split by piece" in facts["remarks"][0]


def test_shards_hold_one_split_within_shard_s_and_are_alike(build, tmp_path):
    root = speakers(tmp_path / "in", {f"{n}": 2 for n in range(60)}, utterances=1)
    _, facts, clips = build(libri(root), shard_s=20, dev=0.1, test=0.1)
    seconds: dict[int, float] = {}
    for c in clips:
        seconds[c.shard] = seconds.get(c.shard, 0) + c.seconds
        assert len({x.split for x in clips if x.shard == c.shard}) == 1
    assert list(seconds) == list(range(sum(facts["shards"].values()))) and max(seconds.values()) <= 20
    assert min(seconds.values()) >= 10
    assert [(c.shard, c.row) for c in clips] == sorted((c.shard, c.row) for c in clips)
    assert all([c.row for c in clips if c.shard == k] == list(range(sum(c.shard == k for c in clips))) for k in seconds)
    first = [int(c.speaker) for c in clips if c.shard == 0]
    assert first != sorted(first)


def test_same_bytes_whatever_the_grouping_and_after_a_resume(build, tmp_path, monkeypatch):
    root = speakers(tmp_path / "in", {f"{n}": 2 for n in range(12)})
    build(libri(root))
    names = ("clips", "rejected", "listing")
    first = {n: Path(build.out.path, f"{n}.parquet").read_bytes() for n in names}
    monkeypatch.setattr(manifest_module, "_groups", lambda found: ((i, i + 1) for i in range(len(found))))
    build(libri(root))
    assert first == {n: Path(build.out.path, f"{n}.parquet").read_bytes() for n in names}
    measured = []
    monkeypatch.setattr(manifest_module.scan, "measure", lambda *a: measured.append(a))
    corpus = CorpusConfig(name="c", sources=[libri(root)])
    build_manifest({"corpus": corpus, "seed": 0, "cluster": ClusterConfig()}, {}, build.out)
    assert measured == [] and first["clips"] == Path(build.out.path, "clips.parquet").read_bytes()


def test_user_manifest_rows_become_clips(build, tmp_path):
    x = noise(10, 22050)
    write(tmp_path / "in" / "a.wav", x, 22050, subtype="FLOAT")
    write(tmp_path / "in" / "b.mp3", noise(4), format="MP3")
    rows = [("a.wav", 0.0, 3.0, "s1", "studio", "train", "one"), ("a.wav", 3.0, 7.05, "s1", "studio", "train", "two"),
            ("b.mp3", 1.0, None, "s2", None, "dev", None), ("a.wav", 9.0, 5.0, "s1", "studio", None, None),
            ("gone.wav", 0.0, 1.0, "s3", None, None, None)]
    columns = ("uri", "start", "duration", "speaker", "source", "split", "text")
    table = pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows])
    pq.write_table(table, tmp_path / "in" / "m.parquet")
    source = {"kind": "manifest", "name": "mine", "uri": str(tmp_path / "in" / "m.parquet")}
    corpus, _, clips = build(source, max_rejected=0.5)
    got = {(c.parts[0].uri, c.parts[0].start): c for c in clips}
    assert set(got) == {("a.wav", 0), ("a.wav", 66150), ("b.mp3", 16000)}
    assert {r["detail"] for r in pq.read_table(f"{build.out.path}/rejected.parquet").to_pylist()} == {
        "9.0 s + 5.0 s of 10.00 s", "no such file"}
    two = got["a.wav", 66150]  # 0.05 s beyond the end is rounding
    assert (two.text, two.source, two.origin, two.frames) == ("two", "studio", "mine", 220500 - 66150)
    np.testing.assert_array_equal(read_clip(two, roots(corpus)), resample(x[66150:], 22050, 16000))
    assert got["b.mp3", 16000].frames == 48000


def test_changed_corpus_is_noticed_and_a_copy_with_new_dates_is_not(build, tmp_path, monkeypatch):
    monkeypatch.setattr("audiolm.data.listing.GROUP", 2)
    root = speakers(tmp_path / "in", {f"{n}": 2 for n in range(4)})
    (root / "1" / "1" / "1-1.trans.txt").write_text("1-1-0000 A\n")
    corpus, facts, _ = build(libri(root))
    path, same = build.out.path, {"added": [], "removed": [], "modified": []}
    shutil.copytree(root, tmp_path / "copy")
    for file in (tmp_path / "copy").rglob("*.*"):
        os.utime(file, (1, 1))
    copy = CorpusConfig(name="c", sources=[libri(tmp_path / "copy")])
    assert changed_files(path, corpus) == same == changed_files(path, copy)
    assert build(libri(tmp_path / "copy"))[1]["listing"] == facts["listing"]
    write(root / "1" / "1" / "1-1-0000.wav", noise(1, 8000, seed=5), 8000)  # other sound, same size
    os.utime(root / "1" / "1" / "1-1-0000.wav", (5, 5))
    (root / "1" / "1" / "1-1.trans.txt").write_text("1-1-0000 ANOTHER\n")
    (root / "2" / "1" / "2-1-0001.wav").unlink()
    write(root / "9" / "1" / "9-1-0000.wav", noise(1))
    assert changed_files(path, corpus) == {"added": ["l/9/1/9-1-0000.wav"], "removed": ["l/2/1/2-1-0001.wav"],
                                           "modified": ["l/1/1/1-1-0000.wav", "l/1/1/1-1.trans.txt"]}


def test_other_sample_rates_are_refused(build, tmp_path):
    with pytest.raises(ConfigError, match="corpus.sample_rate is 24000"):
        build(folder(tmp_path), sample_rate=24000)
