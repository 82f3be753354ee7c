"""A tiny run as a driver leaves it: untrained tokenizers and stages, an index, checkpoints of lm_semantic.

`finish` writes it beside the `world` of encoded_corpus.py; `tell` logs it to MLflow.  `saved_build` is a training's build with
one checkpoint of its state, as codecs and masked models leave it.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil

import safetensors.torch
import torch

from audiolm import store
from audiolm.config.base import identity
from audiolm.config.evaluation import EvaluateConfig
from audiolm.config.lm import SamplesConfig
from audiolm.config.pipeline import Pipeline
from audiolm.config.run import ClusterConfig
from audiolm.config.semantic import KMeansConfig, MaskedModelConfig, SemanticConfig
from audiolm.lm.layouts import build_stages
from audiolm.lm.model import build_lm, export_lm
from audiolm.models.conformer import MaskedModel
from audiolm.tracking.tracker import Tracker
from audiolm.train.objectives.masked_inputs import encoder_sizes
from tests.worlds.basics import HEADER
from tests.worlds.encoded_corpus import N_Q, SHAPE, STAGES, VOCAB, K
from tests.worlds.tiny_codec import SPECTRAL, tiny_codec, training

MASKED = MaskedModelConfig(objective="hubert", dim=8, layers=2, heads=1, ff=16, conv_kernel=3, targets_k=4)
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
                   semantic=SemanticConfig(model=MASKED, kmeans=KMeansConfig(layer=2, k=4)),
                   evaluate=EvaluateConfig(clips=2, clip_s=1.0, rows=4, visqol=False, wer=0),
                   samples=SamplesConfig(prompt_s=0.4))
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


def tell_steps(uri: str, folder: str, builds: dict[str, str]) -> Tracker:
    """Shows the run and the checkpoints of these trainings in MLflow."""
    t = Tracker(uri, folder, "tests", "tiny")
    t.start({"run.name": "tiny"}, {"store": folder})
    for step, build in builds.items():
        run = t.begin_step(step, "a", {}, {})
        t.ship(run, f"{build}/metrics-0001.jsonl", build)
        t.end_step(run, "FINISHED", {}, None)
    t.finish("FINISHED")
    return t


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


def triphones(world) -> str:
    """The override that names items and an alignment of two phones in the world's dev clips, whose speakers are held out."""
    rows = [f"dev-{n} {i * 0.12:.2f} {i * 0.12 + 0.12:.2f} {phone} x y s{n}\n"
            for n in range(2) for i, (phone, _) in enumerate(itertools.product("ab", range(3)))]
    for name, head in (("dev.item", HEADER), ("dev.phones", "")):
        store.put(str(world.root / name), (head + "".join(rows)).encode())
    return f"semantic.abx={{items: {world.root}/dev.item, audio: [{world.root}/audio], phones: {world.root}/dev.phones}}"


def saved_build(folder: str, step: str, config: dict, states: dict, at: int, validation: dict) -> tuple[str, dict]:
    """(build, commit) of a training that still runs, with the checkpoint of `at` steps; `config`: of its recipe."""
    build, digests = f"{folder}/{step}/abcdef/0001", {}
    for name, state in states.items():
        data = safetensors.torch.save(state)
        store.put(f"{build}/checkpoints/{at:08d}-0001/{name}.safetensors", data)
        digests[f"{name}.safetensors"] = hashlib.sha256(data).hexdigest()
    commit = {"step": at, "folder": f"{at:08d}-0001", "sha256": digests, "validated": 7.0, "best_step": at,
              "validation": {"step": at, **validation}}
    store.put_json(f"{build}/commits/{at:08d}.json", commit)
    store.put_json(f"{folder}/{step}/abcdef/recipe.json", {"step": step, "config": config})
    return build, commit


def codec_build(folder: str) -> str:
    """The build of a codec in training, at step 7; its codebooks are where its frames are."""
    objective, engines = training(tiny_codec(**SPECTRAL))
    objective._initialise()
    return saved_build(folder, "codec", {"codec": identity(objective.codec)}, {"generator": engines["generator"].state()}, 7,
                       {"mel": 0.5})[0]


def untrained_masked() -> tuple[MaskedModel, dict]:
    """A masked model of the sizes MASKED, and its state as a checkpoint keeps it."""
    torch.manual_seed(2)
    model = MaskedModel(encoder_sizes(MASKED), MASKED.targets_k)
    parameters = dict(model.named_parameters())
    return model, {f"{'param' if name in parameters else 'buffer'}/{name}": value.detach().clone()
                   for name, value in model.state_dict().items()}
