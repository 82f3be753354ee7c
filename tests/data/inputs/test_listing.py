"""Folders as people have them: links, loops, what may not be read, odd names, other types; nothing goes without a word."""

from __future__ import annotations

import ast
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from audiolm.config.base import ConfigError
from audiolm.config.corpus import CorpusConfig
from audiolm.config.run import ClusterConfig, RunConfig
from audiolm.data import sources
from audiolm.data.clips import read_clip, read_clips
from audiolm.data.listing import changed_files
from audiolm.data.manifest import build_manifest
from audiolm.tokenizers.codec_files import find_files
from tests.worlds.basics import ROOT, RecordingOut, free_port

PROTOCOLS = ("local", "s3", "zip", "tar", "simplecache", "memory")


@pytest.fixture(scope="module")
def wav(tmp_path_factory) -> bytes:
    """A second of noise as a WAV."""
    path = tmp_path_factory.mktemp("wav") / "a.wav"
    sf.write(path, 0.1 * np.random.default_rng(0).standard_normal(16_000), 16_000)
    return path.read_bytes()


def put(folder: Path, data: bytes, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def corpus(source: dict) -> CorpusConfig:
    return CorpusConfig(name="c", sources=[{"name": "f", **source}], max_rejected=0.9, protocols=PROTOCOLS)


def build(tmp_path, source: dict) -> tuple[set[str], dict[str, tuple[str, str]], dict]:
    """(uris of the clips, every one read back; {rejected uri: (reason, detail)}; the facts) of a source's manifest."""
    cfg, out = corpus(source), RecordingOut(tmp_path / "out")
    facts = build_manifest({"corpus": cfg, "seed": 0, "cluster": ClusterConfig()}, {}, out)
    clips = read_clips(out.path)
    for clip in clips:
        assert len(read_clip(clip, sources.roots(cfg))) == clip.samples
    assert not any(changed_files(out.path, cfg).values())
    rows = pq.read_table(f"{out.path}/rejected.parquet").to_pylist()
    return {p.uri for c in clips for p in c.parts}, {r["uri"]: (r["reason"], r["detail"]) for r in rows}, facts


def survey(root, **more) -> dict[str, tuple[str, str] | None]:
    """{uri: fault} of a folder."""
    (source,) = corpus({"kind": "folder", "root": str(root), **more}).sources
    return {f.uri: f.fault for f in sources.survey(source)[0]}


def test_links_are_followed_each_folder_once_and_what_leads_nowhere_is_rejected(tmp_path, wav):
    put(tmp_path, wav, "c/spk0/a.wav", "disk2/spk9/far0.wav", "disk2/spk9/deep/far1.wav")
    here = tmp_path / "c"
    for name, target in {"spk9": tmp_path / "disk2/spk9", "zz": tmp_path / "disk2", "spk0/link.wav": here / "spk0/a.wav",
                         "spk0/broken.wav": tmp_path / "nowhere", "loop": here, "up": "..", "self.wav": "self.wav",
                         "disk3": "/mnt/nowhere", "folder.wav": tmp_path / "disk2/spk9", "b.txt": "/nowhere"}.items():
        (here / name).symlink_to(target)
    used, rejected, _ = build(tmp_path, {"kind": "folder", "root": str(here)})
    assert used == {"spk0/a.wav", "spk0/link.wav", "folder.wav/far0.wav", "folder.wav/deep/far1.wav"}
    assert rejected == {"spk0/broken.wav": ("missing", "a link that leads nowhere"),
                        "disk3": ("missing", "a link that leads nowhere"),
                        "self.wav": ("unreadable", "a link that leads to itself")}
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "spk9").symlink_to(tmp_path / "disk2/spk9")
    (tmp_path / "all").symlink_to(tmp_path / "links")
    names = ["spk9/deep/far1.wav", "spk9/far0.wav"]
    assert list(survey(tmp_path / "all")) == names == [n for n, _ in find_files([str(tmp_path / "links")], (".wav",))]


