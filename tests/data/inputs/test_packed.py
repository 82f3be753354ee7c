"""Sounds within tars, Lhotse Shar and Parquet: the clips, digests and splits of the same sounds as loose files."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from audiolm.config.corpus import CorpusConfig
from audiolm.config.run import ClusterConfig
from audiolm.data import sources
from audiolm.data.clips import Clip, read_clip, read_clips
from audiolm.data.inputs import packed
from audiolm.data.listing import changed_files, read_listing
from audiolm.data.manifest import build_manifest
from tests.bench import sources as bench
from tests.worlds.basics import ROOT, RecordingOut

FLAC = ROOT / "workflows" / "quickstart" / "flac"
NAMES = [f"{p.parts[-3]}/{p.parts[-2]}/{p.name}" for p in sorted(FLAC.glob("*/*/*/*-000[0-2].flac"))][:15]


@pytest.fixture(scope="module")
def sounds() -> dict[str, bytes]:
    """Utterances of the quickstart's speakers, by SPEAKER/CHAPTER/NAME."""
    return {name: next(FLAC.glob(f"*/{name}")).read_bytes() for name in NAMES}


@pytest.fixture(scope="module")
def loose(sounds, tmp_path_factory):
    """(clips, digests by name, the samples of each clip) of the manifest of the sounds as files."""
    root = tmp_path_factory.mktemp("loose")
    for name, data in sounds.items():
        (root / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "c" / name).write_bytes(data)
    clips, digests, wavs, _, rejected = build(root, {"kind": "folder", "root": str(root / "c"), "speaker": "grandparent"})
    assert not rejected and len(digests) == len(NAMES)
    return clips, digests, wavs


def build(tmp_path, source: dict):
    """(clips, digests by uri, samples by clip, corpus, rejected rows by uri) of a source's manifest."""
    cfg = CorpusConfig(name="c", sources=[{"name": "x", **source}], max_rejected=0.9, join_s=8.0)
    out = RecordingOut(tmp_path / "out")
    build_manifest({"corpus": cfg, "seed": 0, "cluster": ClusterConfig()}, {}, out)
    clips, roots = read_clips(out.path), sources.roots(cfg)
    digests = {uri: row["hash"] for (_, uri), row in read_listing(out.path).items()}
    assert not any(changed_files(out.path, cfg).values())
    rejected = {r["uri"]: (r["reason"], r["detail"]) for r in pq.read_table(f"{out.path}/rejected.parquet").to_pylist()}
    return clips, digests, {c.id: read_clip(c, roots) for c in clips}, cfg, rejected


def without_uris(clips: list[Clip]) -> list[Clip]:
    return [replace(c, parts=tuple(replace(p, uri="", text=None) for p in c.parts)) for c in clips]


def same(found, loose) -> None:
    clips, digests, wavs = found[:3]
    assert without_uris(clips) == without_uris(loose[0])
    uris = [(a.uri, b.uri) for c, d in zip(clips, loose[0], strict=True) for a, b in zip(c.parts, d.parts, strict=True)]
    assert [digests[a] for a, _ in uris] == [loose[1][b] for _, b in uris]
    assert all(np.array_equal(wavs[i], loose[2][i]) for i in wavs)


