"""The user's table as tools leave it: a folder of Spark, CSV of a spreadsheet, JSON lines, damaged files by name."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audiolm.config.base import ConfigError
from audiolm.config.corpus import ManifestSource
from audiolm.data import sources

URIS = ["s0/a.wav", "s1/b.wav", "s2/c,d.wav", "s3/e f.wav"]


@pytest.fixture
def folder(tmp_path):
    """A folder of (empty) sounds, m/."""
    for uri in URIS:
        (tmp_path / "m" / uri).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / uri).write_bytes(b"x")
    return tmp_path / "m"


def survey(path, root, **columns) -> list[sources.Found]:
    source = ManifestSource(kind="manifest", name="mine", uri=str(path), root=str(root), columns=columns)
    return sources.survey(source)[0]


def uris(found: list[sources.Found]) -> list[str]:
    assert all(f.size == 1 and not f.fault for f in found)
    return sorted(f.uri for f in found)


def test_a_folder_as_spark_writes_it(tmp_path, folder):
    place = tmp_path / "t.parquet"
    for split, part in (("train", URIS[:2]), ("dev", URIS[2:])):
        (place / f"split={split}" / "speaker=an%20n").mkdir(parents=True)
        pq.write_table(pa.table({"uri": part}), place / f"split={split}" / "speaker=an%20n" / "part-0.snappy.parquet")
    (place / "_SUCCESS").touch()
    (place / "_metadata.parquet").write_bytes(b"x")
    (place / ".part-0.parquet.crc").write_bytes(b"x")
    found = survey(place, folder)
    assert uris(found) == URIS and {f.speaker for f in found} == {"an n"}
    assert {f.uri: f.split for f in found} == dict(zip(URIS, ["train", "train", "dev", "dev"], strict=True))
    listed = [e.uri for e in sources.listing(ManifestSource(kind="manifest", name="m", uri=str(place), root=str(folder)))]
    assert [u for u in listed if u.startswith("(")] == [f"(parquet)/t.parquet/split={s}/speaker=an%20n/part-0.snappy.parquet"
                                                         for s in ("dev", "train")]


def test_a_part_that_is_damaged_is_named(tmp_path, folder):
    (tmp_path / "t").mkdir()
    pq.write_table(pa.table({"uri": URIS}), tmp_path / "t/part-0.parquet")
    (tmp_path / "t/part-1.parquet").touch()
    with pytest.raises(ConfigError, match=r"source 'mine': Parquet '.*t/part-1.parquet' cannot be read .* damaged"):
        survey(tmp_path / "t", folder)
    (tmp_path / "t/part-1.parquet").unlink()
    (tmp_path / "t/part-0.parquet").unlink()
    with pytest.raises(ConfigError, match="has no files ending in .parquet, .csv"):
        survey(tmp_path / "t", folder)


@pytest.mark.parametrize("how", ["cut", "overwritten", "empty", "html"])
def test_a_damaged_parquet_is_named(tmp_path, folder, how):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"uri": [f"{i}{u}" for i in range(3000) for u in URIS]}), path)
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-20], "overwritten": data[:200] + b"\xff" * 60 + data[260:], "empty": b"",
                      "html": b"<html>" * 99}[how])
    with pytest.raises(ConfigError, match=r"source 'mine': Parquet '.*t.parquet' cannot be read .*get it again"):
        survey(path, folder)


CSV = 'uri,start,speaker,text\ns0/a.wav,0.5,007,"two\nlines, a comma"\ns1/b.wav,,,\n"s2/c,d.wav",1,bob,x\ns3/e f.wav,2,ann,é\n'

SEMICOLONS = "uri;start;speaker;text\ns0/a.wav;0.5;007;two\ns1/b.wav;;;\ns2/c,d.wav;1;bob;x\ns3/e f.wav;2;ann;é\n"


@pytest.mark.parametrize(("name", "data"), [
    ("t.csv", CSV.encode()), ("t.csv", b"\xef\xbb\xbf" + CSV.encode()), ("t.csv", CSV.replace("\n", "\r\n").encode()),
    ("T.CSV.gz", gzip.compress(CSV.encode(), mtime=0)), ("t.csv", SEMICOLONS.encode()),
    ("t.tsv", SEMICOLONS.replace(";", "\t").encode())])
def test_csv(tmp_path, folder, name, data):
    (tmp_path / name).write_bytes(data)
    found = {f.uri: f for f in survey(tmp_path / name, folder)}
    assert list(found) == URIS and found["s0/a.wav"].speaker == "007" and found["s0/a.wav"].text.startswith("two")
    assert [found[u].start for u in URIS] == [0.5, None, 1.0, 2.0]
    assert (found["s1/b.wav"].speaker, found["s1/b.wav"].text, found["s3/e f.wav"].text) == (None, None, "é")


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.ndjson", "t.jsonl.gz"])
def test_json_lines_with_columns_of_other_names(tmp_path, folder, name):
    """As NeMo's manifests."""
    text = "\n".join(json.dumps({"audio_filepath": u, "offset": i, "duration": 1.5, "speaker": i, "lang": "en"})
                     for i, u in enumerate(URIS)) + "\n\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found = survey(tmp_path / name, folder, uri="audio_filepath", start="offset")
    assert uris(found) == URIS
    assert [(f.start, f.duration, f.speaker) for f in found] == [(float(i), 1.5, str(i)) for i in range(4)]


@pytest.mark.parametrize(("name", "data", "message"), [
    ("t.csv", "uri,text\ns0/a.wav,ü\n".encode("latin-1"), r"table '.*t.csv' cannot be read"),
    ("t.csv", b"path\ns0/a.wav\n", r"has no column 'uri', only \['path'\].*columns: {uri: path}"),
    ("t.csv", b"uri,start\ns0/a.wav,x\n", "cannot be read"), ("t.csv", b"", "cannot be read"),
    ("t.csv", b"uri,split\ns0/a.wav,val\n", "'split' holds 'val' in row 0"), ("t.csv", b"uri\n", "has no rows"),
    ("t.csv.gz", gzip.compress(b"uri\ns0/a.wav\n", mtime=0)[:-9], "cannot be read"),
    ("t.jsonl", b'{"uri": "s0/a.wav"}\n{nope\n', "line 2 is no JSON"),
    ("t.jsonl", b'["s0/a.wav"]\n', "line 1 is list, expected an object"), ("t.jsonl", b'{"uri": null}', "row 0 has no uri"),
    ("t.jsonl", b'{"uri": "s0/a.wav", "start": "x"}', "column 'start' is string"), ("t.jsonl", b"\n", "no column 'uri'"),
    ("t.jsonl", b'{"uri": "s0/a.wav", "start": -1}', "'start' holds -1.0 in row 0")])
def test_errors_name_the_table_and_the_place(tmp_path, folder, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message) as refused:
        survey(tmp_path / name, folder)
    assert name in str(refused.value) and "source 'mine'" in str(refused.value)


def test_a_column_that_is_named_and_not_there(tmp_path, folder):
    pq.write_table(pa.table({"uri": URIS}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match="has no column 'spk', which corpus.sources.columns names"):
        survey(tmp_path / "t.parquet", folder, speaker="spk")


def test_a_column_of_paths_named_audio_is_no_sound(tmp_path, folder):
    pq.write_table(pa.table({"audio": URIS, "speaker": [1, 2, 3, 4]}), tmp_path / "t.parquet")
    assert uris(survey(tmp_path / "t.parquet", folder, uri="audio")) == URIS