def test_a_folder_keeps_its_own_name_where_a_link_of_an_earlier_name_repeats_it(tmp_path, wav):
    put(tmp_path, wav, "z/a.wav")
    (tmp_path / "b").symlink_to(tmp_path / "z")
    assert survey(tmp_path) == {"z/a.wav": None}


# In a process that gives up root's right to read everything.
DENIED = """
import os, sys
from audiolm.config.base import ConfigError
from audiolm.config.corpus import FolderSource
from audiolm.data import sources

source = FolderSource(kind="folder", name="f", root=sys.argv[1])
print({f.uri: f.fault for f in sources.survey(source)[0]})
os.chmod(sys.argv[1], 0o311)
try:
    sources.survey(source)
except ConfigError as e:
    print(e)
"""


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root reads everything")
def test_what_may_not_be_read_is_rejected_by_name(tmp_path, wav):
    put(tmp_path, wav, "c/spk0/a.wav", "c/secret/b.wav", "c/closed/d.wav", ".hidden/e.wav", "c/.git/f.wav")
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    (tmp_path / "c/secret").chmod(0)
    (tmp_path / "c/closed").chmod(0o444)  # its names are seen, its files are not
    (tmp_path / "c/.git").chmod(0)
    try:
        listed, refused = subprocess.run(
            [*(drop if os.geteuid() == 0 else []), sys.executable, "-c", DENIED, str(tmp_path / "c")], cwd=ROOT,
            capture_output=True, text=True, check=True).stdout.splitlines()
    finally:
        for name in ("c", "c/secret", "c/closed", "c/.git"):
            (tmp_path / name).chmod(0o755)
    assert ast.literal_eval(listed) == {
        "closed/d.wav": ("unreadable", "denied: Permission denied"),
        "secret": ("unreadable", "the folder cannot be listed: denied: Permission denied"), "spk0/a.wav": None}
    assert f"root '{tmp_path}/c' is denied" in refused


def test_only_regular_files_are_opened(tmp_path, wav):
    put(tmp_path, wav, "c/a.wav")
    os.mkfifo(tmp_path / "c/pipe.wav")
    (tmp_path / "c/null.wav").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "c/socket.wav"))
        used, rejected, _ = build(tmp_path, {"kind": "folder", "root": str(tmp_path / "c")})
    assert used == {"a.wav"}
    assert rejected == {f"{n}.wav": ("unreadable", f"a {kind}, not a regular file")
                        for n, kind in (("null", "device"), ("pipe", "pipe"), ("socket", "socket"))}


def test_other_types_are_counted_by_their_ending_and_end_no_step(tmp_path, wav):
    put(tmp_path, wav, "a.wav", "notes.txt", "cover.jpg", *(f"talk{i}.WMA" for i in range(3)), "v.amr", "x/y.ape")
    used, rejected, facts = build(tmp_path, {"kind": "folder", "root": str(tmp_path), "glob": "**/*"})
    assert used == {"a.wav"} and facts["files"] == 1 and facts["rejected"] == {"total": 0}
    assert facts["left_out"] == {".wma": 3, ".amr": 1, ".ape": 1}
    assert rejected["x/y.ape"] == ("left out", ".ape is no type that is read") and len(rejected) == 5
    assert "left out 5 that look like audio (3 .wma, 1 .amr, 1 .ape; see rejected.parquet)" in facts["summary"]
    assert list(survey(tmp_path, glob="*.wav")) == ["a.wav"]
    (tmp_path / "a.wav").unlink()
    with pytest.raises(ConfigError, match=r"no audio files .* 3 x .wma, which is not read"):
        survey(tmp_path)


ODD = ["a b.wav", "a#1.wav", "a?b.wav", "100%41.wav", "a[1].wav", "a*b.wav", "new\nline.wav", "12::30.wav", "BBC::news::x.wav",
       "zip::x.wav", "s3:x.wav", "日本語 é.wav", "~x.wav", "-rf.wav", "A.WAV", "q'uo\"te.wav", "back\\slash.wav", "tab\t.wav",
       " lead.wav", "trail .wav", "x.tmp.wav", "{b}.wav", "$HOME.wav", "<b>.wav", "file:x.wav", "d::/e.wav", "std::vec/f.wav"]


