"""The token store: what is written is read, and tokens that do not belong together are refused."""

from __future__ import annotations

import numpy as np
import pytest

from audiolm import store
from audiolm.data import token_index, tokens
from audiolm.data.parquet import DamagedFile

SEMANTIC = {"name": "semantic", "sample_rate": 16_000, "hop": 640, "n_q": 1, "vocab": 50}
ACOUSTIC = {"name": "codec", "sample_rate": 16_000, "hop": 320, "n_q": 3, "vocab": 1024}


def meta(spec, shards=1, **changed):
    return {"which": spec["name"], "spec": spec, "hash": "abc", "manifest": "m.0001", "shards": shards, "device": "cpu",
            "dtype": "float32", "versions": {"torch": "x"}, **changed}


def codes(spec, frames, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, spec["vocab"], (n, spec["n_q"])) for n in frames]


def write(folder, spec, frames_by_shard, ids=None, **changed):
    for k, frames in enumerate(frames_by_shard):
        names = ids or [f"clip-{k}-{i}" for i in range(len(frames))]
        data = tokens.shard_bytes(names, codes(spec, frames, k), meta(spec, len(frames_by_shard), **changed), k,
                                  dedup=spec is SEMANTIC)
        store.put(store.join(str(folder), tokens.shard_name(k)), data)
    tokens.index_shards(str(folder))
    return str(folder)


def test_round_trip_across_row_groups(tmp_path):
    frames = [int(n) for n in np.random.default_rng(1).integers(1, 30, 450)]  # three row groups
    path = write(tmp_path / "a", ACOUSTIC, [frames])
    expected = codes(ACOUSTIC, frames, 0)
    found = tokens.TokenStore(path).read(0, ["id", "n_frames", "q00", "q02"])
    assert list(found["id"]) == [f"clip-0-{i}" for i in range(450)]
    assert list(found["n_frames"]) == frames
    assert found["q02"].values.dtype == np.uint16
    for i, c in enumerate(expected):
        assert np.array_equal(found["q00"][i], c[:, 0]) and np.array_equal(found["q02"][i], c[:, 2])


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.8, 0.98, 1.0])
def test_a_flipped_bit_anywhere_is_found_and_the_file_named(tmp_path, share):
    path = tmp_path / tokens.shard_name(0)
    write(tmp_path, ACOUSTIC, [[400, 300, 500]])
    data = bytearray(path.read_bytes())
    data[min(len(data) - 9, int(share * len(data)))] ^= 4
    path.write_bytes(data)
    with pytest.raises((DamagedFile, tokens.TokenError), match=str(path)):
        opened = tokens.TokenStore(str(tmp_path))
        opened.read(0, ["id", "n_frames", "q00", "q01", "q02"])
        opened.codes(0, (0, 1, 2))
        tokens.read_record(str(path), len(data))


def test_levels_side_by_side_across_row_groups(tmp_path):
    frames = [int(n) for n in np.random.default_rng(1).integers(1, 30, 450)]
    opened = tokens.TokenStore(write(tmp_path / "a", ACOUSTIC, [frames]))
    firsts, codes_TQ = opened.codes(0, (2, 0))
    assert firsts.tolist() == [0, *np.cumsum(frames)] and codes_TQ.dtype == np.uint16
    assert np.array_equal(codes_TQ, np.concatenate(codes(ACOUSTIC, frames, 0))[:, [2, 0]])


def test_largest_code_survives_and_larger_is_refused():
    spec = {**ACOUSTIC, "vocab": 65_535, "n_q": 1}
    top = np.array([[0], [65_534]])
    assert tokens.shard_bytes(["a"], [top], meta(spec), 0, dedup=False)
    for wrong in (top + 1, top - 1, top[:, [0, 0]], top[:0]):
        with pytest.raises(tokens.TokenError, match="clip a"):
            tokens.shard_bytes(["a"], [wrong], meta(spec), 0, dedup=False)


def test_n_dedup_counts_runs(tmp_path):
    z = np.array([3, 3, 3, 5, 5, 3])[:, None]
    store.put(str(tmp_path / "shard-00000.parquet"), tokens.shard_bytes(["a"], [z], meta(SEMANTIC), 0, dedup=True))
    tokens.index_shards(str(tmp_path))
    found = tokens.TokenStore(str(tmp_path)).read(0, ["n_frames", "n_dedup", "q00"])
    assert (found["n_frames"][0], found["n_dedup"][0]) == (6, 3)
    assert np.array_equal(found["q00"][0], z[:, 0])  # stored as encoded


def test_equal_tokens_are_equal_bytes(tmp_path):
    a, b = write(tmp_path / "a", ACOUSTIC, [[4, 5]]), write(tmp_path / "b", ACOUSTIC, [[4, 5]])
    assert store.get(f"{a}/shard-00000.parquet") == store.get(f"{b}/shard-00000.parquet")


def test_a_store_says_what_it_is(store):
    opened = tokens.TokenStore(write(store, ACOUSTIC, [[4], [5, 6]]))
    assert (opened.spec, opened.hash, opened.shards) == (ACOUSTIC, "abc", 2) and tokens.spec_of(store) == ACOUSTIC
    assert [f["clips"] for f in opened.files] == [1, 2]
    assert np.array_equal(opened.codes(1, (0, 1, 2))[1], np.concatenate(codes(ACOUSTIC, [5, 6], 1)))


