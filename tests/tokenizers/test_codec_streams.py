"""Sound through a codec by blocks: equal to the whole, and bounded in memory."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile as sf
import torch

from audiolm.data import audio
from audiolm.tokenizers.acoustic import AcousticTokenizer
from audiolm.tokenizers.base import padded_samples
from tests.worlds.basics import ROOT
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


LONG = """
import resource
import sys
import numpy as np
import soundfile as sf
import torch
sys.path.insert(0, {root!r})
from audiolm.tokenizers import files
torch.set_num_threads(1)
codec = files.open_codec({codec!r})
codec.chunk = 500
second, peaks = (0.1 * np.random.default_rng(0).standard_normal((8000, 1))).astype(np.float32), []
for minutes in (2, 8):
    with sf.SoundFile("long.wav", "w", 8000, 1) as f:
        for _ in range(60 * minutes):
            f.write(second)
    files.encode_file(codec, files.Job("long", "long.wav", "long.codes"), 3, True, lambda done_s, of_s: None)
    files.decode_file(codec, files.Job("long", "long.codes", "again.wav"), 3, "wav", True, lambda done_s, of_s: None)
    assert sf.info("again.wav").frames == 60 * minutes * 16000
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(f"peak {{peaks[1]:.0f}} MB, growth {{peaks[1] - peaks[0]:.1f}}")
"""


def test_a_long_file_needs_no_more_memory_than_a_short_one(tmp_path, built):
    """Six minutes more: their samples alone are 23 MB, the activations of the first layer another 46."""
    done = subprocess.run([sys.executable, "-c", LONG.format(root=str(ROOT), codec=built)], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300, env={"OMP_NUM_THREADS": "1", "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 22, done.stdout