def test_odd_names_are_names_and_no_chains(tmp_path, wav):
    put(tmp_path / "std::vec", wav, *ODD)
    used, rejected, _ = build(tmp_path, {"kind": "folder", "root": str(tmp_path / "std::vec")})
    assert used == set(ODD) and not rejected
    pq.write_table(pa.table({"uri": ODD}), tmp_path / "std::vec/m.parquet")
    shutil.rmtree(tmp_path / "out")
    assert build(tmp_path, {"kind": "manifest", "uri": str(tmp_path / "std::vec/m.parquet")})[0] == set(ODD)


@pytest.mark.parametrize("root", ["std::vec", "data::vec", "zip::x", "a::b::c", "s3:", "file:x"])
def test_a_relative_root_with_colons_is_a_folder(tmp_path, wav, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / root, wav, "1::2.wav")
    assert build(tmp_path, {"kind": "folder", "root": root})[0] == {"1::2.wav"}


def test_names_that_are_no_text_are_rejected_escaped(tmp_path, wav):
    put(tmp_path / "c", wav, "a.wav", "ok/b.wav")
    for name in (b"mod\xe0.wav", b"d\xff/c.wav"):
        path = os.fsencode(tmp_path / "c") + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(wav)
    used, rejected, _ = build(tmp_path, {"kind": "folder", "root": str(tmp_path / "c")})
    assert used == {"a.wav", "ok/b.wav"}
    assert rejected == dict.fromkeys(["mod\\xe0.wav", "d\\xff/c.wav"], ("unreadable", "its name is not UTF-8; rename it"))


@pytest.mark.parametrize(("uri", "reason", "detail"), [
    ("spk0", "unreadable", "a folder, not a file"), ("spk0/a.wav/x.wav", "missing", "no such file"),
    ("z" * 300 + ".wav", "unreadable", "File name too long"), ("x/" * 2500 + "a.wav", "unreadable", "File name too long"),
    ("a\0b.wav", "unreadable", "embedded null byte"), ("self.wav", "unreadable", "a link that leads to itself"),
    ("gopher://x/y.wav", "unreadable", "no filesystem has the protocol gopher"), ("C:\\data\\y.wav", "missing", "no such file"),
    (" ", "missing", "no such file"), ("pipe.wav", "unreadable", "a pipe, not a regular file"),
    (".", "unreadable", "a folder, not a file")])
def test_a_row_that_the_system_refuses_is_one_rejected_row(tmp_path, wav, uri, reason, detail):
    put(tmp_path / "c", wav, "spk0/a.wav")
    (tmp_path / "c/self.wav").symlink_to("self.wav")
    os.mkfifo(tmp_path / "c/pipe.wav")
    pq.write_table(pa.table({"uri": ["spk0/a.wav", uri]}), tmp_path / "c/m.parquet")
    used, rejected, _ = build(tmp_path, {"kind": "manifest", "uri": str(tmp_path / "c/m.parquet")})
    assert used == {"spk0/a.wav"} and rejected == {uri: (reason, detail)}


def test_a_network_out_of_reach_is_no_missing_file(monkeypatch):
    from audiolm import store
    from audiolm.data.inputs import walk

    class Away:
        async_impl = False

        def info(self, path):
            raise ConnectionResetError(104, "reset")

    monkeypatch.setattr(store, "open_fs", lambda path: (Away(), path))
    with pytest.raises(ConnectionResetError):
        walk.stat("a.wav", "s3://b/a.wav")


def archive(path: Path, wav: bytes, kind: str) -> None:
    names = ["s1/a.wav", "s1/12::30.wav", "s2/b.wav"]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as z:
            for name in names:
                z.writestr(name, wav)
        return
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(wav)
            tar.addfile(info, io.BytesIO(wav))


