"""What the sources list, and that each thing that can be wrong with them is one clear error."""

from __future__ import annotations

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from audiolm.config.base import ConfigError
from audiolm.config.corpus import CorpusConfig, FolderSource, LibriSpeechSource, ManifestSource
from audiolm.config.run import ClusterConfig
from audiolm.data import sources
from audiolm.data.clips import read_clip, read_clips
from audiolm.data.listing import changed_files
from audiolm.data.manifest import build_manifest


def touch(path, data=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def list_files(source) -> list[sources.Found]:
    return sources.survey(source)[0]


def folder(root, name="f", **more):
    return FolderSource(kind="folder", name=name, root=str(root), **more)


def libri(root, splits=None):
    return LibriSpeechSource(kind="librispeech", name="l", root=str(root), splits=splits)


def test_folder_takes_audio_of_any_case_in_natural_order(tmp_path):
    for name in ("utt10.wav", "utt2.WAV", "sub/a.Flac", "sub/b.opus", "c.mp3", "d.ogg", "notes.txt", "._utt2.wav"):
        touch(tmp_path / name)
    found = list_files(folder(tmp_path))
    assert [f.uri for f in found] == ["c.mp3", "d.ogg", "sub/a.Flac", "sub/b.opus", "utt2.WAV", "utt10.wav"]
    assert all(f.speaker is None and f.split is None and f.size == 1 and f.stamp for f in found)
    assert all(os.path.exists(f.path) for f in found)


def test_folder_glob_speaker_and_split(tmp_path):
    for name in ("x/ann/c1/1.wav", "x/bob/c1/1.wav", "y/bob/c2/1.wav", "top.wav"):
        touch(tmp_path / name)
    found = list_files(folder(tmp_path, speaker="grandparent", split="train"))
    assert {(f.uri, f.speaker, f.chapter) for f in found} == {
        ("x/ann/c1/1.wav", "ann", "x/ann/c1"), ("x/bob/c1/1.wav", "bob", "x/bob/c1"),
        ("y/bob/c2/1.wav", "bob", "y/bob/c2"), ("top.wav", None, None)}
    assert {f.split for f in found} == {"train"}
    assert len(list_files(folder(tmp_path, glob="x/**/*.wav"))) == 2


def test_a_root_may_be_a_glob_or_a_file(tmp_path):
    for name in ("a/1.wav", "b/1.wav", "b/2.flac"):
        touch(tmp_path / name)
    assert [f.uri for f in list_files(folder(f"{tmp_path}/*/1.wav"))] == ["a/1.wav", "b/1.wav"]
    (one,) = list_files(folder(tmp_path / "b" / "2.flac"))
    assert (one.uri, one.path) == ("2.flac", str(tmp_path / "b" / "2.flac"))


def test_librispeech_layout_with_transcripts(tmp_path):
    touch(tmp_path / "train-clean/19/198/19-198-0001.flac")
    touch(tmp_path / "train-clean/19/198/19-198-0000.flac")
    touch(tmp_path / "train-clean/19/198/19-198.trans.txt", b"19-198-0000 HELLO THERE\n19-198-0001 AGAIN\n")
    touch(tmp_path / "dev-clean/20/1/20-1-0000.mp3")
    touch(tmp_path / "small/21/book/one.flac")
    found = {f.uri.rsplit("/", 1)[1]: f for f in list_files(libri(tmp_path))}
    first = found["19-198-0000.flac"]
    assert (first.speaker, first.chapter) == ("19", "train-clean/19/198")
    assert (first.split, first.text) == ("train", "HELLO THERE")
    assert (found["20-1-0000.mp3"].split, found["one.flac"].split) == ("dev", None)
    mapped = list_files(libri(tmp_path, {"small": "test", "dev-clean": "train"}))
    assert {f.speaker: f.split for f in mapped} == {"19": "train", "20": "train", "21": "test"}
    assert "train-clean/19/198/19-198.trans.txt" in [e.uri for e in sources.listing(libri(tmp_path))]
    with pytest.raises(ConfigError, match=r"source 'l': splits names \['nope'\].*dev-clean"):
        list_files(libri(tmp_path, {"nope": "dev"}))


def test_librispeech_root_may_hold_speakers_directly(tmp_path):
    touch(tmp_path / "100/sea_fairies/01_baum.flac")
    (found,) = list_files(libri(tmp_path))
    assert (found.speaker, found.chapter, found.split) == ("100", "100/sea_fairies", None)


def write_rows(place, columns):
    pq.write_table(pa.table(columns), place)
    return ManifestSource(kind="manifest", name="mine", uri=str(place))


def test_user_parquet(tmp_path):
    touch(tmp_path / "a.wav")
    source = write_rows(tmp_path / "m.parquet", {
        "uri": ["a.wav", str(tmp_path / "a.wav"), "gone.wav"], "start": [0, 1, 2], "duration": [1.0, None, 1.0],
        "speaker": [7, 7, 8], "split": ["train", "dev", None], "source": ["x", None, "x"]})
    by_uri = {f.uri: f for f in list_files(source)}
    assert (by_uri["a.wav"].speaker, by_uri["a.wav"].source, by_uri["a.wav"].duration) == ("7", "x", 1.0)
    absolute = by_uri[str(tmp_path / "a.wav")]
    assert (absolute.path, absolute.source, absolute.start, absolute.split) == (absolute.uri, "mine", 1.0, "dev")
    assert by_uri["gone.wav"].size == -1
    write_rows(tmp_path / "n.parquet", {"uri": ["gone.wav"]})
    elsewhere = ManifestSource(kind="manifest", name="mine", uri=str(tmp_path / "n.parquet"), root=str(tmp_path / "b"))
    touch(tmp_path / "b" / "gone.wav")
    assert {f.uri: f.size for f in list_files(elsewhere)}["gone.wav"] == 1


@pytest.fixture
def web():
    """(a web server's address, the requests that it got)."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("uri", ["../out.wav", "x/../../out.wav", "{here}/out.wav", "{here}/rootless/a.wav", "file://{here}/out.wav",
                                 "file://{here}/root/../out.wav", "link.wav", "links/out.wav", "{web}/a.wav",
                                 "a.wav::{web}/a.wav", "file://{here}/root/a.wav::{web}/a.wav", "s3://bucket/a.wav"])
def test_a_users_uri_outside_the_root_is_refused_and_nothing_is_fetched(tmp_path, web, uri):
    for name in ("out.wav", "rootless/a.wav", "root/a.wav"):
        touch(tmp_path / name)
    (tmp_path / "root" / "link.wav").symlink_to(tmp_path / "out.wav")
    (tmp_path / "root" / "links").symlink_to(tmp_path)
    address, asked = web
    uri = uri.format(here=tmp_path, web=address)
    with pytest.raises(ConfigError, match="outside the root .*root'; name files .* set corpus.sources.root") as refused:
        list_files(write_rows(tmp_path / "root" / "m.parquet", {"uri": ["a.wav", uri]}))
    assert repr(uri) in str(refused.value) and "source 'mine'" in str(refused.value)
    assert not asked


def test_links_and_whole_uris_within_the_root_are_read(tmp_path):
    touch(tmp_path / "root" / "deep" / "a.wav")
    (tmp_path / "root" / "link.wav").symlink_to("deep/a.wav")
    (tmp_path / "corpus").symlink_to(tmp_path / "root")  # the root itself may be a link
    uris = ["./deep/a.wav", "deep/../link.wav", f"{tmp_path}/corpus/deep/a.wav", f"file://{tmp_path}/root/deep/a.wav"]
    assert {f.size for f in list_files(write_rows(tmp_path / "corpus" / "m.parquet", {"uri": uris}))} == {1}


@pytest.mark.parametrize(("root", "uri"), [("s3://b/c", "../d/a.wav"), ("s3://b/c", "s3://b/cd/a.wav"), ("s3://b", "gs://b/a.wav"),
                                           ("http://h/c", "%2e%2e/d/a.wav"), ("/c", "s3://b/a.wav"), ("s3://b/c", "/c/a.wav")])
def test_a_uri_outside_a_remote_root_has_no_path(root, uri):
    with pytest.raises(ValueError, match="outside the root"):
        sources.locate(root, uri)


@pytest.mark.parametrize(("place", "protocol"), [("http://h/c", "http"), ("zip://::/data/c.zip", "zip"),
                                                 ("simplecache::s3://b/c", "simplecache"), ("s3://b/c::ftp://h/c", "ftp")])
def test_a_source_is_read_by_known_protocols_alone(place, protocol):
    for source in (folder(place), libri(place), ManifestSource(kind="manifest", name="m", uri="/m.parquet", root=place),
                   ManifestSource(kind="manifest", name="m", uri=place)):
        with pytest.raises(ValueError, match=rf"source '[flm]' lies at '{place}', .* add \['{protocol}'\] to corpus.protocols"):
            CorpusConfig(name="c", sources=[source])
        CorpusConfig(name="c", sources=[source], protocols=("local", "s3", protocol))
    CorpusConfig(name="c", sources=[folder("/a"), folder("file:///a", name="g"), folder("hf://datasets/a/b", name="h")])


@pytest.mark.parametrize(("columns", "message"), [
    ({"path": ["a"]}, r"'mine'.*no column 'uri'.*\['path'\]"),
    ({"uri": pa.array([], pa.string())}, "no rows"),
    ({"uri": ["a.wav"], "split": ["val"]}, "'split' holds 'val' in row 0"),
    ({"uri": ["a.wav"], "start": ["x"]}, "'start' is string"),
    ({"uri": ["a.wav"], "start": [-1.0]}, "'start' holds -1.0"),
    ({"uri": [None, "a.wav"]}, "row 0 has no uri"),
    ({"uri": ["nowhere.wav"]}, "none of the 1 files .* corpus.sources.root"),
])
def test_user_parquet_errors_name_the_column(tmp_path, columns, message):
    touch(tmp_path / "a.wav")
    with pytest.raises(ConfigError, match=message):
        list_files(write_rows(tmp_path / "m.parquet", columns))


def test_missing_and_empty_places(tmp_path):
    with pytest.raises(ConfigError, match=r"source 'f': root '.*nowhere' does not exist"):
        list_files(folder(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"source 'l': no audio files under root '.*empty'.*\.flac"):
        list_files(libri(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"source 'f'.*nope"):
        list_files(folder("nope://x/y"))
    with pytest.raises(ConfigError, match=r"source 'mine': uri '.*m.parquet' does not exist"):
        list_files(ManifestSource(kind="manifest", name="mine", uri=str(tmp_path / "m.parquet")))
    touch(tmp_path / "m.parquet", b"not parquet")
    with pytest.raises(ConfigError, match="cannot be read"):
        list_files(ManifestSource(kind="manifest", name="mine", uri=str(tmp_path / "m.parquet")))


def test_s3_source_and_its_errors(s3_server, recording_out, tmp_path, monkeypatch):
    from s3fs import S3FileSystem

    fs = S3FileSystem()
    fs.mkdir("corpus")
    rng = np.random.default_rng(0)
    for speaker in ("1", "2", "3"):
        for i in range(2):
            name = tmp_path / f"{speaker}-5-000{i}.flac"
            sf.write(name, 0.1 * rng.standard_normal(17000), 16000)
            fs.put(str(name), f"corpus/speech/{speaker}/5/{name.name}")
    source = libri("s3://corpus/speech")
    corpus = CorpusConfig(name="c", sources=[source])
    recording_out.path = "s3://corpus/store/manifest"
    facts = build_manifest({"corpus": corpus, "seed": 0, "cluster": ClusterConfig()}, {}, recording_out)
    assert (facts["files"], facts["clips"], facts["parts"]) == (6, 3, 6)
    for clip in read_clips(recording_out.path):
        assert len(read_clip(clip, sources.roots(corpus))) == clip.samples == 34000
    assert changed_files(recording_out.path, corpus) == {"added": [], "removed": [], "modified": []}
    fs.pipe("corpus/speech/1/5/1-5-0000.flac", b"other")
    assert changed_files(recording_out.path, corpus)["modified"] == ["l/1/5/1-5-0000.flac"]

    for uri in ("../store/manifest/clips.parquet", "s3://corpus/store/manifest/clips.parquet"):
        write_rows(tmp_path / "m.parquet", {"uri": ["1/5/1-5-0000.flac", uri]})
        fs.put(str(tmp_path / "m.parquet"), "corpus/speech/m.parquet")
        with pytest.raises(ConfigError, match=f"'{uri}' lies outside the root 's3://corpus/speech'"):
            list_files(ManifestSource(kind="manifest", name="m", uri="s3://corpus/speech/m.parquet"))

    for missing in ("s3://corpus/nothing", "s3://nobucket/x"):
        with pytest.raises(ConfigError, match=rf"root '{missing}' does not exist"):
            list_files(libri(missing))
    with monkeypatch.context() as m:
        m.setattr(S3FileSystem, "call_s3", denied)
        with pytest.raises(ConfigError, match=r"source 'l': root 's3://corpus/speech' is denied.*AWS_ACCESS_KEY_ID"):
            list_files(source)
    with monkeypatch.context() as m:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            m.delenv(name, raising=False)
        m.setenv("AWS_EC2_METADATA_DISABLED", "true")
        m.setenv("AWS_CONFIG_FILE", os.devnull)
        m.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        S3FileSystem.clear_instance_cache()
        with pytest.raises(ConfigError, match=r"'s3://corpus/speech' needs credentials.*AWS_ACCESS_KEY_ID"):
            list_files(source)
    S3FileSystem.clear_instance_cache()


def denied(*_args, **_kwargs):
    raise PermissionError("Access Denied")
