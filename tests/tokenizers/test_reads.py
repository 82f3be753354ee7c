"""A tokenizer on a GPU gives a batch's codes to the CPU in one copy, and waits for nothing before it."""

from __future__ import annotations

import pytest
import torch

from audiolm.models.mel import log_mel, mel_magnitudes
from audiolm.models.soundstream import SoundStream, SoundStreamSizes
from audiolm.tokenizers.acoustic import AcousticTokenizer
from audiolm.tokenizers.base import padded_samples
from audiolm.tokenizers.encode import encode_batch
from audiolm.tokenizers.residual import ResidualTokenizer
from audiolm.tokenizers.semantic import load_semantic
from tests.worlds.gpu.waits import META, no_waits, reads
from tests.worlds.tiny_codec import tiny_spectral, voice
from tests.worlds.tiny_vocoder import K, built_tokenizer

WAVS = [voice(n, i).numpy() for i, n in enumerate((9_000, 16_000, 3_210))]


@pytest.fixture(scope="module", autouse=True)
def filterbanks():
    """Kept on the device, so copied once."""
    with no_waits(checked=False):
        log_mel(torch.empty(1, 6400, device=META))
        mel_magnitudes(torch.empty(1, 6400, device=META), 20, size=640)


def check(tokenizer) -> None:
    with reads() as seen:
        codes = encode_batch(WAVS, tokenizer)
    assert seen.reads == 1
    spec = tokenizer.spec
    assert [tuple(c.shape) for c in codes] == [(padded_samples(len(w)) // spec.hop, spec.n_q) for w in WAVS]


def test_codecs():
    check(AcousticTokenizer(SoundStream(SoundStreamSizes((2, 4, 5, 8), 2, 2, 8, 3, 16), norm=False), "", META))
    check(AcousticTokenizer(tiny_spectral(), "", META))


def test_semantic_tokens(tmp_path):
    tokenizer = load_semantic(built_tokenizer(str(tmp_path), WAVS))
    tokenizer.device, tokenizer.extractor = META, tokenizer.extractor.to(META)
    for name in ("mean_D", "std_D", "centroids_KD"):
        setattr(tokenizer, name, getattr(tokenizer, name).to(META))
    check(tokenizer)
    check(ResidualTokenizer(tokenizer, torch.empty(2, K, tokenizer.centroids_KD.shape[1], device=META)))


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_imported_encoders_wait_only_where_transformers_does(norm):
    transformers = pytest.importorskip("transformers")
    from audiolm.tokenizers.hf_encoder import TransformersExtractor

    config = transformers.HubertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                       conv_dim=(8,) * 7, feat_extract_norm=norm, num_conv_pos_embeddings=4,
                                       num_conv_pos_embedding_groups=2)
    extractor = TransformersExtractor(transformers.HubertModel(config), config.to_dict(), {"do_normalize": True})
    extractor.to(META)
    wav_BT = torch.stack([voice(16_000, i) for i in range(3)])
    with no_waits():
        extractor.features(wav_BT, torch.full((3,), 16_000), [1])
