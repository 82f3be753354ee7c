"""ABX over a masked model's training: its checkpoints as extractors, oldest first."""

from __future__ import annotations

from collections.abc import Iterator

from audiolm import store
from audiolm.tokenizers.extractor import Extractor, rebuilt
from audiolm.tokenizers.semantic import ArtefactError
from audiolm.train import checkpoint
from audiolm.train.commits import commits


def checkpoints(build: str, device: str = "cpu") -> Iterator[tuple[int, Extractor]]:
    """(step, encoder) of each checkpoint that the build keeps. Raises ArtefactError where it is no finished masked model of
    ours."""
    config = store.get_json(store.join(build, "export", "config.json"))
    kept = [c for c in commits(build) if not c.get("pruned")]
    if config is None or "encoder" not in config or not kept:
        raise ArtefactError(f"{build} is no finished masked_model build with checkpoints: give one that was trained here")
    for commit in kept:
        state = checkpoint.load(build, commit, "model")
        weights = {name.partition("/encoder.")[2]: value for name, value in state.items()
                   if name.startswith(("param/encoder.", "buffer/encoder."))}
        yield commit["step"], rebuilt(config, weights).to(device)
