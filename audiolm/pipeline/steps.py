"""The step functions by name, each importing what it needs only when it runs.

So a plan (`--dry-run`, `--status`) is answered in about a second, without torch or Ray.
"""

from __future__ import annotations


def build_manifest(config: dict, inputs: dict, out) -> dict:
    """Scans the corpus: clips, splits, shards (DESIGN 1.9)."""
    from audiolm.data.manifest import build_manifest as step
    return step(config, inputs, out)


def train_masked(config: dict, inputs: dict, out) -> dict:
    """Trains the masked audio model (paper II-B): one iteration of HuBERT, or w2v-BERT."""
    if config["model"].objective == "w2vbert":
        from audiolm.train.objectives.w2vbert import w2vbert_objective as factory
    else:
        from audiolm.train.objectives.masked import masked_objective as factory
    return _train(factory, config, config["train"], inputs, out)


def import_encoder(config: dict, inputs: dict, out) -> dict:
    """Takes over a masked model in the format of transformers instead of training one."""
    from audiolm.tokenizers.hf_encoder import import_encoder as step
    return step(config, inputs, out)


def choose_layer(config: dict, inputs: dict, out) -> dict:
    """Chooses the layer and K by ABX on held-out speakers (paper IV-B)."""
    from audiolm.eval.steps.layers import choose_layer as step
    return step(config, inputs, out)


def fit_kmeans(config: dict, inputs: dict, out) -> dict:
    """Fits z-score and k-means on a layer of the masked model (paper III-B)."""
    from audiolm.tokenizers.kmeans_fit import fit_kmeans as step
    return step(config, inputs, out)


def measure_semantic(config: dict, inputs: dict, out) -> dict:
    """Measures the semantic tokens: use, examples, phones, ABX (paper III-B)."""
    from audiolm.eval.steps.semantic import measure_semantic as step
    return step(config, inputs, out)


def fit_residual(config: dict, inputs: dict, out) -> dict:
    """Further levels of semantic tokens by residual k-means (paper, Table I)."""
    from audiolm.tokenizers.residual import fit_residual as step
    return step(config, inputs, out)


def train_vocoder(config: dict, inputs: dict, out) -> dict:
    """Trains a decoder of semantic tokens alone (paper, Table I)."""
    from audiolm.train.objectives.vocoder import vocoder_objective
    return _train(vocoder_objective, config, config["vocoder"].train, inputs, out)


def train_codec(config: dict, inputs: dict, out) -> dict:
    """Trains SoundStream (2107.03312)."""
    from audiolm.train.objectives.codec import codec_objective
    return _train(codec_objective, config, config["codec"].train, inputs, out)


def import_codec(config: dict, inputs: dict, out) -> dict:
    """Takes over a codec in the format of transformers instead of training one."""
    from audiolm.tokenizers.hf_codec import import_codec as step
    return step(config, inputs, out)


def measure_codec(config: dict, inputs: dict, out) -> dict:
    """Measures the codec on held-out speakers beside shipped ones."""
    from audiolm.eval.steps.codec import measure_codec as step
    return step(config, inputs, out)


def encode_tokens(config: dict, inputs: dict, out) -> dict:
    """Tokenizes the corpus, one Parquet file a shard; config["which"] is semantic or acoustic."""
    from audiolm.tokenizers.encode import encode_tokens as step
    return step(config, inputs, out)


def train_lm(config: dict, inputs: dict, out) -> dict:
    """Trains one language-model stage, between its gates; config["stage"] says which (paper III-C)."""
    from audiolm.eval import gates
    from audiolm.train.objectives.lm import lm_objective
    gates.check_inputs(config, inputs, out)
    facts = _train(lm_objective, config, config["lm"].train, inputs, out)
    return gates.check_stage(config, inputs, out, facts)


def make_samples(config: dict, inputs: dict, out) -> dict:
    """Generates sound in every mode (paper III-D)."""
    from audiolm.generate.samples import make_samples as step
    return step(config, inputs, out)


def run_evaluate(config: dict, inputs: dict, out) -> dict:
    """Measures codec, stages, ladder and conditioning on held-out speakers."""
    from audiolm.eval.steps.stages import run_evaluate as step
    return step(config, inputs, out)


def measure_tables(config: dict, inputs: dict, out) -> dict:
    """Measures the paper's tables on the trained system (paper IV)."""
    from audiolm.eval.steps.tables import measure_tables as step
    return step(config, inputs, out)


def build_report(config: dict, inputs: dict, out) -> dict:
    """One page with sound, figures and curves."""
    from audiolm.report.run_report import build_report as step
    return step(config, inputs, out)


def _train(factory, config: dict, train_config, inputs: dict, out) -> dict:
    from audiolm.train.loop import train
    return train(factory, config, train_config, inputs, out, cluster=config["cluster"])