@pytest.mark.parametrize(("root", "expected"), [
    ("zip://::{0}/c.zip", {"s1/a.wav", "s1/12::30.wav", "s2/b.wav"}),
    ("zip::{0}/c.zip", {"s1/a.wav", "s1/12::30.wav", "s2/b.wav"}),
    ("zip://s1::{0}/c.zip", {"a.wav", "12::30.wav"}), ("zip://*/a.wav::{0}/c.zip", {"s1/a.wav"}),
    ("zip://::file://{0}/x::y/c.zip", {"s1/a.wav", "s1/12::30.wav", "s2/b.wav"}), ("zip://s2/b.wav::{0}/c.zip", {"b.wav"}),
    ("tar://::{0}/c.tar", {"s1/a.wav", "s1/12::30.wav", "s2/b.wav"}), ("simplecache::file://{0}/f", {"s1/a.wav"}),
    ("file://{0}/f", {"s1/a.wav"}), ("local://{0}/f/", {"s1/a.wav"}), ("{0}//f", {"s1/a.wav"}), ("{0}/f/../f", {"s1/a.wav"})])
def test_chained_roots(tmp_path, wav, root, expected):
    put(tmp_path, wav, "f/s1/a.wav")
    (tmp_path / "x::y").mkdir()
    for path in (tmp_path / "c.zip", tmp_path / "x::y/c.zip"):
        archive(path, wav, "zip")
    archive(tmp_path / "c.tar", wav, "tar")
    assert build(tmp_path, {"kind": "folder", "root": root.format(tmp_path)})[:2] == (expected, {})


def test_an_archive_named_as_a_root_is_told_how_it_is_read(tmp_path, wav):
    archive(tmp_path / "c.zip", wav, "zip")
    with pytest.raises(ConfigError, match=r"is a file and no folder; .* zip://::.*c\.zip"):
        survey(tmp_path / "c.zip")


def test_odd_keys_on_s3(tmp_path, wav, s3_server):
    import boto3

    client, keys = boto3.client("s3"), ["c/s1/12::30.wav", "c/s1/a b+c.wav", "c/s2/a?b#1.wav", "c/s2/100%41.wav",
                                        "c/s3/a[1].wav", "c/s3/ü.wav", "c/s4/x.wma", "c2/d.wav"]
    for key in keys:
        client.put_object(Bucket="tests", Key=f"{tmp_path.name}/{key}", Body=wav)
    used, rejected, facts = build(tmp_path, {"kind": "folder", "root": f"s3://tests/{tmp_path.name}/c"})
    assert used == {k.removeprefix("c/") for k in keys[:6]}
    assert rejected == {"s4/x.wma": ("left out", ".wma is no type that is read")} and facts["left_out"] == {".wma": 1}


def test_slashes_and_dots_in_keys_and_keys_that_stand_for_folders(tmp_path, wav, monkeypatch):
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(port=free_port(), verbose=False)
    server.start()
    try:
        for name, value in {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server._port}", "AWS_ACCESS_KEY_ID": "a",
                            "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        client = boto3.client("s3")
        client.create_bucket(Bucket="keys")
        for key in ("c/", "c/s1/", "c/s2/dir.wav/", "c"):
            client.put_object(Bucket="keys", Key=key, Body=b"")
        right = ["c//x.wav", "c/s1//y.wav", "c/s1/y.wav", "c/s3/c.wav", "c/s3/c.wav/d.wav"]
        for key in (*right, "c/../up.wav", "c/./a.wav", "c.wav", "c2/e.wav"):
            client.put_object(Bucket="keys", Key=key, Body=wav)
        used, rejected, _ = build(tmp_path, {"kind": "folder", "root": "s3://keys/c"})
        assert used == {".//x.wav", *(k.removeprefix("c/") for k in right[1:])}
        assert rejected == dict.fromkeys(["../up.wav", "./a.wav"], (
            "unreadable", "its key holds a part '.' or '..', which paths resolve; rename it"))
    finally:
        server.stop()
        S3FileSystem.clear_instance_cache()


def test_a_runs_name_is_a_short_file_name():
    for name in ("a/b", "../x", "a..b", "..", ".", "", " ", "a\nb", "n" * 101, "ж" * 51, "\udce0"):
        with pytest.raises(ValueError, match="a run is called"):
            RunConfig(name=name)
    for name in ("n" * 100, "ж" * 50, "试验 №1 é", "a:b%20?#", "v1.2"):
        assert RunConfig(name=name).name == name