def test_what_the_index_does_not_say_of_the_files_is_refused(tmp_path):
    path = write(tmp_path, ACOUSTIC, [[4], [5], [6]])
    first, second, index = (tmp_path / name for name in (tokens.shard_name(0), tokens.shard_name(1), token_index.NAME))
    kept = {file: file.read_bytes() for file in (first, second, index)}

    def refused(message):
        with pytest.raises(tokens.TokenError, match=message):
            tokens.TokenStore(path)
        for file, data in kept.items():
            file.write_bytes(data)

    second.unlink()
    refused("lacks 1 of 3 shards, first shard-00001.parquet; .*--repair")
    second.write_bytes(kept[second][:-1])
    refused("shard-00001.parquet has [0-9]+ bytes, the index says [0-9]+, and 0 more shards differ; .*--repair")
    index.unlink()
    refused("has no index shards.parquet of its 3 shards: .*--repair")
    for damage in (kept[index][:-20], kept[index].replace(b"digest", b"dagest"), b"not parquet"):
        index.write_bytes(damage)
        refused("the index .*shards.parquet is damaged .*--repair")
    (tmp_path / tokens.shard_name(3)).write_bytes(kept[second])
    refused("holds 1 files that its index does not name, first shard-00003.parquet: remove them")
    with pytest.raises(tokens.TokenError, match="no token shards"):
        tokens.TokenStore(str(tmp_path / "none"))


def test_a_shard_of_another_tokenizer_is_refused_where_it_stands(tmp_path):
    path = write(tmp_path, ACOUSTIC, [[4], [5], [6]])
    opened = tokens.TokenStore(path)
    data = tokens.shard_bytes(["clip-1-0"], codes(ACOUSTIC, [5], 1), meta(ACOUSTIC, 3, hash="abd"), 1, dedup=False)
    store.put(f"{path}/shard-00001.parquet", data)
    with pytest.raises(tokens.TokenError, match="shard-00001.parquet is not the shard .*'abd', the index has 'abc'.*--repair"):
        opened.codes(1, (0,))
    with pytest.raises(tokens.TokenError, match="hash is 'abc' in shard 0 but 'abd' in shard 1"):
        tokens.index_shards(path)


def test_other_files_are_refused(tmp_path):
    store.put(str(tmp_path / "shard-00000.parquet"), b"not parquet")
    with pytest.raises(DamagedFile, match="shard-00000.parquet is damaged .*--repair"):
        tokens.index_shards(str(tmp_path))


def test_the_index_holds_n_dedup_of_every_clip_and_shards_may_end_in_any_order(tmp_path):
    path = write(tmp_path, SEMANTIC, [[4, 9], [7], [5, 6, 8]])
    n_dedup, firsts = tokens.TokenStore(path).index.n_dedup()
    columns = [tokens.read_shard(f"{path}/{tokens.shard_name(k)}", ["n_dedup"])["n_dedup"] for k in range(3)]
    assert firsts.tolist() == [0, 2, 3, 6] and np.array_equal(n_dedup, np.concatenate(columns))
    builder = token_index.IndexBuilder(np.array([2, 1, 3]), dedup=True)
    for k in (2, 0, 1):
        file = f"{path}/{tokens.shard_name(k)}"
        builder.add(tokens.read_record(file, store.size(file)))
    assert builder.to_bytes() == store.get(f"{path}/{token_index.NAME}")


def test_missing_column_is_named(tmp_path):
    opened = tokens.TokenStore(write(tmp_path, SEMANTIC, [[4]]))
    with pytest.raises(tokens.TokenError, match="no column 'q01'"):
        opened.levels(0, [0, 1])


def pair(tmp_path, acoustic_frames=((8, 10), (6,)), **changed):
    semantic = tokens.TokenStore(write(tmp_path / "s", SEMANTIC, [[4, 5], [3]]))
    return semantic, tokens.TokenStore(write(tmp_path / "a", ACOUSTIC, acoustic_frames, **changed))


def test_a_pair_that_belongs_together_is_taken(tmp_path):
    tokens.check_pair(*pair(tmp_path))


@pytest.mark.parametrize("changed, message", [
    ({"manifest": "m.0002"}, "manifest 'm.0001' and 'm.0002'"),
    ({"acoustic_frames": ((8, 10),)}, "shards 2 and 1"),
    ({"acoustic_frames": ((8, 11), (6,))}, "clip clip-0-1 has 5 semantic and 11 acoustic frames"),
    ({"acoustic_frames": ((10, 8), (6,))}, "clip clip-0-0 has 4 semantic and 10 acoustic frames"),
    ({"acoustic_frames": ((8,), (6,))}, "2 and 1 clips"),
    ({"ids": ["clip-0-0", "other"], "acoustic_frames": ((8, 10), (6, 2))}, "row 1 is clip clip-0-1 and clip other"),
])
def test_a_pair_that_does_not_is_refused(tmp_path, changed, message):
    with pytest.raises(tokens.TokenError, match=message):
        tokens.check_pair(*pair(tmp_path, **changed))


def test_frame_rates_without_the_ratio_are_refused(tmp_path):
    semantic = tokens.TokenStore(write(tmp_path / "s", SEMANTIC, [[4]]))
    acoustic = tokens.TokenStore(write(tmp_path / "a", {**ACOUSTIC, "hop": 256}, [[10]]))
    with pytest.raises(tokens.TokenError, match="hop 640"):
        tokens.check_pair(semantic, acoustic)
