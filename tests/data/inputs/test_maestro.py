"""MAESTRO's folder: its splits by piece are kept, and what is missing is named with the fix."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from audiolm.config.base import ConfigError
from audiolm.config.corpus import CorpusConfig, MaestroSource
from audiolm.config.run import ClusterConfig
from audiolm.data import sources
from audiolm.data.clips import read_clips
from audiolm.data.manifest import build_manifest

COLUMNS = ("canonical_composer", "canonical_title", "split", "year", "midi_filename", "audio_filename", "duration")
PIECES = [("Frédéric Chopin", "Ballade No. 1, Op. 23", "train", "2004"),
          ("Frédéric Chopin", "Étude Op. 10 No. 1", "test", "2006"),
          ("Johann Sebastian Bach", 'Prelude "and" Fugue', "validation", "2004"),
          ("Frédéric Chopin", "Ballade No. 1, Op. 23", "train", "2008")]


def rows_of(pieces) -> list[dict]:
    return [dict(zip(COLUMNS, (*piece, f"{piece[3]}/MIDI-{i}.midi", f"{piece[3]}/MIDI-{i}.wav", 2.0), strict=True))
            for i, piece in enumerate(pieces)]


def write(root, rows, columns=COLUMNS, name="maestro-v3.0.0.csv") -> MaestroSource:
    with open(root / name, "w", encoding="utf-8", newline="") as f:
        table = csv.DictWriter(f, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    return MaestroSource(kind="maestro", name="maestro", root=str(root))


@pytest.fixture
def root(tmp_path):
    """Two seconds of stereo sound at 44.1 kHz for each row, and one that the table does not have."""
    t = np.arange(2 * 44_100) / 44_100
    for i, row in enumerate([*rows_of(PIECES), {"audio_filename": "2008/other.wav"}]):
        path = tmp_path / row["audio_filename"]
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, np.stack([0.3 * np.sin(2 * np.pi * 220 * (i + 1) * t)] * 2, 1), 44_100)
    return tmp_path


def build(source, out) -> tuple[dict, list]:
    out.mkdir()
    corpus = CorpusConfig(name="c", sources=(source,))
    reports = SimpleNamespace(path=str(out), inline=True, progress=lambda *a: None, check=lambda: None)
    return build_manifest({"corpus": corpus, "seed": 0, "cluster": ClusterConfig()}, {}, reports), read_clips(str(out))


def test_its_splits_are_kept(root, tmp_path):
    facts, clips = build(write(root, rows_of(PIECES)), tmp_path / "out")
    assert {(c.parts[0].uri, c.split, c.speaker) for c in clips} == {
        (row["audio_filename"], "dev" if row["split"] == "validation" else row["split"],
         f"{row['canonical_composer']}: {row['canonical_title']}") for row in rows_of(PIECES)}
    assert facts["remarks"] == [] and facts["speakers"] == {"train": 1, "dev": 1, "test": 1}


def test_a_piece_in_two_splits_is_told(root, tmp_path):
    pieces = [*PIECES[:3], (*PIECES[3][:2], "test", "2008")]
    facts, _ = build(write(root, rows_of(pieces)), tmp_path / "out")
    assert any("are in train and are held out: Frédéric Chopin: Ballade No. 1" in remark for remark in facts["remarks"])


def test_what_is_missing_is_named(root):
    def error(source) -> str:
        with pytest.raises(ConfigError) as e:
            sources.survey(source)
        return str(e.value)

    rows = rows_of(PIECES)
    assert "has no column canonical_title, split" in error(write(root, rows, ("canonical_composer", "audio_filename")))
    assert "row 1 has no audio_filename" in error(write(root, [rows[0], {**rows[1], "audio_filename": ""}]))
    assert "'split' holds 'dev' in row 0" in error(write(root, [{**rows[0], "split": "dev"}]))
    assert "has no rows" in error(write(root, []))
    assert "4 files of" in (text := error(write(root, [{**r, "audio_filename": f"x{r['audio_filename']}"} for r in rows])))
    assert "the one of MIDI files has none" in text
    source = write(root, rows, name="maestro-v2.0.0.csv")
    assert "holds maestro-v2.0.0.csv, maestro-v3.0.0.csv: keep the one" in error(source)
    (root / "maestro-v3.0.0.csv").unlink()
    assert "holds no maestro*.csv: name the folder" in error(source.model_copy(update={"root": str(root / "2004")}))
    assert "does not exist" in error(source.model_copy(update={"root": str(root / "2030")}))
    (root / rows[3]["audio_filename"]).unlink()
    found = sources.survey(source)[0]  # one file alone is a rejected row
    assert [f.size < 0 for f in found] == [r is rows[3] for r in sorted(rows, key=lambda r: r["audio_filename"])]