def tar(path: Path, members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as t:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_give_the_manifest_of_loose_files(tmp_path, sounds, loose, form):
    for k in range(3):  # not in the order of the names
        tar(tmp_path / f"d/shard-{k}.tar", dict(list(sounds.items())[::-1][k::3]), form)
    found = build(tmp_path, {"kind": "webdataset", "root": str(tmp_path / "d"), "speaker": "grandparent"})
    same(found, loose)
    assert not found[4] and found[0][0].parts[0].uri.startswith("member://")


def test_a_tar_says_speaker_split_and_text_beside_the_sound_and_is_opened_once(tmp_path, sounds, monkeypatch):
    wav = next(iter(sounds.values()))
    members = {}
    for i, (speaker, split) in enumerate((("ann", "train"), ("bob", "dev"), (7, "test"))):
        members |= {f"{i}.json": json.dumps({"spk": speaker, "split": split, "text": f"said {i}"}).encode(), f"{i}.flac": wav}
    members |= {"3.flac": wav, "3.txt": b"only text \n", "4.json": b"{", "4.flac": wav, "4.jpg": b"x", "5.wma": wav,
                "6.wav": b"junk", "7.cls": b"1", "8.flac": wav, "8.json": b'{"split": "val"}', ".x/9.flac": wav,
                "./a/long" + "g" * 200 + ".flac": wav}
    tar(tmp_path / "d/a.tar", members)
    tar(tmp_path / "d/empty.tar", {})
    (tmp_path / "d/b.tar.gz").write_bytes(gzip.compress((tmp_path / "d/a.tar").read_bytes()))
    opened = []
    real = packed.store.open_fs
    monkeypatch.setattr(packed.store, "open_fs", lambda p: opened.append(p) or real(p))
    source = {"kind": "webdataset", "root": str(tmp_path / "d"), "columns": {"speaker": "spk"}}
    clips, _, _, _, rejected = build(tmp_path, source)
    assert opened.count(f"{tmp_path}/d/a.tar") <= 3  # by the scan, for the hash, and for the size
    found = {c.parts[0].id: (c.speaker, c.split, c.text) for c in clips}
    assert found["0.flac"] == ("ann", "train", "said 0") and found["1.flac"] == ("bob", "dev", "said 1")
    assert found["2.flac"] == ("7", "test", "said 2") and found["3.flac"][2] == "only text" and found["4.flac"][2] is None
    assert len(found) == 6 and {d for _, d in rejected.values()} >= {".wma is no type that is read"}
    reasons = sorted(r for r, _ in rejected.values())
    assert reasons == ["left out", "unreadable", "unreadable", "unreadable"] and "gunzip" in rejected["b.tar.gz"][1]


@pytest.mark.parametrize(("how", "detail"), [
    ("cut in a member", "the tar is damaged or ends early"), ("cut in a header", "damaged or ends early"),
    ("no end", "no end mark"),
    ("header overwritten", "no member begins at byte"), ("joined", "follow its end"), ("gzip", "unpack it, as gunzip does"),
    ("no tar", "damaged or ends early"), ("empty", "damaged or ends early")])
def test_a_damaged_tar_is_a_rejected_row_and_what_it_holds_before_is_used(tmp_path, sounds, how, detail):
    tar(tmp_path / "d/good.tar", dict(list(sounds.items())[:6]))
    tar(path := tmp_path / "d/bad.tar", {f"b{k}": v for k, v in list(sounds.items())[6:9]})
    data = path.read_bytes()
    with tarfile.open(path) as t:
        third = t.getmembers()[2]
    path.write_bytes({
        "cut in a member": data[:third.offset_data + 999], "cut in a header": data[:third.offset + 99], "empty": b"",
        "no end": data[:third.offset], "header overwritten": data[:third.offset] + b"\1" * 512 + data[third.offset + 512:],
        "joined": data + bytes(3 << 20) + data, "gzip": gzip.compress(data), "no tar": b"<html>" * 999}[how])
    clips, _, _, _, rejected = build(tmp_path, {"kind": "webdataset", "root": str(tmp_path / "d"), "speaker": "grandparent"})
    (reason, said), = rejected.values()
    assert detail in said and reason == ("unreadable" if how == "gzip" else "truncated") and list(rejected) == ["bad.tar"]
    assert sum(len(c.parts) for c in clips) == 6 + {"gzip": 0, "no tar": 0, "empty": 0, "joined": 3}.get(how, 2)


def test_a_tar_that_changed_stops_the_run_and_its_clips_are_rejected(tmp_path, sounds):
    tar(tmp_path / "d/a.tar", sounds)
    clips, _, _, cfg, _ = build(tmp_path, {"kind": "webdataset", "root": str(tmp_path / "d"), "speaker": "grandparent"})
    tar(tmp_path / "d/a.tar", dict(list(sounds.items())[:2]))
    tar(tmp_path / "d/b.tar", sounds)
    assert changed_files(f"{tmp_path}/out", cfg) == {"added": ["x/b.tar"], "removed": [], "modified": ["x/a.tar"]}
    with pytest.raises((FileNotFoundError, ValueError)):
        for clip in clips:
            read_clip(clip, sources.roots(cfg))


def shar(folder: Path, sounds: dict[str, bytes], size: int = 6) -> None:
    """Shards as lhotse.shar.SharWriter(fields={"recording": "flac"}) writes them."""
    folder.mkdir(parents=True)
    items = list(sounds.items())
    for k in range(0, len(items), size):
        cuts, members = [], {}
        for name, data in items[k:k + size]:
            cut = name.replace("/", "-").removesuffix(".flac")
            info = sf.info(io.BytesIO(data))
            recording = {"id": cut, "sources": [{"type": "shar", "channels": [0], "source": ""}], "num_samples": info.frames,
                         "sampling_rate": info.samplerate, "duration": info.frames / info.samplerate}
            cuts.append({"id": cut, "start": 0, "duration": recording["duration"], "channel": 0, "type": "MonoCut",
                         "recording": recording, "supervisions": [
                             {"id": f"{cut}-{i}", "recording_id": cut, "start": i, "duration": 1.0, "channel": 0,
                              "text": text, "speaker": name.split("/")[0]} for i, text in ((1, "THERE"), (0, "HELLO"))]})
            members |= {f"{cut}.flac": data, f"{cut}.json": json.dumps(recording).encode()}
        number = f"{k // size:06d}"
        (folder / f"cuts.{number}.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(c) + "\n" for c in cuts).encode()))
        tar(folder / f"recording.{number}.tar", members)


def test_lhotse_shar_gives_speakers_and_texts_of_its_supervisions(tmp_path, sounds, loose):
    shar(tmp_path / "s", sounds)
    tar(tmp_path / "s/features.000000.tar", {"x.llc": b"1"})
    clips, digests, wavs, _, rejected = build(tmp_path, {"kind": "shar", "root": str(tmp_path / "s")})
    assert not rejected and {c.speaker for c in clips} == {c.speaker for c in loose[0]} and len(clips) == len(sounds)
    assert {c.text for c in clips} == {"HELLO THERE"}
    split = {c.speaker: c.split for c in loose[0]}
    assert all(c.split == split[c.speaker] for c in clips)
    assert sorted(digests[c.parts[0].uri] for c in clips) == sorted(loose[1].values())


def test_a_shar_cut_without_audio_and_audio_without_a_cut_are_rejected(tmp_path, sounds):
    shar(tmp_path / "s", sounds, size=20)
    cuts = gzip.decompress((tmp_path / "s/cuts.000000.jsonl.gz").read_bytes()).decode().splitlines()
    with tarfile.open(tmp_path / "s/recording.000000.tar") as t:
        members = {m.name: t.extractfile(m).read() for m in t.getmembers()}
    first, second, third = (json.loads(c)["id"] for c in cuts[:3])
    del members[f"{first}.flac"], members[f"{first}.json"], members[f"{second}.flac"], members[f"{second}.json"]
    tar(tmp_path / "s/recording.000000.tar", {f"{second}.nodata": b"", f"{second}.nometa": b"", **members})
    kept = [c for c in cuts if json.loads(c)["id"] != third]
    (tmp_path / "s/cuts.000000.jsonl.gz").write_bytes(gzip.compress("\n".join(kept).encode()))
    clips, _, _, _, rejected = build(tmp_path, {"kind": "shar", "root": str(tmp_path / "s")})
    assert len(clips) == len(sounds) - 3
    assert sorted(rejected.values()) == [("missing", "recording.000000.tar holds no audio of this cut"),
                                         ("missing", "the cut has no recording"),
                                         ("unreadable", f"cuts.000000.jsonl.gz has no cut {third!r}")]


@pytest.mark.parametrize(("spoil", "fault"), [
    (lambda p: p.unlink(), ("missing", "there is no cuts.000001.jsonl.gz beside it")),
    (lambda p: p.write_bytes(p.read_bytes()[:-40]), ("unreadable", "cuts.000001.jsonl.gz is damaged")),
    (lambda p: p.write_bytes(gzip.compress(b"{nope")), ("unreadable", "cuts.000001.jsonl.gz is damaged"))])
def test_a_shar_shard_without_its_cuts_is_rejected_and_the_others_are_used(tmp_path, sounds, spoil, fault):
    shar(tmp_path / "s", sounds)
    spoil(tmp_path / "s/cuts.000001.jsonl.gz")
    clips, _, _, _, rejected = build(tmp_path, {"kind": "shar", "root": str(tmp_path / "s")})
    reason, detail = rejected["recording.000001.tar"]
    assert len(clips) == len(sounds) - 6 and reason == fault[0] and detail.startswith(fault[1])


def audio_table(sounds: dict[str, bytes]) -> pa.Table:
    """As Hugging Face's datasets writes the Audio feature."""
    return pa.table({"audio": pa.array([{"bytes": data, "path": name} for name, data in sounds.items()]),
                     "speaker_id": pa.array([int(n.split("/")[0]) for n in sounds]), "text": [f"t {n}" for n in sounds]})


@pytest.mark.parametrize("folder", [False, True])
def test_parquet_with_sounds_in_its_rows(tmp_path, sounds, loose, folder):
    place = tmp_path / ("d/train" if folder else "d")
    place.mkdir(parents=True)
    items = list(sounds.items())
    for k in range(2 if folder else 1):
        part = dict(items[k::2] if folder else items)
        pq.write_table(audio_table(part), place / f"part-{k}.parquet", row_group_size=4)
    uri = place if folder else place / "part-0.parquet"
    found = build(tmp_path, {"kind": "manifest", "uri": str(uri), "columns": {"speaker": "speaker_id"}})
    clips, digests, wavs, _, rejected = found
    assert not rejected and len(clips) == len(sounds) and {c.text[:2] for c in clips} == {"t "}
    assert {c.speaker: c.split for c in clips} == {c.speaker: c.split for c in loose[0]}
    assert sorted(digests[c.parts[0].uri] for c in clips) == sorted(loose[1].values())
    one = next(c for c in loose[0] if len(c.parts) == 1)
    assert np.array_equal(wavs[one.id], loose[2][one.id])


def test_rows_without_bytes_and_a_damaged_part_are_rejected(tmp_path, sounds):
    (tmp_path / "d").mkdir()
    items = list(sounds.items())
    table = audio_table(dict(items[:4]))
    rows = table.to_pylist()
    rows[1]["audio"]["bytes"], rows[2]["audio"] = None, None
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "d/a.parquet")
    pq.write_table(audio_table(dict(items[4:8])), tmp_path / "d/b.parquet", write_page_checksum=True, compression="none")
    data = bytearray((tmp_path / "d/b.parquet").read_bytes())
    data[2000:2100] = bytes(100)
    (tmp_path / "d/b.parquet").write_bytes(data)
    clips, _, _, _, rejected = build(tmp_path, {"kind": "manifest", "uri": str(tmp_path / "d")})
    assert len(clips) == 2 and sorted(r for r, _ in rejected.values()) == ["missing", "missing", "truncated"]
    assert rejected["d/b.parquet"][1].startswith("the Parquet is damaged")


def test_tars_and_loose_files_on_s3_give_one_manifest_and_the_same_tokens(tmp_path, s3_server):
    """tests/bench/sources.py at 3 MB; it asserts that both are equal."""
    done = bench.compare(f"s3://tests/{tmp_path.name}", str(tmp_path), mb=3, tar_mb=1)
    assert len(done["tars"].shards) >= 1
