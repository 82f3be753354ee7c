"""The bench of 60,000 hours, all its parts at tiny size in this process."""

from __future__ import annotations

from tests.bench import scale


def test_all_parts_at_tiny_size(tmp_path):
    folder = f"{tmp_path}/corpus"
    scale.build(folder, 2000)
    found = {name: part(folder) for name, part in scale.PARTS.items()}
    assert found["missing"] == "3 of 6 shards" and found["pair"] == "2 x 6 shards"
    assert found["packing"].startswith("1333 clips in ") and found["crops"].endswith("clip corpus/2/0")
