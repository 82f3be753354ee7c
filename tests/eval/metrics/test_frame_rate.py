"""Features at a multiple of the model's rate: frames are centred where ABX takes them to be, and 25 Hz is as ever."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from audiolm.data.audio import wav_bytes
from audiolm.eval.metrics.frame_rate import at_multiple
from audiolm.eval.steps import layers
from audiolm.eval.test_sets import wav_of
from audiolm.models.conformer import Encoder, EncoderSizes
from audiolm.models.mel import log_mel
from audiolm.tokenizers.base import SEMANTIC_HOP as HOP
from audiolm.tokenizers.base import padded_samples
from audiolm.tokenizers.extractor import Window
from audiolm.tokenizers.kmeans_fit import encode_frames
from audiolm.tokenizers.semantic import load_extractor
from tests.worlds.basics import HEADER
from workflows import evaluate as command


def padded(wav_T: np.ndarray) -> np.ndarray:
    return np.pad(wav_T, (0, padded_samples(len(wav_T)) - len(wav_T)))


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize("samples", [100, 640, 641, 7_000, 7_300, 7_680])
def test_a_frame_is_the_mean_over_one_hop_around_its_centre(times, samples):
    """Of a ramp the mean over any stretch is the ramp at its centre."""
    ramp_T = np.arange(samples, dtype=np.float32) + 0.5
    found_TD = at_multiple(lambda wav_T: padded(wav_T).reshape(-1, HOP).mean(1, keepdims=True), HOP, times)(ramp_T)
    centre_T = (np.arange(-(-samples // (HOP // times))) + 0.5) * HOP / times
    inside_T = (centre_T >= HOP / 2) & (centre_T <= samples - HOP / 2)
    assert found_TD.shape == (len(centre_T), 1) and np.allclose(found_TD[inside_T, 0], centre_T[inside_T])


@pytest.mark.parametrize("times", [1, 2, 4])
def test_a_click_reaches_as_many_frames_of_the_encoder_before_it_as_behind(times):
    torch.manual_seed(0)
    encoder = Encoder(EncoderSizes(dim=8, layers=1, heads=2, ff=16, conv_kernel=3, dropout=0.0))

    @torch.no_grad()
    def extract(wav_T: np.ndarray) -> np.ndarray:
        return encoder.subsampled(log_mel(torch.from_numpy(padded(wav_T))[None]), None)[0].numpy()

    features, silence_T, at = at_multiple(extract, HOP, times), np.zeros(50 * HOP, np.float32), 25 * times
    click_T = silence_T.copy()
    click_T[round((at + 0.5) * HOP / times)] = 1
    reached = np.flatnonzero(np.abs(features(click_T) - features(silence_T)).max(1) > 1e-6)
    assert reached[0] + reached[-1] == 2 * at and len(reached) > 2 * times


def test_each_pass_gives_the_frames_that_it_gives_alone(world, tmp_path):
    extractor, window = load_extractor(str(world.root / "kmeans")), Window(20, 5)
    paths = {"train-0": str(world.root / "audio" / "train-0.wav")}  # 1.3 s: two windows and a part of a frame
    wav_T = wav_of(paths["train-0"])

    def alone(wav_T: np.ndarray) -> torch.Tensor:
        return encode_frames(extractor, [1], [wav_T], window)[0]

    once, twice = (layers.frames_of(paths, extractor, 1, window, times)["train-0"] for times in (1, 2))
    assert torch.equal(once, alone(wav_T)) and len(once) == 33 and len(twice) == 65
    assert torch.equal(twice[::2], alone(F.pad(torch.from_numpy(wav_T), (160, 0)).numpy())[:33])
    assert torch.equal(twice[1::2], alone(wav_T[160:])[:32])


def test_command_line(world, tmp_path, capsys):
    rows = [f"f{s} {n * 0.2:.2f} {n * 0.2 + 0.15:.2f} {phone} x y s{s}\n" for s in range(2) for n, phone in enumerate("abab")]
    (tmp_path / "a.item").write_text(HEADER + "".join(rows))
    for s in range(2):
        wav_T = wav_of(str(world.root / "audio" / f"train-{2 * s}.wav"))
        (tmp_path / f"f{s}.wav").write_bytes(wav_bytes(wav_T))
    kmeans, out = str(world.root / "kmeans"), str(tmp_path / "out.json")
    line = ["abx", "--items", str(tmp_path / "a.item"), "--audio", str(tmp_path), "--json", out, "--features"]
    for features in (["layer", "--model", kmeans, "--layer", "1"], ["centroids", "--tokenizer", kmeans]):
        for hz in (25, 50):
            assert command.main([*line, *features, "--hz", str(hz)]) == 0 and f" at {hz} Hz" in capsys.readouterr().out
            row, = json.loads((tmp_path / "out.json").read_text())
            assert row["rate_hz"] == hz and row["items"] == 8
    assert command.main([*line, "mfcc", "--hz", "50"]) == 2 and "mfcc has 100 Hz" in capsys.readouterr().err
