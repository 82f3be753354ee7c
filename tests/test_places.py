"""Paths and URIs are taken apart in one way, whatever their names hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from audiolm import places
from audiolm.config.load import _resolve_paths
from audiolm.data.sources import locate


@pytest.mark.parametrize(("path", "parts", "joined"), [
    ("/d/12::30", ("local", "/d/12::30", None), "/d/12::30/x.wav"), ("a::b", ("local", "a::b", None), "a::b/x.wav"),
    ("data::vec", ("local", "data::vec", None), "data::vec/x.wav"), ("C:\\d", ("local", "C:\\d", None), "C:\\d/x.wav"),
    ("file:///a::b/", ("local", "/a::b/", None), "file:///a::b/x.wav"), ("s3:x", ("local", "s3:x", None), "s3:x/x.wav"),
    ("/d/zip::/e", ("local", "/d/zip::/e", None), "/d/zip::/e/x.wav"), ("zip::x", ("local", "zip::x", None), "zip::x/x.wav"),
    ("s3://b/12::30", ("s3", "b/12::30", None), "s3://b/12::30/x.wav"), ("S3://b/a::/b", ("s3", "b/a::/b", None), "S3://b/a::/b/x.wav"),
    ("zip://::/d/c.zip", ("zip", "", "/d/c.zip"), "zip://x.wav::/d/c.zip"),
    ("zip::/d/c.zip", ("zip", "", "/d/c.zip"), "zip://x.wav::/d/c.zip"),
    ("zip://::c.zip", ("zip", "", "c.zip"), "zip://x.wav::c.zip"),
    ("zip://s1/::s3://b/x::y.zip", ("zip", "s1/", "s3://b/x::y.zip"), "zip://s1/x.wav::s3://b/x::y.zip"),
    ("zip://a::b::file:///c.zip", ("zip", "a::b", "file:///c.zip"), "zip://a::b/x.wav::file:///c.zip"),
    ("zip://a.zip::tar://b.zip::s3://b/c.tar", ("zip", "a.zip", "tar://b.zip::s3://b/c.tar"),
     "zip://a.zip/x.wav::tar://b.zip::s3://b/c.tar"),
    ("simplecache::s3://b/c", ("simplecache", "", "s3://b/c"), "simplecache::s3://b/c/x.wav")])
def test_a_place_is_taken_apart_and_joined(path, parts, joined):
    assert tuple(places.split(path)) == parts and places.join(path, "x.wav") == joined
    assert places.is_local(path) == (parts[0] == "local")
    assert places.is_within(path, joined) and not places.is_within(joined, path)


def test_what_a_tar_or_a_row_holds_is_named_with_the_file_it_lies_in(tmp_path):
    (tmp_path / "a::b.tar").write_bytes(b"0123456789")
    uri = places.member("d::/e.wav:", 2, 5, "a::b.tar")
    path = locate(str(tmp_path), uri)
    assert places.within(uri) == "a::b.tar" and places.within(path) == f"{tmp_path}/a::b.tar" and places.within("a::b") is None
    fs, p = places.open_fs(path)
    assert fs.info(p)["size"] == 5 and fs.cat_file(p) == fs.open(p).read() == b"23456"
    assert fs.cat_file(p, start=1, end=3) == b"34"
    fs, p = places.open_fs(places.member("x", 8, 5, f"{tmp_path}/a::b.tar"))
    with pytest.raises(FileNotFoundError, match="the file has changed"):
        fs.cat_file(p)
    for outside in (places.member("x", 0, 1, "../c.tar"), places.row("audio", 0, 0, 1, "x", "/etc/passwd")):
        with pytest.raises(ValueError, match="outside the root"):
            locate(str(tmp_path), outside)


def test_a_chain_that_no_archive_or_cache_begins_is_refused():
    for path in ("/c/a.wav::http://h/a", "s3://b/c::ftp://h/c", "a::gopher://x"):
        with pytest.raises(ValueError, match="which holds no other place"):
            places.open_fs(path)
        assert not places.is_within(path.split("::")[0], path)
    with pytest.raises(ValueError, match="Protocol not known"):
        places.open_fs("gopher://x/y")


def test_relative_places_of_a_config_file(monkeypatch):
    found = {"zip://::c.zip": "zip://::/conf/c.zip", "a::b": "/conf/a::b", "../x::y": "/x::y", "zip://s1::../c.zip": "zip://s1::/c.zip",
             "s3://b/c": "s3://b/c", "/d/12::30": "/d/12::30"}
    for text, place in found.items():
        data = {"corpus": {"sources": [{"kind": "folder", "name": "f", "root": text}]}}
        assert _resolve_paths(data, Path("/conf"))["corpus"]["sources"][0]["root"] == place


def test_a_place_for_a_process_in_another_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    here = os.getcwd()
    assert [places.absolute(p) for p in ("a::b", "./x", ".", "/d/", "zip://s::c.zip", "s3://b", "file:///x", "~no.wav")] == [
        f"{here}/a::b", f"{here}/x", here, "/d", f"zip://s::{here}/c.zip", "s3://b", "/x", f"{here}/~no.wav"]


def test_short_names():
    assert places.short_name("a" * 200, 200) == "a" * 200
    for name in ("a" * 201, "ж" * 101, "a" * 199 + "ж", "\udce0" * 201):
        short = places.short_name(name, 200)
        assert len(short.encode()) <= 200 and short != places.short_name(name + "x", 200)


@pytest.mark.parametrize("path,below", [("../x/y", "../x/y"), ("..", ".."), (".hidden/x", ".hidden/x"), ("...", "..."),
                                        (".", ""), ("./", ""), ("./x", "x"), ("./../x", "../x"), ("./.x", ".x"),
                                        ("x/../y/", "x/../y")])
def test_a_relative_path_lies_below_the_working_folder_as_the_system_reads_it(path, below, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert places.absolute(path) == places.open_fs(path)[1] == f"{tmp_path}/{below}".rstrip("/")
