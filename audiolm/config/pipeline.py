"""The configuration: frozen pydantic models with the paper's numbers as defaults.

Every field is part of a step's identity unless it is marked `Runtime` or `Later` (see identity.py).
Seconds end in `_s`, hertz in `_hz`.  Unknown keys are refused.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from audiolm.config.base import Config
from audiolm.config.codec import Codec
from audiolm.config.corpus import Corpus, ManifestSource, Where
from audiolm.config.evaluation import Evaluate, Tables
from audiolm.config.lm import LM, Samples
from audiolm.config.run import Cluster, Run
from audiolm.config.semantic import Semantic
from audiolm.config.tokens import Tokens


class Pipeline(Config):
    run: Run = Run()
    store: str = Field("./outputs", description="any fsspec URI that every node sees")
    tracking: str = Field("sqlite", description="sqlite (in the store), none, or an MLflow tracking URI")
    cluster: Cluster = Cluster()
    corpus: Corpus
    semantic: Semantic = Semantic()
    codec: Codec = Codec()
    tokens: Tokens = Tokens()
    lm: LM = LM()
    samples: Samples = Samples()
    evaluate: Evaluate = Evaluate()
    tables: Tables = Tables()

    @model_validator(mode="after")
    def _check(self):
        if self.lm.coarse_levels > self.codec.n_q:
            raise ValueError(f"lm.coarse_levels ({self.lm.coarse_levels}) exceeds codec.n_q ({self.codec.n_q})")
        known = {s.name for s in self.corpus.sources}
        sounds = self.semantic.vocoder.where if self.semantic.vocoder else Where()
        for field, where in (("semantic.where", self.semantic.where), ("semantic.vocoder.where", sounds),
                             ("codec.where", self.codec.where), ("lm.semantic.where", self.lm.semantic.where),
                             ("lm.coarse.where", self.lm.coarse.where), ("lm.fine.where", self.lm.fine.where)):
            if unknown := set(where.source or ()) - known:
                if not any(isinstance(s, ManifestSource) for s in self.corpus.sources):
                    raise ValueError(f"{field}.source names {sorted(unknown)}; corpus.sources are {sorted(known)}")
        return self

    @property
    def has_fine(self) -> bool:
        return self.lm.coarse_levels < self.codec.n_q
