"""Odd texts in overrides and YAML files: taken as they stand where text is wanted, else refused by file, key and fix."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from audiolm.config.base import ConfigError
from audiolm.config.load import apply_overrides, load_config
from tests.worlds.basics import ROOT

BODY = "corpus: {name: c, sources: [{kind: folder, name: f, root: /audio}]}\n"


@pytest.fixture
def file(tmp_path):
    def write(text: str | bytes, name: str = "my.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.mark.parametrize("text", [
    "@me", "%x", "[a", "{a", "'a", '"a', "`x`", "a: b", "a=b", "a #3", "#3", "*.wav", "**", "!x", "&a", "*a", "- a", "? a", ":",
    "|", "> x", "---", "on", "no", "yes", "true", "2024-01-01", "12:30", "007", "1e3", "1_0", "0x1f", ".inf", "=", "<<", "Ä 试",
    "!!int 3"])
def test_an_override_of_a_text_field_is_taken_literally(text, file):
    assert load_config(file(BODY), [f"run.name={text}"]).run.name == text
    assert load_config(file(BODY), [f"corpus.sources.0.glob={text}"]).corpus.sources[0].glob == text


@pytest.mark.parametrize(("text", "name"), [("'a #3'", "a #3"), ('"007"', "007"), ("'it''s'", "it's"), (" a ", "a"),
                                            ("'null'", "null"), ('"a\\u0041"', "aA")])
def test_quotes_around_an_override_are_yaml(text, name, file):
    assert load_config(file(BODY), [f"run.name={text}"]).run.name == name


@pytest.mark.parametrize("root", ["/data/Album #3", "/a: b", "/[x]", "s3://b/a #3/x", "/it's", "/a*", "/50%"])
def test_a_path_of_an_override_is_taken_literally(root, file):
    cfg = load_config(file(BODY), [f"corpus.sources.0.root={root}"])
    assert cfg.corpus.sources[0].root == root
    assert apply_overrides(cfg, [f"tables.asr={root}"]).tables.asr == root
    assert load_config(file(BODY), [f"tables.probes.sWUGGY={root}"]).tables.probes == {"sWUGGY": root}


@pytest.mark.parametrize("none", ["null", "~", ""])
def test_null_is_none_where_none_is_allowed_and_refused_elsewhere(none, file):
    path = file(BODY + "tables: {asr: /x}\n")
    assert load_config(path, [f"tables.asr={none}"]).tables.asr is None
    for key in ("run.name", "store", "corpus", "corpus.sources.0.root", "codec.train.steps", "run"):
        with pytest.raises(ConfigError, match=rf"my\.yaml has .*(?s:.)*{key.split('.')[-1]}: .*~ and null mean none; leave"):
            load_config(path, [f"{key}={none}"])


@pytest.mark.parametrize(("override", "value"), [
    ("corpus.min_s=1e-3", 1e-3), ("evaluate.rows=1_000", 1000), ("run.seed=010", 10),
    ("evaluate.visqol=no", False), ("evaluate.visqol=off", False), ("evaluate.visqol=true", True), ("cluster.workers=~", None),
    ("tokens.speeds=[0.9, 1.1]", (0.9, 1.1)), ("tables.suites=[]", ()), ("cluster.device=cpu", "cpu"),
    ("corpus.hold_out={dev: [007, 2961], test: [no, 1e3, 2024-01-01]}",
     {"dev": ("007", "2961"), "test": ("no", "1e3", "2024-01-01")}),
    ("corpus.sources.0={kind: librispeech, name: l, root: /r, splits: {on: train, 1: dev}}", None)])
def test_the_fields_types_read_what_is_written(override, value, file):
    cfg = load_config(file(BODY), [override])
    if "splits" in override:
        assert cfg.corpus.sources[0].splits == {"on": "train", "1": "dev"}
        return
    for name in override.split("=")[0].split("."):
        cfg = getattr(cfg, name)
    assert cfg == value and type(cfg) is type(value)


@pytest.mark.parametrize(("override", "message"), [
    ("lm.parallel.train.lr=nan", "finite number .got nan"), ("corpus.max_s=inf", "finite number .got inf"),
    ("corpus.max_s=-inf", "finite"), ("corpus.max_s=.inf", r"max_s: Input should be a valid number.*got \.inf"),
    ("corpus.max_s=1e400", "finite"), ("codec.train.steps=3.5", r"valid integer.*got 3\.5"), ("run.seed=1:30", "got 1:30"),
    ("run.seed=true", "got true"), ("evaluate.visqol=maybe", "valid boolean"),
    ("cluster.workers=[a", r"override 'cluster.workers=\[a': line 1, column 3: .*expected ',' or '\]'.*put quotes"),
    ("run={name: a, name: b}", "the key 'name' stands there twice: keep one"), ("run={~: a}", "the key None is no text"),
    ("tables.probes={[a]: /x}", "unhashable key"), ("corpus.sources=[{root: /a #3}]", "override .*put quotes around"),
    ("run.nmae=x", "run.nmae: Extra inputs are not permitted; there are experiment, name, seed"),
    ("cluster.retries=!!python/object/apply:os.system [x]", "could not determine a constructor"),
    ("corpus.sources.².root=x", "'²' is not one of the 1 items"), ("corpus.sources.-1.root=x", "'-1' is not one of"),
    ("run.name.x=3", "is a value, not a section"), ("=b", "not of the form"), ("tables.suites=abx", "valid tuple .got abx")])
def test_what_no_field_can_be_is_refused_by_key(override, message, file):
    with pytest.raises(ConfigError, match=message):
        load_config(file(BODY + "run: {name: r}\n"), [override])


@pytest.mark.parametrize(("text", "message"), [
    (BODY.encode() + "# für Ä\n".encode("latin-1"), "invalid start byte.*save it as text in UTF-8"),
    (BODY.encode() + b"\0", "special characters are not allowed"), (bytes(range(256)), "is not YAML"),
    ("corpus:\n\tname: x\n", r"line 2, column 1: .*cannot start any token; indent by spaces"),
    (BODY + "run: {name: a}\nrun: {name: b}\n", "line 3, column 1: the key 'run' stands there twice: keep one"),
    (BODY + "run:\n  name: a\n  'name': b\n", "line 4, column 3: the key 'name' stands there twice"),
    ("a: 1\n---\nb: 2\n", "line 2.*expected a single document in the stream, but found another"),
    ("", "holds nothing, expected sections"), ("# x\n", "holds nothing"), ("[]", "holds a list"), ("no", "holds a single text"),
    ("hello", "holds a single text"), (BODY + "tables: *nope\n", "line 2, column 9: found undefined alias 'nope'"),
    (BODY + "tables: &a {probes: *a}\n", "is not YAML|error"), (BODY + "tables: {suites: &a [*a]}\n", "is not YAML|error"),
    (BODY + "tables: {<<: [3]}\n", "is not YAML.*merging"), (BODY + "? [a]\n: b\n", "unhashable"),
    (BODY + "~: x\n", "is no text"),
    (BODY + "1: x\n", "1: Extra inputs are not permitted"), (BODY + "run: !x {name: a}\n", "constructor for the tag '!x'"),
    (BODY + "run: {seed: !!int x}\n", "is not YAML: invalid literal"), (BODY + "run:\n", "my.yaml has .*\n  run: .*mean none"),
    ("corpus: {name: 3, sources: }\n", "sources: .*mean none")])
def test_a_file_that_cannot_be_meant_is_named_with_the_place_and_the_fix(text, message, file):
    with pytest.raises(ConfigError, match=message) as e:
        load_config(file(text))
    assert "my.yaml" in str(e.value)


@pytest.mark.parametrize("text", [
    BODY.encode("utf-8-sig"), BODY.encode("utf-16"), BODY.replace("\n", "\r\n").encode(), ("---\n" + BODY + "...\n").encode(),
    b'{"corpus": {"name": "c", "sources": [{"kind": "folder", "name": "f", "root": "/audio"}]}}'])
def test_the_encodings_of_yaml_and_json_are_read(text, file):
    assert load_config(file(text)).corpus.sources[0].root == "/audio"


def test_texts_of_a_file_stay_as_they_are_written_and_anchors_and_merges_work(file):
    cfg = load_config(file(BODY.replace("name: c", "name: 010") + "run: {name: no, experiment: 2024-01-01}\n"
                           "tables: {<<: {sounds: 3, utterances: 4}, sounds: 5}\nstore: &s /st\ntracking: *s\n"))
    assert (cfg.corpus.name, cfg.run.name, cfg.run.experiment) == ("010", "no", "2024-01-01")
    assert (cfg.tables.sounds, cfg.tables.utterances, cfg.tracking) == (5, 4, "/st")
    assert all(type(x) is str for x in (cfg.corpus.name, cfg.run.name, cfg.tracking, cfg.corpus.sources[0].root))


def test_places_that_are_no_file_are_named(tmp_path, file):
    for place, message in ((str(tmp_path), "is a folder: name the YAML file"), (f"{tmp_path}/no.yaml", "no config file"),
                           (f"{file(BODY)}/x", "cannot be read: Not a"), ("/" + "a" * 300, "cannot be read: File name")):
        with pytest.raises(ConfigError, match=message) as e:
            load_config(place)
        assert place in str(e.value)


def test_the_locale_does_not_matter_and_a_file_may_have_an_equals_sign(tmp_path, file):
    path = file(BODY.replace("/audio", "/für/Ä"), "a=b.yaml")
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "workflows/full_pipeline.py", path, "--dry-run", "corpus.sources.0.name=ü"],
                          cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 2 and b"a=b.yaml has 2 error(s)" in done.stderr and rb"f\xfcr" in done.stderr, done.stderr
