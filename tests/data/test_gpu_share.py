"""Tasks of the token steps share a GPU as the config says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from audiolm.config.corpus import ClipFilter
from audiolm.config.run import ClusterConfig
from audiolm.config.tokens import TokensConfig
from audiolm.data import parallel
from audiolm.tokenizers import encode, kmeans_fit
from audiolm.tokenizers.extractor import Window


class Asked(Exception):
    """Raised in a task's place, with the share of a GPU it would hold."""


@pytest.mark.parametrize(("device", "share"), [("cuda", 0.25), ("cuda", 0.5), ("cpu", 0)])
def test_a_task_holds_its_share(world, recording_out, monkeypatch, device, share):
    def ask(*_, gpu, **how):
        raise Asked(gpu)

    cluster = ClusterConfig(device=device, **({"gpus_a_task": share} if share else {}))
    monkeypatch.setattr(parallel, "pick_device", lambda asked: device)
    monkeypatch.setattr(encode, "parallel_each", ask)
    monkeypatch.setattr(kmeans_fit, "parallel_map", ask)
    inputs = {n: SimpleNamespace(path=str(world.root / n), build=f"{n}.0001") for n in ("manifest", "kmeans", "codec")}
    config = {"which": "acoustic", "tokens": TokensConfig(), "corpus": world.corpus, "seed": 0, "cluster": cluster}
    with pytest.raises(Asked) as asked:
        encode.encode_tokens(config, inputs, recording_out)
    assert asked.value.args == (share,)
    source = kmeans_fit.FeatureSource(str(world.root / "kmeans"), 1, Window(400, 50), inputs["manifest"].path, ClipFilter(),
                                      {}, 0, device)
    with pytest.raises(Asked) as asked:
        kmeans_fit.sample_features(source, 100, recording_out, cluster)
    assert asked.value.args == (share,)


def test_four_tasks_share_a_gpu_by_default():
    assert ClusterConfig().gpus_a_task == 0.25
    with pytest.raises(ValueError, match="gpus_a_task"):
        ClusterConfig(gpus_a_task=0)
