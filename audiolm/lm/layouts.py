"""The stages of a run, from its config and the sizes of its tokenizers, and a stage as JSON back."""

from __future__ import annotations

from audiolm.config.lm import LMConfig
from audiolm.lm.stages import Stage

FINE_MIN_S = 1.0  # shortest random crop of stage 3, ours: the last chunk of a generated sound is shorter than the crop


def build_stages(config: LMConfig, codec_n_q: int, codec_vocab: int, k: int) -> dict[str, Stage]:
    """The run's stages by step name; no lm_fine where Q' = Q (piano). Raises ValueError where Q' > Q."""
    coarse = config.coarse_levels
    if coarse > codec_n_q:
        raise ValueError(f"lm.coarse_levels ({coarse}) exceeds codec.n_q ({codec_n_q}): lower it or raise codec.n_q")
    stages = {}
    for name, levels in (("semantic", (0, 0)), ("coarse", (0, coarse)), ("fine", (coarse, codec_n_q))):
        if name == "fine" and coarse == codec_n_q:
            continue  # the coarse stage predicts all levels
        shape, first = getattr(config, name), name == "semantic"
        alone = name == "coarse" and config.ablation == "acoustic"
        min_crop_s = FINE_MIN_S if shape.min_crop_s is None and name == "fine" else shape.min_crop_s or 0.0
        stages[f"lm_{name}"] = Stage(name, k, codec_vocab, levels, coarse, config.dedupe and (first or not config.lengths),
                                     shape.crop_s, min_crop_s, lengths=first and config.lengths,
                                     aligned=not (first or alone) and config.conditioning == "aligned",
                                     dropped=0.0 if first else 1.0 if alone else config.condition_dropout,
                                     frames=shape.kind == "frame")
    return stages


def stage_from_json(data: dict) -> Stage:
    return Stage(**{**data, "levels": tuple(data["levels"])})
