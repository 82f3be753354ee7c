"""Windows over long audio: every frame once, none depends on more than its window, files of any length agree."""

from __future__ import annotations

import pytest
import torch

from audiolm.config.semantic import KMeansConfig, SemanticConfig
from audiolm.models.conformer import Encoder, EncoderSizes
from audiolm.tokenizers.extractor import ConformerExtractor, Window, window_of, windowed
from audiolm.tokenizers.semantic import SemanticTokenizer, golden_clip

HOP = 640


@pytest.fixture(scope="module")
def extractor() -> ConformerExtractor:
    torch.manual_seed(0)
    encoder = Encoder(EncoderSizes(dim=16, layers=2, heads=2, ff=24))
    encoder.statistics.mean.fill_(-6.0)
    encoder.statistics.std.fill_(3.0)
    return ConformerExtractor(encoder)


def sound(frames: float) -> torch.Tensor:
    wav = golden_clip()[0].repeat(int(frames * HOP // 32_000) + 1)[:int(frames * HOP)]
    return wav + 0.01 * torch.randn(len(wav), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("window", [Window(10, 2), Window(16, 0), Window(9, 4)])
def test_windows_cover_every_frame_once_with_the_overlap_on_both_sides(window):
    for frames in range(1, 120):
        spans = window.spans(frames)
        kept = [f for _, _, first, end in spans for f in range(first, end)]
        assert kept == list(range(frames))
        assert all(end - at <= window.frames and at <= first and last <= end for at, end, first, last in spans)
        for at, end, first, last in spans:
            assert (first - at >= window.overlap or first == 0) and (end - last >= window.overlap or last == frames)


def test_a_frame_depends_on_its_window_alone(extractor):
    """Audio beyond a frame's window, and the file's length, change nothing in the frame."""
    window, long = Window(20, 5), sound(95)
    whole, _ = windowed(extractor, long[None], torch.tensor([len(long)]), [2], window)
    for frames in (40, 60, 80):
        part, counts = windowed(extractor, long[None, :frames * HOP], torch.tensor([frames * HOP]), [2], window)
        assert counts.tolist() == [frames]
        same = max(last for _, end, _, last in window.spans(95) if end <= frames)
        assert same >= frames - 20 and (whole[0][0, :same] - part[0][0, :same]).abs().max() < 1e-5
    changed = long.clone()
    changed[:30 * HOP] = 0
    other, _ = windowed(extractor, changed[None], torch.tensor([len(long)]), [2], window)
    far = min(first for at, _, first, _ in window.spans(95) if at >= 30)
    assert (whole[0][0, far:] - other[0][0, far:]).abs().max() < 1e-5 < (whole[0][0, :30] - other[0][0, :30]).abs().max()


def test_rows_of_any_length_are_what_they_are_alone_and_layers_come_in_order(extractor):
    window = Window(20, 5)
    wavs = [sound(n) for n in (3.2, 20, 47.5, 33)]
    wav_BT = torch.full((4, max(map(len, wavs))), 0.5)
    for row, wav in zip(wav_BT, wavs, strict=True):
        row[:len(wav)] = wav
    together, frames_B = windowed(extractor, wav_BT, torch.tensor([len(w) for w in wavs]), [2, 1], window)
    assert frames_B.tolist() == [4, 20, 48, 33]
    for i, wav in enumerate(wavs):
        for layer, x_BTD in zip((2, 1), together, strict=True):
            alone, = windowed(extractor, wav[None], torch.tensor([len(wav)]), [layer], window)[0]
            assert (x_BTD[i, :frames_B[i]] - alone[0]).abs().max() < 1e-4


def test_a_clip_within_the_window_is_heard_whole(extractor):
    wav = sound(20)
    (x,), _ = windowed(extractor, wav[None], torch.tensor([len(wav)]), [2], Window(20, 5))
    (y,), _ = extractor.features(wav[None], torch.tensor([len(wav)]), [2])
    assert torch.equal(x, y)


def test_tokens_of_a_long_file_begin_with_those_of_its_beginning(extractor):
    x = windowed(extractor, sound(95)[None], torch.tensor([95 * HOP]), [2], Window(20, 5))[0][0][0]
    tokenizer = SemanticTokenizer(extractor, 2, x.mean(0), x.std(0), torch.randn(8, 16), Window(20, 5), "")
    long, = tokenizer.encode(sound(95)[None], torch.tensor([95 * HOP]))
    short, = tokenizer.encode(sound(95)[None, :55 * HOP], torch.tensor([55 * HOP]))
    assert torch.equal(long[:45], short[:45]) and len(long) == 95 and len(short) == 55 and len(long.unique()) > 2


def test_what_a_window_cannot_be_is_refused():
    assert window_of(16.0, 2.0) == Window(400, 50)
    with pytest.raises(ValueError, match=r"window_s \(0.4\) must exceed twice overlap_s \(0.2\)"):
        Window(10, 5)
    with pytest.raises(ValueError, match="kmeans.window_s"):
        SemanticConfig(kmeans=KMeansConfig(window_s=4.0, overlap_s=2.0))
