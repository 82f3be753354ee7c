"""The step functions by name, as references `module:function` that are imported only when a step runs.

So a plan (`--dry-run`, `--status`) is answered in about a second, without torch or Ray.  A step function takes its
config, its inputs' artifacts and a StepContext, and returns the facts of the step (dag/step.py).
"""

from __future__ import annotations

from functools import partial
from pkgutil import resolve_name


def train_objective(objective: str, config: dict, inputs: dict, out) -> dict:
    """Trains an objective, given as the reference of its factory, to the end of the step's TrainConfig."""
    from audiolm.train.loop import train

    return train(resolve_name(objective), config, out.step.trains, inputs, out, cluster=config["cluster"])


def train_lm(config: dict, inputs: dict, out) -> dict:
    """Trains a stage or the parallel decoder, config["stage"], between its gates: tokens before, losses after (paper III-C)."""
    from audiolm.eval import stage_gates

    stage_gates.check_inputs(config, inputs, out)
    kind = "parallel" if config["stage"] == "lm_parallel" else "lm"
    facts = train_objective(f"audiolm.train.objectives.{kind}:{kind}_objective", config, inputs, out)
    return stage_gates.check_stage(config, inputs, out, facts)


FUNCTIONS = {
    # corpus: clips, splits, shards
    "build_manifest": "audiolm.data.manifest:build_manifest",
    # semantic tokenizer (paper III-B): a masked model trained or imported, a layer of it, k-means
    "train_hubert": partial(train_objective, "audiolm.train.objectives.masked:masked_objective"),
    "train_w2vbert": partial(train_objective, "audiolm.train.objectives.w2vbert:w2vbert_objective"),
    "import_encoder": "audiolm.tokenizers.hf_encoder:import_encoder",
    "choose_layer": "audiolm.eval.steps.layers:choose_layer",
    "take_tokenizer": "audiolm.tokenizers.semantic:take_over",
    "fit_kmeans": "audiolm.tokenizers.kmeans_fit:fit_kmeans",
    "measure_semantic": "audiolm.eval.steps.semantic:measure_semantic",
    # decoders of semantic tokens alone, for the paper's Table I
    "fit_residual": "audiolm.tokenizers.residual:fit_residual",
    "train_vocoder": partial(train_objective, "audiolm.train.objectives.vocoder:vocoder_objective"),
    # codec: SoundStream (2107.03312), trained or imported
    "train_codec": partial(train_objective, "audiolm.train.objectives.codec:codec_objective"),
    "import_codec": "audiolm.tokenizers.hf_codec:import_codec",
    "measure_codec": "audiolm.eval.steps.codec:measure_codec",
    # tokens, one Parquet file a shard; the language models on them; generation (paper III-D); results
    "encode_tokens": "audiolm.tokenizers.encode:encode_tokens",
    "train_lm": train_lm,
    "train_decoder": partial(train_objective, "audiolm.train.objectives.hearing:hearing_objective"),
    "make_samples": "audiolm.generate.samples:make_samples",
    "run_evaluate": "audiolm.eval.steps.stages:run_evaluate",
    "measure_tables": "audiolm.eval.steps.tables:measure_tables",
    "build_report": "audiolm.report.run_report:build_report",
}
