"""A training step of every objective queues its work on a GPU and waits for nothing, from load to the scalars it returns.

Exceptions, each once a training: filterbanks, which stay on the device; whether a checkpoint brought codebooks, and norms.
"""

from __future__ import annotations

import pytest
import torch

from audiolm.models import augment
from audiolm.models.losses import multi_scale_mel, multi_scale_spectral
from audiolm.models.mel import log_mel, mel_magnitudes
from audiolm.models.w2vbert import draw_gumbel
from audiolm.tokenizers.semantic import SemanticTokenizer, load_semantic
from audiolm.train.engine import make_engine
from audiolm.train.gan import NORM_EVERY
from audiolm.train.objectives import masked, w2vbert
from audiolm.train.objectives.base import Context
from audiolm.train.objectives.codec import CodecObjective
from audiolm.train.objectives.spectral import SpectralObjective
from tests.tokenizers import test_vocoder as vocoders
from tests.train.objectives import test_hearing_objective as hearing
from tests.train.objectives import test_lm_objective as lm
from tests.train.objectives import test_masked, test_parallel_objective, test_w2vbert
from tests.train.objectives.test_codec_training import RECIPES, recipe
from tests.worlds import tiny_vocoder
from tests.worlds.gpu.waits import META, no_waits
from tests.worlds.tiny_codec import Voices

pytestmark = pytest.mark.usefixtures("one_thread")
CTX = Context(0, 1, META, 0)
CPU = torch.device("cpu")
inputs, corpus, made = hearing.inputs, lm.corpus, vocoders.made  # fixtures


@pytest.fixture(scope="module", autouse=True)
def filterbanks():
    wav_BT = torch.empty(1, 6400, device=META)
    with no_waits(checked=False):
        multi_scale_mel(wav_BT, wav_BT)
        multi_scale_spectral(wav_BT, wav_BT)
        log_mel(wav_BT)
        mel_magnitudes(wav_BT, 20, size=640)


def check(objective, train, first: int = 0, rows: int = 4) -> None:
    """Two steps."""
    engines = {name: make_engine(m, train, CTX) for name, m in objective.modules.items()}
    for step in (first, first + 1):
        with no_waits():
            found = objective.train_step(engines, [objective.load(step, range(rows))], step)
        assert {"loss", "units"} <= found.keys() and all(x.ndim == 0 for x in found.values())


@pytest.mark.parametrize("name", RECIPES)
def test_codec(name):
    codec = recipe(name, 0)
    kind = SpectralObjective if codec.family == "spectral" else CodecObjective
    objective = kind(codec, Voices(), torch.zeros(1, 6400), CTX)
    objective._initialised = True
    if objective.generator.balance:
        objective.generator.balance._known = set()
    check(objective, codec.train, NORM_EVERY)  # norms are measured in the first step, and known in the second


@pytest.mark.parametrize("unmasked", [0.0, 0.5])
def test_masked_model(unmasked):
    objective = test_masked.objective()
    objective.ctx = CTX
    objective.inputs.sizes = objective.inputs.sizes.model_copy(update={"unmasked": unmasked})
    check(objective, objective.inputs.sizes.train)


def test_masked_model_with_a_teacher(made):
    objective = test_masked.objective()
    tokenizer = on_device(load_semantic(made[1]["kmeans"]))
    objective.ctx, objective.targets = CTX, lambda batch, *_: masked.tokens_of(tokenizer, batch)
    check(objective, objective.inputs.sizes.train)


def test_w2vbert_step(monkeypatch):
    # `meta` has no generators of random numbers
    monkeypatch.setattr(w2vbert, "draw_gumbel", lambda *args: torch.empty_like(draw_gumbel(*args[:-1], CPU), device=META))
    objective = test_w2vbert.objective()
    objective.ctx = CTX
    check(objective, objective.inputs.sizes.train)


def test_augmentation():
    wav_T = torch.empty(9_600, device=META)
    with no_waits():
        augment.reverberated(wav_T, 0.3, 0.5, 16_000, None)
        augment.with_noise(wav_T, 10.0, 1.0, 16_000, None)
        augment.augment(wav_T[None], torch.tensor([9_600]), [augment.Augmentation(cents=100.0)])


def test_vocoder(made):
    vocoder = tiny_vocoder.tiny_vocoder(2, 0)
    objective, _ = vocoders.objective_of(made, vocoder)
    objective.ctx = objective.gan.ctx = CTX
    on_device(objective.tokenizer.tokenizer)
    objective.tokenizer.books_LKD = objective.tokenizer.books_LKD.to(META)
    check(objective, vocoder.train)


@pytest.mark.parametrize("stage", lm.STAGES)
@pytest.mark.parametrize("flash", [True, False])
def test_language_model(corpus, stage, flash):
    objective = lm.objective(corpus, stage, **({"replaced": 0.1, "own": 0.3} if "frame" in stage else {}))
    objective.ctx, objective.flash = CTX, flash
    check(objective, objective.shape.train, rows=8)


def test_parallel_decoder(corpus):
    objective = test_parallel_objective.objective(corpus)
    objective.ctx = CTX
    check(objective, objective.shape.train, rows=8)


@pytest.mark.parametrize("drawn", [0, 2])
def test_hearing_decoder(inputs, drawn):
    objective = hearing.objective(inputs, drawn=drawn)
    objective.ctx = CTX
    if drawn:
        objective.drawn.model.to(META)
    objective.codec.to(META)
    check(objective, objective.shape.train, rows=8)


def on_device(tokenizer: SemanticTokenizer) -> SemanticTokenizer:
    tokenizer.device = META
    tokenizer.extractor.to(META)
    for name in ("mean_D", "std_D", "centroids_KD"):
        setattr(tokenizer, name, getattr(tokenizer, name).to(META))
    return tokenizer
