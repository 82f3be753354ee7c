"""Sound through a codec by blocks: equal to the whole, and bounded in memory."""

from __future__ import annotations

import functools
import gc
import tracemalloc

import numpy as np
import pytest
import soundfile as sf
import torch

from audiolm.data import audio
from audiolm.tokenizers import codec_files
from audiolm.tokenizers.acoustic import AcousticTokenizer
from audiolm.tokenizers.base import padded_samples
from audiolm.tokenizers.codec_lookup import open_codec
from tests.worlds.tiny_codec import noise, whole_codes


def cut(x: np.ndarray | torch.Tensor, size: int) -> list:
    return [x[i:i + size] for i in range(0, len(x), size)]


@pytest.mark.parametrize("samples", [1, 640, 33 * 320, 320 * 200 + 77])
def test_blocks_of_any_size_give_what_the_whole_gives(codec, samples):
    wav_T = noise(samples)
    small = AcousticTokenizer(codec.model, codec.hash, chunk_frames=33)
    codes_TQ = whole_codes(codec, wav_T)
    wave_T = codec.decode(codes_TQ[None])[0]
    assert len(codes_TQ) == padded_samples(samples) // 320 and len(codes_TQ.unique()) > min(5, len(codes_TQ) // 2)
    for size in (97, 10_560, 50_001):
        found = torch.cat(list(small.encode_stream(cut(wav_T, size))))
        assert torch.equal(found, codes_TQ), size
        assert all(len(piece) <= 33 for piece in small.encode_stream(cut(wav_T, size)))
    for size in (1, 34, 500):
        made_T = torch.cat(list(small.decode_stream(cut(codes_TQ, size))))
        assert made_T.shape == wave_T.shape and torch.allclose(made_T, wave_T, atol=1e-4), size


def test_blocks_that_no_codec_can_take_are_refused(codec):
    bad_T = noise(9000)
    bad_T[8000] = np.inf
    with pytest.raises(ValueError, match="the sample at 0.500 s is NaN or infinite"):
        list(codec.encode_stream(cut(bad_T, 1000)))
    with pytest.raises(ValueError, match="mix channels down"):
        list(codec.encode_stream([noise(2, 640)]))
    with pytest.raises(ValueError, match="codes run from 0 to 16; this codec has codes 0 to 15"):
        list(codec.decode_stream([torch.zeros(5, 3, dtype=torch.int64), torch.full((1, 3), 16) * torch.tensor([0, 1, 0])]))


@pytest.mark.parametrize(("rate", "channels", "form"), [
    (8000, 1, "wav"), (11_025, 2, "flac"), (16_000, 2, "wav"), (22_050, 6, "flac"), (24_000, 1, "ogg"), (44_100, 2, "mp3"),
    (48_000, 2, "wav"), (96_000, 1, "flac"), (192_000, 8, "wav")])
def test_a_file_by_blocks_equals_the_file_at_once(tmp_path, monkeypatch, rate, channels, form):
    for frames in (rate // 100, rate + 137):  # 10 ms, and many blocks
        path = str(tmp_path / f"{frames}.{form}")
        sf.write(path, noise(frames, channels), rate)
        monkeypatch.setattr(audio, "_BLOCK", 1 << 18)
        expected_T = audio.resample(*audio.decode(path), 16_000)
        monkeypatch.setattr(audio, "_BLOCK", 7001)
        blocks = list(audio.stream(path))
        found_T = np.concatenate(blocks)
        assert len(found_T) == len(expected_T) and found_T.dtype == np.float32 and np.abs(found_T).max() > 0.02
        np.testing.assert_allclose(found_T, expected_T, atol=1e-5)


def test_two_hours_by_blocks_need_the_memory_of_one_block(tmp_path):
    path, second = str(tmp_path / "long.flac"), noise(8000)
    with sf.SoundFile(path, "w", 8000, 1) as f:
        for _ in range(0, 7200, 60):
            f.write(np.tile(second, 60))
    tracemalloc.start()
    try:
        samples = sum(len(wav_T) for wav_T in audio.stream(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert samples == 7200 * 16_000  # 461 MB as float32
    assert peak < 16e6


class Held:
    """Records at each call of a codec's model what it is given and the bytes of all live tensors, parameters left out."""

    def __init__(self, monkeypatch, model):
        self.given, self.bytes = {"encode": [], "decode": []}, []
        for name in self.given:
            monkeypatch.setattr(model, name, functools.partial(self.call, name, getattr(model, name)))

    def call(self, name: str, inner, x: torch.Tensor) -> torch.Tensor:
        self.given[name].append(x.shape[1])
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                    for x in gc.get_objects() if type(x) is torch.Tensor}
        self.bytes.append(sum(storages.values()))
        return inner(x)


def test_a_long_file_needs_no_more_memory_than_a_short_one(tmp_path, built, monkeypatch):
    """Two minutes more: their samples alone are 8 MB, the activations of the first layer another 15."""
    codec = open_codec(built)
    codec.chunk = 500
    second, peaks = 0.1 * noise(8000), []
    path, codes, again = (str(tmp_path / name) for name in ("long.wav", "long.codes", "again.wav"))
    for minutes in (2, 4):
        with sf.SoundFile(path, "w", 8000, 1) as f:
            for _ in range(60 * minutes):
                f.write(second)
        with monkeypatch.context() as patch:
            held = Held(patch, codec.model)
            gc.collect()
            codec_files.encode_file(codec, codec_files.FileJob("long", path, codes), 3, True, lambda done_s, of_s: None)
            codec_files.decode_file(codec, codec_files.FileJob("long", codes, again), 3, "wav", True, lambda done_s, of_s: None)
        assert sf.info(again).frames == 60 * minutes * 16_000
        # What the model is given bounds its activations: a chunk and the history in front of it.
        context = codec.model.encoder_context, codec.model.decoder_context
        assert len(held.given["encode"]) == len(held.given["decode"]) == 6 * minutes
        assert max(held.given["encode"]) == (500 + context[0]) * 320 and max(held.given["decode"]) == 500 + context[1]
        peaks.append(max(held.bytes))
    # Blocks of the file end at other places in a chunk, so the peaks differ by less than one chunk of samples.
    assert peaks[1] - peaks[0] < 500 * 320 * 4
