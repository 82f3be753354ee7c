"""A tiny run as a driver leaves it: untrained tokenizers and stages, an index, checkpoints of lm_semantic.

`finish` writes it beside the `world` of encoded_corpus.py; `tell` logs it to MLflow.
"""

from __future__ import annotations

import shutil

import safetensors.torch
import torch

from audiolm import store
from audiolm.config.evaluation import EvaluateConfig
from audiolm.config.lm import SamplesConfig
from audiolm.config.pipeline import Pipeline
from audiolm.config.run import ClusterConfig
from audiolm.lm.layouts import build_stages
from audiolm.lm.model import build_lm, export_lm
from audiolm.tracking.tracker import Tracker
from tests.worlds.encoded_corpus import N_Q, SHAPE, STAGES, VOCAB, K

NAMES = ("manifest", "kmeans", "codec", "semantic_tokens", "acoustic_tokens", "lm_semantic", "lm_coarse", "lm_fine")


def finish(world, folder: str) -> tuple[str, str]:
    """Trains nothing: exports stages beside the world's tokens; returns the run's index and the build of lm_semantic."""
    torch.manual_seed(1)
    paths = {n: str(world.root / n) for n in NAMES}
    build = f"{folder}/lm_semantic/abcdef/0001"
    for name, stage in build_stages(STAGES, N_Q, VOCAB, K).items():
        for step in (2, 1, 3) if name == "lm_semantic" else (0,):
            weights, about = export_lm(build_lm(stage, SHAPE), stage)
            at = f"{build}/checkpoints/{step:08d}-0001" if step else paths[name]
            store.put(f"{at}/export/model.safetensors", safetensors.torch.save(weights))
            store.put_json(f"{at}/export/config.json", about)
    shutil.copytree(f"{build}/checkpoints/00000002-0001/export", f"{build}/0001/export")
    paths |= {"lm_semantic": f"{build}/0001", "evaluate": f"{folder}/evaluate/abcdef/0001/0001"}
    store.put_json(f"{folder}/evaluate/abcdef/0001/done.json", {"inputs": {"lm_semantic": "abcdef.0001"}})
    for step, loss in ((1, 2.5), (2, 2.0), (3, 2.25)):
        commit(build, step, loss, best=min(step, 2))
    store.put_json(f"{folder}/lm_semantic/abcdef/recipe.json", {"config": {"lm": {"dim": 16}, "seed": 0}})
    cfg = Pipeline(run={"name": "tiny"}, store=folder, corpus=world.corpus, lm=STAGES, cluster=ClusterConfig(device="cpu"),
                   evaluate=EvaluateConfig(clips=2, clip_s=1.0, rows=4), samples=SamplesConfig(prompt_s=0.4))
    index = f"{folder}/runs/tiny.json"
    store.put_json(index, {"run": "tiny", "steps": {n: {"path": p} for n, p in paths.items()},
                           "config": cfg.model_dump(mode="json")})
    return index, build


def commit(build: str, step: int, loss: float, best: int, **more) -> None:
    store.put_json(f"{build}/commits/{step:08d}.json", {
        "step": step, "folder": f"{step:08d}-0001", "export": "lm", "validation": {"step": step, "loss": loss},
        "validated": 7.25 + step, "best_step": best, **more})


def prune(build: str, step: int, loss: float, best: int) -> None:
    commit(build, step, loss, best, pruned=True)
    store.remove(f"{build}/checkpoints/{step:08d}-0001")


def tell(uri: str, folder: str, build: str) -> Tracker:
    """Shows the run and its checkpoints in MLflow; checkpoint 1 is pruned afterwards."""
    t = Tracker(uri, folder, "tests", "tiny")
    t.start({"run.name": "tiny"}, {"store": folder})
    run = t.begin_step("lm_semantic", "a", {}, {})
    t.ship(run, f"{build}/metrics-0001.jsonl", build)
    assert t.flush(60)
    prune(build, 1, 2.5, 1)
    t.end_step(run, "FINISHED", {}, None)
    t.finish("FINISHED")
    return t
