"""THE pipeline: raw audio in, generated audio out; every step on one screen.

    python workflows/full_pipeline.py                         the embedded quickstart, on this machine
    python workflows/full_pipeline.py my.yaml lm.coarse.train.steps=2000
    ray job submit --working-dir . -- python workflows/full_pipeline.py workflows/paper.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a submitted job runs the code that was submitted

from audiolm.config.codec import CodecMetricsConfig  # noqa: E402
from audiolm.config.external import abx_files_config, semantic_metrics_config  # noqa: E402
from audiolm.config.lm import ParallelConfig, StageConfig  # noqa: E402
from audiolm.config.pipeline import Pipeline  # noqa: E402
from audiolm.config.semantic import IterationConfig, KMeansConfig, SemanticConfig  # noqa: E402
from audiolm.config.training import TrainConfig  # noqa: E402
from audiolm.dag.step import Step  # noqa: E402
from audiolm.pipeline.cli import main  # noqa: E402
from audiolm.pipeline.steps import FUNCTIONS  # noqa: E402
from audiolm.tokenizers.hf import imported_codec, imported_encoder, text_model  # noqa: E402
from audiolm.tokenizers.start import AnyStart, all_started, refuse_own_run, start_weights  # noqa: E402

# Sampled for the targets of an iteration of HuBERT: 22 hours, thousands of frames for each of their few clusters.
TARGET_FRAMES = 2_000_000


def graph(cfg: Pipeline) -> list[Step]:
    """The steps of a run in order: manifest, two tokenizers, their tokens, the stages, samples and results."""
    refuse_own_run(cfg)
    cfg = all_started(cfg)
    common = {"seed": cfg.run.seed, "cluster": cfg.cluster, "corpus": cfg.corpus}
    sem, lm, ev = cfg.semantic, cfg.lm, cfg.evaluate
    manifest = Step("manifest", FUNCTIONS["build_manifest"], common)

    # Both tokenizers, frozen before any language model sees their tokens, and how good they are.
    *masked, kmeans = semantic_steps(sem, common, manifest)
    codec, codec_figures = codec_steps(cfg, common, manifest)

    # The token stores; the codec computes in float32 whatever the dtype of the masked model.
    encode, exact = {**common, "tokens": cfg.tokens}, cfg.tokens.model_copy(update={"dtype": "float32"})
    z = Step("semantic_tokens", FUNCTIONS["encode_tokens"], {**encode, "which": "semantic"}, (manifest, kmeans), part="shard")
    y = Step("acoustic_tokens", FUNCTIONS["encode_tokens"], {**encode, "which": "acoustic", "tokens": exact},
             (manifest, codec), part="shard")
    semantic_figures = Step("semantic_figures", FUNCTIONS["measure_semantic"],
                            {**common, "figures": semantic_metrics_config(sem.abx, sem.where)}, (manifest, kmeans, z))

    decoders = []  # of semantic tokens alone: Table I needs them, nothing else does
    if sem.residual:
        decoders.append(Step("residual", FUNCTIONS["fit_residual"],
                             {**common, "residual": sem.residual, "where": sem.where}, (manifest, kmeans)))
    if sem.vocoder:
        decoders.append(Step("semantic_vocoder", FUNCTIONS["train_vocoder"], {**common, "vocoder": sem.vocoder},
                             (manifest, kmeans, *decoders), trains=sem.vocoder.train, version=2))

    # The language models: no fine stage where all levels are coarse; one parallel decoder may replace the acoustic ones.
    def stage(name: str, size: StageConfig | ParallelConfig, *stores: Step) -> Step:
        config = {**common, "stage": name, "lm": size, "layout": lm.layout(name), "rows": ev.rows,
                  **started(name.replace("_", "."), size.start, name)}
        if name == "lm_semantic" and size.warm_start:
            config["text_model"] = text_model(size.warm_start.uri)
        # A codec that fails its gates stops all stages, as nothing of theirs could be heard; its figures are no input.
        return Step(name, FUNCTIONS["train_lm"], config, (manifest, *stores), trains=size.train, version=6,
                    after=(codec_figures,))

    books, units = (codec,) if lm.tied else (), (kmeans,) if lm.centroids else ()
    first = "parallel" if lm.acoustic == "parallel" else "coarse"
    stages = [stage("lm_semantic", lm.semantic, z, *units), stage(f"lm_{first}", getattr(lm, first), z, y, *books, *units)]
    if cfg.has_fine:
        stages.append(stage("lm_fine", lm.fine, y, *books))
    if lm.decoder:
        config = {**common, "lm": lm.decoder, "rows": ev.rows, **started("lm.decoder", lm.decoder.start, "lm_decoder")}
        drawn = (stages[1],) if lm.decoder.drawn else ()
        stages.append(Step("lm_decoder", FUNCTIONS["train_decoder"], config, (manifest, kmeans, codec, z, y, *drawn),
                           trains=lm.decoder.train, after=(codec_figures,)))

    # Sound and results of the whole system.
    system = (manifest, kmeans, codec, z, y, *stages)
    samples = Step("samples", FUNCTIONS["make_samples"], {**common, "samples": cfg.samples}, system, version=2)
    measured = {**common, "samples": cfg.samples, "evaluate": ev, "lm": lm}
    evaluate = Step("evaluate", FUNCTIONS["run_evaluate"], measured, system, version=3)
    tables = Step("tables", FUNCTIONS["measure_tables"], {**measured, "tables": cfg.tables, "abx": sem.abx},
                  (*system, *decoders))
    report = Step("report", FUNCTIONS["build_report"], {"title": cfg.corpus.name},
                  (manifest, *masked, semantic_figures, codec, codec_figures, *stages, samples, evaluate, tables))
    return [manifest, *masked, kmeans, codec, codec_figures, z, semantic_figures, *decoders, y, *stages, samples, evaluate,
            tables, report]


def started(section: str, start: AnyStart | None, step: str) -> dict:
    """The weights that a training step starts from, as a part of its config; nothing where it starts from random ones."""
    return {"start": start_weights(f"{section}.start.uri", start, step)} if start else {}


def codec_steps(cfg: Pipeline, common: dict, manifest: Step) -> tuple[Step, Step]:
    """The codec, trained or imported, and its measurement beside shipped codecs."""
    config, ev = cfg.codec, cfg.evaluate
    if config.pretrained:
        codec = Step("codec", FUNCTIONS["import_codec"],
                     {"codec": imported_codec(config.pretrained, config.n_q, config.vocab)})
    else:
        codec = Step("codec", FUNCTIONS["train_codec"],
                     {**common, "codec": config, **started("codec", config.start, "codec")}, (manifest,),
                     trains=config.train, version=2)
    metrics = CodecMetricsConfig(where=config.where, clips=ev.clips, clip_s=ev.clip_s, visqol=ev.visqol,
                                 wer=ev.wer, asr=cfg.tables.asr, coarse_levels=cfg.lm.coarse_levels,
                                 with_lyra=ev.lyra is not None, lyra=ev.lyra, gates=config.gates)
    figures = {"cluster": cfg.cluster, "corpus": cfg.corpus, "figures": metrics}
    return codec, Step("codec_figures", FUNCTIONS["measure_codec"], figures, (manifest, codec))


def semantic_steps(sem: SemanticConfig, common: dict, manifest: Step) -> list[Step]:
    """The masked model, its further iterations, the choice of layer and K where they say auto, and k-means, which is last."""
    abx = abx_files_config(sem.abx) if sem.abx else None

    def clusters(suffix: str, name: str, config: KMeansConfig, model: Step) -> list[Step]:
        """k-means on a layer of a model, after a sweep over layers (and K) where the config leaves them to ABX."""
        sweeps = []
        if "auto" in (config.layer, config.k):
            sweep = sem.sweep if config.k == "auto" else sem.sweep.model_copy(update={"k": ()})
            choice = config.model_dump(include={"layer", "k", "window_s", "overlap_s"})
            sweeps = [Step("layers" + suffix, FUNCTIONS["choose_layer"],
                           {**common, **choice, "sweep": sweep, "abx": abx, "where": sem.where}, (manifest, model))]
        begun = started("semantic.kmeans", config.start, "kmeans")
        return [*sweeps, Step(name, FUNCTIONS["fit_kmeans"], {**common, "kmeans": config, "where": sem.where, **begun},
                              (manifest, model, *sweeps))]

    def training(name: str, train: TrainConfig, iteration: IterationConfig | None, *inputs: Step) -> Step:
        config = {**common, "model": sem.model, "train": train, "iteration": iteration, "where": sem.where}
        if iteration is None:  # later ones start as their own `start` says
            config |= started("semantic.model", sem.model.start, "masked_model")
        return Step(name, FUNCTIONS[f"train_{sem.model.objective}"], config, (manifest, *inputs), trains=train, version=2)

    if sem.tokenizer:
        start = start_weights("semantic.tokenizer.uri", sem.tokenizer, "kmeans")
        return [Step("kmeans", FUNCTIONS["take_tokenizer"], {"start": start})]
    if sem.pretrained:
        model = Step("masked_model", FUNCTIONS["import_encoder"], {"encoder": imported_encoder(sem.pretrained.uri)})
    else:
        model = training("masked_model", sem.model.train, None)
    steps = [model]
    for n, iteration in enumerate(sem.iterations, 2):
        # Of sem.kmeans only what decides what the model encodes at once: the rest may change without a new iteration.
        same = sem.kmeans.model_dump(include={"window_s", "overlap_s"})
        targets = KMeansConfig(layer=iteration.layer, k=iteration.k, max_frames=TARGET_FRAMES, restarts=1, **same)
        steps += clusters(f"_{n}", f"targets_{n}", targets, model)
        model = training(f"masked_model_{n}", iteration.train or sem.model.train, iteration, model, steps[-1])
        steps.append(model)
    return [*steps, *clusters("", "kmeans", sem.kmeans, model)]


if __name__ == "__main__":
    main(graph, default=HERE / "quickstart.yaml")
