"""The whole configuration: frozen pydantic models, one section for each part, with the paper's numbers as defaults.

Every field is part of a step's identity unless its type says otherwise (config/base.py).  Seconds end in `_s`, hertz in
`_hz`, levels in dB in `_db`.  Unknown keys are refused.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from audiolm.config.base import Config, PathField, Runtime
from audiolm.config.codec import CodecConfig
from audiolm.config.corpus import ClipFilter, CorpusConfig, ManifestSource
from audiolm.config.evaluation import EvaluateConfig, TablesConfig
from audiolm.config.lm import LMConfig, SamplesConfig
from audiolm.config.run import ClusterConfig, RunConfig
from audiolm.config.semantic import SemanticConfig
from audiolm.config.tokens import TokensConfig


class Pipeline(Config):
    run: RunConfig = RunConfig()
    start: Runtime[PathField | None] = Field(
        None, description="a published system's name or a run's index: each part that is trained and says no start of its own "
                          "goes on from its part there; null: from nothing")
    store: str = Field("./outputs", description="any fsspec URI that every node sees")
    tracking: str = Field("sqlite", description="sqlite (in the store), none, or an MLflow tracking URI")
    cluster: ClusterConfig = ClusterConfig()
    corpus: CorpusConfig
    semantic: SemanticConfig = SemanticConfig()
    codec: CodecConfig = CodecConfig()
    tokens: TokensConfig = TokensConfig()
    lm: LMConfig = LMConfig()
    samples: SamplesConfig = SamplesConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tables: TablesConfig = TablesConfig()

    @model_validator(mode="after")
    def _check(self):
        if self.lm.acoustic == "stages" and self.lm.coarse_levels > self.codec.n_q:
            raise ValueError(f"lm.coarse_levels ({self.lm.coarse_levels}) exceeds codec.n_q ({self.codec.n_q})")
        known = {s.name for s in self.corpus.sources}
        if self.lm.decoder and "codec" in self.model_fields_set:  # a part of a run's config may be without
            if self.codec.family != "spectral" or self.codec.pretrained:
                raise ValueError("lm.decoder makes frames of the spectral codec, and this run has another: set "
                                 "codec.family=spectral or lm.decoder=null")
        if self.lm.decoder and self.lm.decoder.drawn and self.has_fine:
            raise ValueError(f"lm.decoder.drawn needs stage 2 to draw all codec.n_q={self.codec.n_q} levels, and "
                             f"lm.coarse_levels is {self.lm.coarse_levels}: set it to that, or lm.decoder.drawn=0")
        if self.samples.guidance != 1 and not self.lm.condition_dropout:
            raise ValueError(f"samples.guidance is {self.samples.guidance:g}, which needs acoustic stages that were also "
                             "trained without their condition, and lm.condition_dropout is 0: set it to 0.1, or guidance to 1")
        sounds = self.semantic.vocoder.where if self.semantic.vocoder else ClipFilter()
        for field, where in (("semantic.where", self.semantic.where), ("semantic.vocoder.where", sounds),
                             ("codec.where", self.codec.where), ("lm.semantic.where", self.lm.semantic.where),
                             ("lm.coarse.where", self.lm.coarse.where), ("lm.fine.where", self.lm.fine.where),
                             ("lm.parallel.where", self.lm.parallel.where),
                             ("lm.decoder.where", self.lm.decoder.where if self.lm.decoder else ClipFilter())):
            if unknown := set(where.source or ()) - known:
                if not any(isinstance(s, ManifestSource) for s in self.corpus.sources):
                    raise ValueError(f"{field}.source names {sorted(unknown)}; corpus.sources are {sorted(known)}")
        return self

    @property
    def has_fine(self) -> bool:
        return self.lm.acoustic == "stages" and self.lm.coarse_levels < self.codec.n_q
