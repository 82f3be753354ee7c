"""Publishes a trained system: the exports of its steps in float16, in a folder that loads like a run.

The folder is what `audiolm.pretrained` ships as a system: NAME.json, a run's index with relative paths, and STEP/export of the
tokenizers and language models.  semantic_tokens is a finished build with the facts of the store that stage 1 was trained on,
and no clip.  Nothing in it names a path of the machine.  The same run gives the same bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from audiolm import store
from audiolm.dag.outputs import build_of, path_of
from audiolm.data.tokens import OWN, index_shards, read_meta, shard_bytes, shard_name
from audiolm.generate.load import load, system_steps
from audiolm.tokenizers.artifact import read_export, write_export
from audiolm.tokenizers.extractor import Window
from audiolm.tokenizers.publish import half_precision, without_paths
from audiolm.tokenizers.semantic import extractor_from_export, save_semantic


@dataclass(frozen=True)
class PublishedSystem:
    """A published system, and how its tokenizers compare with the run's."""

    path: str  # of its index
    size: int  # bytes of all files
    equal_tokens: float  # share of equal semantic tokens
    equal_codes: float  # share of equal codes of all levels


def publish_system(index: str, out: str, name: str, wavs: Sequence[np.ndarray], force: bool = False) -> PublishedSystem:
    """Writes the system of a run's index to the local folder `out`/`name`; compares the tokens of wav_T at 16 kHz.

    The folder appears whole, after the float16 system was loaded.  Raises ValueError for a run that is not finished, weights
    beyond float16's range, and a folder that is there already (without `force`).
    """
    target = os.path.join(out, name)
    if os.path.exists(target) and not force:
        raise ValueError(f"--out: {target} exists already: name another folder or --name, or --force")
    steps, found = system_steps(index), store.get_json(index)
    os.makedirs(out, exist_ok=True)
    aside = tempfile.mkdtemp(dir=out)
    try:
        digest = _half(steps["codec"], f"{aside}/codec")
        _semantic(steps["kmeans"], f"{aside}/kmeans")
        _facts(steps["semantic_tokens"], f"{aside}/semantic_tokens")
        for step in sorted(steps.keys() - {"codec", "kmeans", "semantic_tokens"}):
            _half(steps[step], f"{aside}/{step}", **({"codec": digest} if step == "lm_decoder" else {}))
        paths = {**{step: step for step in steps}, "semantic_tokens": path_of("semantic_tokens", 1)}
        store.put_json(f"{aside}/{name}.json", {
            "run": name, "corpus": found["corpus"], "steps": {step: {"path": path} for step, path in paths.items()},
            "config": without_paths(found["config"])})
        equal = _compare(load(steps), load(system_steps(f"{aside}/{name}.json")), wavs)
        if os.path.exists(card := f"{target}/README.md"):  # written by hand
            shutil.copy(card, aside)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(os.path.getsize(os.path.join(folder, f)) for folder, _, files in os.walk(target) for f in files)
    return PublishedSystem(f"{target}/{name}.json", size, *equal)


def _half(build: str, out: str, **changes: str) -> str:
    """Writes a build's export in float16, with changes of its config; returns its digest."""
    weights, config, _ = read_export(build)
    config = {key: value for key, value in config.items() if key != "weights_sha256"} | changes
    write_export(out, half_precision(weights), without_paths(config))
    return read_export(out)[2]


def _semantic(build: str, out: str) -> None:
    """Writes a semantic tokenizer's export in float16; its golden tokens are those of the rounded weights."""
    weights, config, _ = read_export(build)
    halves = {name: value.float() for name, value in half_precision(weights).items()}
    extractor = extractor_from_export(config, {name.removeprefix("encoder."): value for name, value in halves.items()
                                               if name.startswith("encoder.")})
    save_semantic(out, extractor, config["layer"], halves["zscore.mean"], halves["zscore.std"], halves["centroids"],
                  Window(config["window_frames"], config["overlap_frames"]), without_paths(config["source"]))
    weights, config, _ = read_export(out)
    write_export(out, half_precision(weights), {k: v for k, v in config.items() if k != "weights_sha256"})


def _facts(build: str, out: str) -> None:
    """A token store without clips: how its tokenizer computed, and the mean run length."""
    meta = {key: value for key, value in read_meta(store.join(build, shard_name(0))).items() if key not in OWN}
    done = store.get_json(store.join(build_of(build), "done.json"))
    store.put(f"{path_of(out, 1)}/{shard_name(0)}", shard_bytes([], [], meta | {"shards": 1}, 0, dedup=True))
    index_shards(path_of(out, 1))
    store.put_json(f"{out}/done.json", {"facts": {"mean_run": done["facts"]["mean_run"]}})


def _compare(original, published, wavs: Sequence[np.ndarray]) -> tuple[float, float]:
    """Shares of equal semantic tokens and of equal codes."""
    shares = []
    for encode in ("tokenize", "encode"):
        pairs = zip(getattr(original, encode)(wavs), getattr(published, encode)(wavs), strict=True)
        shares.append(float(torch.cat([torch.from_numpy((a == b).ravel()) for a, b in pairs]).double().mean()))
    return shares[0], shares[1]
