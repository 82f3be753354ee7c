"""The step functions: every reference leads to a function, and the graph uses all of them."""

from __future__ import annotations

from pkgutil import resolve_name

import pytest

from audiolm.config.load import load_config
from audiolm.pipeline.steps import FUNCTIONS
from tests.worlds.basics import ROOT
from workflows.full_pipeline import graph


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_reference_leads_to_a_function(name):
    fn = FUNCTIONS[name]
    reference = fn if isinstance(fn, str) else fn.args[0] if hasattr(fn, "args") else None
    assert callable(resolve_name(reference) if reference else fn)


def test_the_shipped_recipes_use_every_function_that_needs_no_file():
    used = [s.fn for name in ("small", "paper", "adapt") for s in graph(load_config(str(ROOT / "workflows" / f"{name}.yaml"), [
        "semantic.residual={}", "semantic.vocoder={}"]))]
    unused = {name for name, fn in FUNCTIONS.items() if fn not in used}
    assert unused == {"import_encoder", "import_codec", "choose_layer"}
