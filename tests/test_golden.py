"""Golden runs: losses, tokens, samples, figures and recipes are those on record (see tests/golden/freeze.py)."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest

from tests.golden import freeze
from tests.worlds.basics import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """One store for all: a step that two goldens share runs once."""
    return str(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", freeze.GOLDENS)
def test_what_is_on_record_is_what_comes_out(name, folder):
    differences, note = freeze.compare(name, freeze.GOLDENS[name](folder))
    if note:
        warnings.warn(f"{name}: {note}", stacklevel=1)
    assert not differences, "\n".join(differences)


def recorded(name: str) -> dict:
    return json.loads((freeze.HERE / f"{name}.json").read_text())


def test_recipes_do_not_depend_on_where_the_checkout_is(tmp_path, monkeypatch):
    for name in freeze.SHIPPED:
        (tmp_path / "workflows").mkdir(exist_ok=True)
        shutil.copy(ROOT / "workflows" / f"{name}.yaml", tmp_path / "workflows")
    monkeypatch.setattr(freeze, "ROOT", tmp_path)
    assert freeze.fingerprints() == recorded("fingerprints")


def test_a_changed_recipe_is_named_by_config_and_step():
    found = recorded("fingerprints")
    found["speech"] |= {"codec": "0123456789ab", "new": "1"}
    (changed, new), note = freeze.compare("fingerprints", found)
    assert changed.startswith("fingerprints.speech.codec: ") and changed.endswith(" -> 0123456789ab") and not note
    assert new == "fingerprints.speech.new: absent -> 1"


@pytest.mark.parametrize(("factor", "here", "elsewhere"), [(1.0, 0, 0), (1 + 2e-16, 1, 0), (1 + 1e-5, 1, 0), (1 + 1e-3, 1, 1)])
def test_one_bit_counts_on_the_same_machine_and_a_ten_thousandth_on_another(factor, here, elsewhere, tmp_path):
    record = recorded("codec")
    (tmp_path / "codec.json").write_text(json.dumps(record))
    found = {**record, "losses": [*record["losses"][:-1], (float.fromhex(record["losses"][-1]) * factor).hex()]}
    differences, note = freeze.compare("codec", found, tmp_path)
    assert len(differences) == here and not note
    assert all(d.startswith("codec.losses[19]: ") for d in differences)
    other = {**found, "machine": {**record["machine"], "torch": "1.0"}, "last": {}}
    differences, note = freeze.compare("codec", other, tmp_path)
    assert len(differences) == elsewhere and f"torch {record['machine']['torch']} -> 1.0" in note


@pytest.mark.parametrize("name", ["codec", "codec_balanced", "codec_paper", "vocoder"])
def test_the_adversary_takes_part(name):
    assert {"adversarial", "feature", "discriminator"} <= set(recorded(name)["last"])
