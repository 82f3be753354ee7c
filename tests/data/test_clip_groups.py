"""The manifest by row groups: what is read of it is what `read_clips` gives, and no other rows are read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from audiolm import store as stored
from audiolm.config.corpus import ClipFilter
from audiolm.data import clips as clips_data
from audiolm.data.clip_groups import ClipGroups
from audiolm.data.clip_table import read_clip_table, shard_sizes
from audiolm.data.clips import Clip, Part, clips_parquet, read_clips, shard_clips, token_clips

SPLITS = {"train": 4, "dev": 2, "test": 1}  # shards
ONLY_B = ClipFilter(source=("b",))


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """(path, clips): seven shards of three clips in row groups of two shards."""
    monkeypatch.setattr(clips_data, "ROWS", 6)
    found, shard = [], 0
    for split, shards in SPLITS.items():
        for _ in range(shards):
            for row in range(3):
                name, source, frames = f"{shard}-{row}", "ab"[row % 2], 1000 + 97 * len(found)
                part = Part(name, f"{name}.wav", 5, frames, 0, None, None, f"hash {name}")
                found.append(Clip(name, source, source, "s", split, 16_000 + 6_050 * row, frames, (part,), shard, row))
            shard += 1
    stored.put(f"{tmp_path}/clips.parquet", clips_parquet(found))
    return str(tmp_path), found


def test_row_groups_hold_whole_shards_of_one_split(manifest):
    path, clips = manifest
    groups = ClipGroups(path)
    assert [groups.read(g)["shard"].unique().to_pylist() for g in range(len(groups))] == [[0, 1], [2, 3], [4, 5], [6]]
    assert read_clips(path) == clips
    for where in (None, ONLY_B):
        assert read_clips(path, "dev", where) == [c for c in clips if c.split == "dev" and where in (None, ONLY_B)
                                                  and (where is None or c.source == "b")]


def test_only_the_row_groups_that_are_asked_for_are_read(manifest, monkeypatch):
    path, clips = manifest
    read, real = [], ClipGroups._read
    monkeypatch.setattr(ClipGroups, "_read", lambda self, file, group, columns: read.append(group) or
                        real(self, file, group, columns))
    assert shard_clips(path, 5) == [c for c in clips if c.shard == 5] and read == [2]
    assert shard_clips(path, 9) == [] and read == [2]
    read.clear()
    assert len(read_clips(path, "test")) == 3 and read == [3]
    read.clear()
    table = read_clip_table(path, "train")
    assert read == [0, 1]
    assert [table[i].id for i in (0, 1, 5)] == ["0-0", "0-1", "1-2"] and read == [0, 1, 0]  # once, then from memory


def test_a_table_has_the_numbers_of_its_clips(manifest, store):
    path, clips = manifest
    stored.put(f"{store}/clips.parquet", stored.get(f"{path}/clips.parquet"))
    assert shard_clips(store, 5) == [c for c in clips if c.shard == 5]
    for split, where in (("train", None), ("train", ONLY_B), ("dev", None), ("none", None)):
        table = read_clip_table(store, split, where)
        expected = [c for c in clips if c.split == split and (where is None or c.source == "b")]
        assert table.samples.tolist() == [c.samples for c in expected] and table.shards.tolist() == [c.shard for c in expected]
        assert [table[i] for i in range(len(table))] == expected


@pytest.mark.parametrize("speeds", [(), (0.9, 1.1)])
def test_the_sizes_of_shards_are_those_of_their_rows(manifest, speeds):
    path, _ = manifest
    rows, (rows_S, seconds_S) = token_clips(path, speeds), shard_sizes(path, speeds)
    for k in range(sum(SPLITS.values())):
        own = [c for c in rows if c.shard == k]
        assert shard_clips(path, k, speeds) == own
        assert rows_S[k] == len(own) and np.isclose(seconds_S[k], sum(c.seconds for c in own))


def test_a_shard_without_clips_is_an_error(manifest, tmp_path):
    stored.put(f"{tmp_path}/gap/clips.parquet", clips_parquet([replace(c, shard=c.shard + (c.shard > 2)) for c in manifest[1]]))
    with pytest.raises(ValueError, match="no clip lies in shard 3 of 8; .*--force manifest"):
        shard_sizes(f"{tmp_path}/gap")
