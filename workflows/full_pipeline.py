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
from audiolm.config.pipeline import Pipeline  # noqa: E402
from audiolm.config.semantic import KMeansConfig, SemanticConfig  # noqa: E402
from audiolm.dag.step import Step  # noqa: E402
from audiolm.lm.warm_start import text_model  # noqa: E402
from audiolm.pipeline.cli import main  # noqa: E402
from audiolm.tokenizers.hf_codec import imported  # noqa: E402
from audiolm.tokenizers.hf_encoder import imported_encoder  # noqa: E402


def graph(cfg: Pipeline) -> list[Step]:
    """The steps of a run, in order (README has the picture)."""
    from audiolm.pipeline import steps as do

    common = {"seed": cfg.run.seed, "cluster": cfg.cluster, "corpus": cfg.corpus}
    sem, codec, lm = cfg.semantic, cfg.codec, cfg.lm

    manifest = Step("manifest", do.build_manifest, common)

    *before, kmeans = semantic(sem, common, manifest)
    if codec.pretrained:
        codec_ = Step("codec", do.import_codec, {"codec": imported(codec.pretrained, codec.n_q, codec.vocab)})
    else:
        codec_ = Step("codec", do.train_codec, {**common, "codec": codec}, (manifest,), trains=codec.train)
    ev = cfg.evaluate
    shown = CodecMetricsConfig(where=codec.where, clips=ev.clips, clip_s=ev.clip_s, coarse_levels=lm.coarse_levels,
                         visqol=ev.visqol, with_lyra=ev.lyra is not None, lyra=ev.lyra)
    figures = Step("codec_figures", do.measure_codec, {"cluster": cfg.cluster, "corpus": cfg.corpus, "figures": shown},
                   (manifest, codec_))

    encode = {**common, "tokens": cfg.tokens}
    z = Step("semantic_tokens", do.encode_tokens, {**encode, "which": "semantic"}, (manifest, kmeans))
    heard = Step("semantic_figures", do.measure_semantic, {**common, "figures": semantic_metrics_config(sem.abx, sem.where)},
                 (manifest, kmeans, z))
    decoders = []  # for Table I alone: nothing below needs them
    if sem.residual:
        more = {**common, "residual": sem.residual, "where": sem.where}
        decoders = [Step("residual", do.fit_residual, more, (manifest, kmeans))]
    if sem.vocoder:
        decoders.append(Step("semantic_vocoder", do.train_vocoder, {**common, "vocoder": sem.vocoder},
                             (manifest, kmeans, *decoders), trains=sem.vocoder.train))
    plain = cfg.tokens.model_copy(update={"dtype": "float32"})  # the codec's work is float32 whatever the masked model's
    y = Step("acoustic_tokens", do.encode_tokens, {**encode, "which": "acoustic", "tokens": plain}, (manifest, codec_))

    def stage(name: str, size, *stores: Step) -> Step:
        layout = {"dedupe": lm.dedupe, "coarse_levels": lm.coarse_levels, "rows": cfg.evaluate.rows}
        if size.warm_start:
            layout["text_model"] = text_model(size.warm_start.uri)
        return Step(name, do.train_lm, {**common, "stage": name, "lm": size, **layout}, (manifest, *stores),
                    trains=size.train, version=2)

    stages = [stage("lm_semantic", lm.semantic, z), stage("lm_coarse", lm.coarse, z, y)]
    if cfg.has_fine:
        stages.append(stage("lm_fine", lm.fine, y))

    models = (manifest, kmeans, codec_, z, y, *stages)
    samples = Step("samples", do.make_samples, {**common, "samples": cfg.samples}, models, version=2)
    measured = {**common, "samples": cfg.samples, "evaluate": ev, "lm": lm}
    evaluate = Step("evaluate", do.run_evaluate, measured, models, version=3)
    judged = {**common, "samples": cfg.samples, "evaluate": ev, "lm": lm, "tables": cfg.tables, "abx": sem.abx}
    tables = Step("tables", do.measure_tables, judged, (*models, *decoders))
    told = (manifest, *before, heard, codec_, figures, *stages, samples, evaluate, tables)
    report = Step("report", do.build_report, {"title": cfg.corpus.name}, told)
    return [manifest, *before, kmeans, codec_, figures, z, heard, *decoders, y, *stages, samples, evaluate, tables, report]


def semantic(sem: SemanticConfig, common: dict, manifest: Step) -> list[Step]:
    """The masked model, its further iterations, the choice of layer and K where they say auto, and k-means, which is last."""
    from audiolm.pipeline import steps as do

    judged = abx_files_config(sem.abx) if sem.abx else None

    def clusters(suffix: str, name: str, settings: KMeansConfig, model: Step) -> list[Step]:
        found = []
        if "auto" in (settings.layer, settings.k):
            sweep = sem.sweep if settings.k == "auto" else sem.sweep.model_copy(update={"k": ()})
            asked = settings.model_dump(include={"layer", "k", "window_s", "overlap_s"})
            found = [Step("layers" + suffix, do.choose_layer, {**common, **asked, "sweep": sweep, "abx": judged,
                                                               "where": sem.where}, (manifest, model))]
        return [*found, Step(name, do.fit_kmeans, {**common, "kmeans": settings, "where": sem.where},
                             (manifest, model, *found))]

    if sem.pretrained:
        steps = [Step("masked_model", do.import_encoder, {"encoder": imported_encoder(sem.pretrained.uri)})]
    else:
        how = {"model": sem.model, "train": sem.model.train, "iteration": None, "where": sem.where}
        steps = [Step("masked_model", do.train_masked, {**common, **how}, (manifest,), trains=how["train"])]
    model = steps[0]
    for n, iteration in enumerate(sem.iterations, 2):
        of = sem.kmeans  # its other settings are the last k-means' own: they may change without a new iteration
        wanted = KMeansConfig(layer=iteration.layer, k=iteration.k, restarts=1, window_s=of.window_s, overlap_s=of.overlap_s,
                        max_local_frames=of.max_local_frames)
        steps += clusters(f"_{n}", f"targets_{n}", wanted, model)
        how = {"model": sem.model, "train": iteration.train or sem.model.train, "iteration": iteration, "where": sem.where}
        model = Step(f"masked_model_{n}", do.train_masked, {**common, **how}, (manifest, model, steps[-1]), trains=how["train"])
        steps.append(model)
    return [*steps, *clusters("", "kmeans", sem.kmeans, model)]


if __name__ == "__main__":
    main(graph, default=HERE / "quickstart.yaml")
