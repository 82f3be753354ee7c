"""Encoding runs without TF32, which changes codes on a GPU, and restores what the process had chosen."""

from __future__ import annotations

import pytest
import torch

from audiolm.generate.load import load
from audiolm.models.precision import no_tf32
from audiolm.tokenizers.acoustic import AcousticTokenizer
from audiolm.tokenizers.base import pad_rows
from audiolm.tokenizers.encode import encode_batch
from tests.worlds.tiny_codec import tiny_spectral
from tests.worlds.tiny_system import RUN, build, voice

FLAGS = ((torch.backends.cudnn, "convolutions"), (torch.backends.cuda.matmul, "products"))


def chosen() -> dict[str, bool]:
    return {name: backend.allow_tf32 for backend, name in FLAGS}


@pytest.fixture
def during():
    """The flags at every call of a module, in a process that allows TF32 everywhere."""
    before = [backend.allow_tf32 for backend, _ in FLAGS]
    for backend, _ in FLAGS:
        backend.allow_tf32 = True
    seen = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: seen.append(chosen()))
    yield seen
    hook.remove()
    for (backend, _), allowed in zip(FLAGS, before, strict=True):
        backend.allow_tf32 = allowed


def check(seen: list[dict[str, bool]]) -> None:
    assert seen and not any(allowed for flags in seen for allowed in flags.values())
    assert all(chosen().values())
    seen.clear()


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return load(build(str(tmp_path_factory.mktemp("system"))), mean_run=RUN)


def test_token_stores_and_prompts_are_encoded_without_tf32(during, system):
    wavs = [voice(0.5), voice(0.7, 1)]
    for tokenizer in (system.tokenizer, system.codec):
        encode_batch(wavs, tokenizer)
        check(during)
    system.tokenize(wavs)
    check(during)
    system.encode(wavs)
    check(during)


def test_streams_are_encoded_without_tf32_and_their_reader_keeps_it(during, system):
    system.codec.chunk = 20
    for _ in system.codec.encode_stream(iter([voice(1.5)])):
        check(during)


def test_other_codecs_are_encoded_without_tf32(during):
    AcousticTokenizer(tiny_spectral(), "0" * 16).encode(*pad_rows([voice(0.5)]))
    check(during)
    transformers = pytest.importorskip("transformers")
    from audiolm.tokenizers.hf_codec import PretrainedCodec

    config = transformers.DacConfig(encoder_hidden_size=4, decoder_hidden_size=32, n_codebooks=2, codebook_size=16,
                                    codebook_dim=4, sampling_rate=16_000)
    PretrainedCodec(transformers.DacModel(config).eval(), "dac", 2, "0" * 16).encode(*pad_rows([voice(0.5)]))
    check(during)


def test_an_error_restores_what_was_chosen(during):
    with pytest.raises(ZeroDivisionError), no_tf32():
        assert not any(chosen().values())
        raise ZeroDivisionError
    assert all(chosen().values())
