"""What pip builds: the wheel alone loads the published models, and neither archive carries the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

from audiolm import pretrained
from tests.worlds.basics import ROOT
from tests.worlds.tiny_codec import built_codec

BUILD = "import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"  # the hooks that pip calls
LOAD = """
import os, sys, torch, audiolm
from audiolm import pretrained
assert pretrained.ROOT.startswith(sys.argv[1]), pretrained.ROOT
for name in pretrained.names():
    codec = audiolm.load_codec(name, "cpu")
    codes_TQ = codec.encode(torch.zeros(1, 1280), torch.tensor([1280]))[0]
    print(name, codec.hash, tuple(codes_TQ.shape))
(sound,) = audiolm.load(pretrained.DEFAULT_SYSTEM, "cpu").unconditional(0.4, [0], may_end=False)
assert len(sound.wav_T) == 6400 and len(sound.z) and len(sound.codes_TQ) == 20, sound
"""


def build(kind: str, folder, out):
    """The archive of a source folder."""
    done = subprocess.run([sys.executable, "-c", BUILD.format(kind=kind), str(out)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.iterdir())


def test_a_wheel_of_the_source_archive_loads_the_published_models(tmp_path):
    # A copy: setuptools writes its notes beside the sources.
    for name in ("audiolm", "tests"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path / "source")
    built_codec(str(tmp_path / "source/audiolm/pretrained/tiny"))
    sdist = build("sdist", tmp_path / "source", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", source, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    shipped = {path.name for path in (tmp_path / "site").iterdir()}
    assert not (source / "tests").exists() and {name.split("-")[0] for name in shipped} == {"audiolm"}

    (tmp_path / "desk").mkdir()
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "site")], cwd=tmp_path / "desk", capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == 0, done.stderr
    loaded = [line.split()[0] for line in done.stdout.splitlines()]
    assert loaded == sorted({*pretrained.names(), "tiny"})
