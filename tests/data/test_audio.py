"""Reading audio: every format and rate, exact lengths, pieces equal to slices of the whole."""

from __future__ import annotations

import io
import tracemalloc

import fsspec
import numpy as np
import pytest
import soundfile as sf

from audiolm.data import audio, clips, scan
from audiolm.data.clips import Clip, Part
from audiolm.data.containers import mpeg
from audiolm.data.containers.raw import Raw

FORMATS = {"wav": {}, "flac": {}, "ogg": {"format": "OGG", "subtype": "VORBIS"},
           "opus": {"format": "OGG", "subtype": "OPUS"}, "mp3": {"format": "MP3"}}


def tone(frames: int, rate: int, hz: float = 300.0, channels: int = 1) -> np.ndarray:
    x = (0.3 * np.sin(2 * np.pi * hz * np.arange(frames) / rate)).astype(np.float32)
    return x if channels == 1 else np.stack([x] * channels, 1)


def clip_of(folder, names: list[str]) -> Clip:
    parts, offset = [], 0
    for name in names:
        wav_T, rate = audio.decode(str(folder / name))
        frames = len(wav_T)
        parts.append(Part(name, name, 0, frames, offset, None))
        offset += frames
    return Clip("c", "s", "s", "x", "train", rate, offset, tuple(parts))


@pytest.mark.parametrize(("kind", "rate"), [
    (k, r) for k in FORMATS for r in (8000, 16000, 22050, 24000, 44100, 48000)
    if k != "opus" or r not in (22050, 44100)])  # Opus knows no such rates
def test_every_format_and_rate_has_its_exact_length(tmp_path, kind, rate):
    frames = rate + 137
    sf.write(tmp_path / f"a.{kind}", tone(frames, rate), rate, **FORMATS[kind])
    wav_T, got = audio.decode(str(tmp_path / f"a.{kind}"))
    assert (got, len(wav_T), wav_T.dtype) == (rate, frames, np.float32)
    clip = clip_of(tmp_path, [f"a.{kind}"])
    whole_T = clips.read_clip(clip, {"s": str(tmp_path)})
    assert len(whole_T) == clip.samples == -(-frames * 16000 // rate)
    expected_T = tone(clip.samples, 16000)
    middle = slice(2000, -2000)  # codecs and resamplers have edges
    assert np.corrcoef(whole_T[middle], expected_T[middle])[0, 1] > 0.99
    np.testing.assert_array_equal(clips.read_clip(clip, {"s": str(tmp_path)}, 777, 5001), whole_T[777:5778])


@pytest.mark.parametrize("frames", [1, 2, 3, 80, 441, 1000, 22051])
@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_gives_exactly_the_rounded_up_length(frames, rate):
    assert len(audio.resample(tone(frames, rate), rate, 16000)) == -(-frames * 16000 // rate)


def test_channels_are_averaged(tmp_path):
    both = np.stack([tone(16000, 16000), tone(16000, 16000, 500.0)], 1)
    sf.write(tmp_path / "a.wav", both, 16000, subtype="FLOAT")
    wav_T, _ = audio.decode(str(tmp_path / "a.wav"))
    np.testing.assert_allclose(wav_T, both.mean(1), atol=1e-7)


@pytest.mark.timeout(60)  # byte by byte it takes minutes
def test_garbage_behind_an_mp3_takes_no_time(tmp_path):
    sf.write(tmp_path / "a.mp3", tone(16_000, 16_000), 16_000, format="MP3")
    data = (tmp_path / "a.mp3").read_bytes()

    def frames(data: bytes) -> list[int]:
        return [s.frames for s in mpeg.streams(Raw("a", io.BytesIO(data), len(data), True), 0, len(data))]

    assert frames(data) == frames(data + b"\xff" * 150_000_000) and sum(frames(data)) * 576 >= 16_000


def test_a_thousand_channels_take_no_more_memory_than_two(tmp_path):
    path = str(tmp_path / "wide.wav")
    with sf.SoundFile(path, "w", 16_000, 1024, "PCM_U8") as f:
        for _ in range(8):
            f.write(np.full((4000, 1024), 0.5, np.float32))  # 2 s in all: 131 MB of float32
    tracemalloc.start()
    try:
        whole_T, _ = audio.decode(path)
        part_T, _ = audio.decode(path, 100, 31_000)
        streamed_T, measured = np.concatenate([*audio.stream(path)]), scan.measure(path)
        peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    assert len(whole_T) == len(streamed_T) == measured.frames == 32_000
    np.testing.assert_array_equal(part_T, whole_T[100:31_100])
    np.testing.assert_array_equal(streamed_T, whole_T)
    np.testing.assert_allclose(measured.peaks, 0.5, atol=0.01)
    assert peak_mb < 100


@pytest.mark.parametrize("rate", [16000, 22050])
def test_pieces_of_a_joined_clip_are_slices_of_the_whole(tmp_path, rate):
    rng = np.random.default_rng(0)
    for i in range(3):
        sf.write(tmp_path / f"{i}.flac", 0.1 * rng.standard_normal(rate + 100 * i), rate)
    clip, roots = clip_of(tmp_path, ["0.flac", "1.flac", "2.flac"]), {"s": str(tmp_path)}
    whole_T = clips.read_clip(clip, roots)
    assert len(whole_T) == clip.samples
    pieces = [(0, 10), (15990, 20), (16000, 16100), (20000, 0), (clip.samples - 5, 5), (100, clip.samples - 100)]
    for start, n in pieces:
        np.testing.assert_array_equal(clips.read_clip(clip, roots, start, n), whole_T[start:start + n])
    with pytest.raises(ValueError, match="asked for"):
        clips.read_clip(clip, roots, 10, clip.samples)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("sound", ["tone", "noise"])  # a tone takes few bits, so that MP3 borrows from far back
def test_decoding_in_pieces_equals_decoding_at_once(tmp_path, monkeypatch, kind, sound):
    x_T = tone(64000, 16000) * np.linspace(0.2, 1, 64000, dtype=np.float32)
    if sound == "noise":
        x_T = (0.1 * np.random.default_rng(0).standard_normal(64000)).astype(np.float32)
    path = str(tmp_path / f"a.{kind}")
    sf.write(path, x_T, 16000, **FORMATS[kind])
    whole_T, _ = audio.decode(path)
    np.testing.assert_allclose(whole_T, sf.read(path, dtype="float32")[0], atol=1e-6)
    for start in (1, 331, 5000, 16331, 40000):
        piece_T, _ = audio.decode(path, start, 16000)
        np.testing.assert_allclose(piece_T, whole_T[start:start + 16000], atol=2e-3 if kind == "opus" else 1e-6)
    monkeypatch.setattr(audio, "_BLOCK", 7001)
    np.testing.assert_allclose(audio.decode(path)[0], whole_T, atol=1e-6)


def test_a_file_that_changed_after_the_manifest_is_refused(tmp_path):
    sf.write(tmp_path / "a.wav", tone(16000, 16000), 16000)
    clip = clip_of(tmp_path, ["a.wav"])
    sf.write(tmp_path / "a.wav", tone(15000, 16000), 16000)
    with pytest.raises(ValueError, match="corpus.revision"):
        clips.read_clip(clip, {"s": str(tmp_path)})
    (tmp_path / "a.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.wav"):
        clips.read_clip(clip, {"s": str(tmp_path)})
    with pytest.raises(ValueError, match=r"corpus\.sources are \['other'\]"):
        clips.read_clip(clip, {"other": str(tmp_path)})


def test_remote_audio_reads_as_local_and_a_broken_network_is_no_broken_file(tmp_path, monkeypatch):
    sf.write(tmp_path / "a.flac", 0.1 * np.random.default_rng(0).standard_normal(640_000), 16000)
    fs = fsspec.filesystem("memory")
    fs.pipe("/audio_test/a.flac", (tmp_path / "a.flac").read_bytes())
    remote_T, rate = audio.decode("memory://audio_test/a.flac", 100, 5000)
    np.testing.assert_array_equal(remote_T, audio.decode(str(tmp_path / "a.flac"), 100, 5000)[0])
    assert rate == 16000

    class Broken:
        def __init__(self, raw):
            self.raw, self.reads, self.size = raw, 0, raw.size

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.raw.close()

        def read(self, n):
            self.reads += 1
            if self.reads > 5:
                raise ConnectionError("the network went away")
            return self.raw.read(n)

        def seek(self, *a):
            return self.raw.seek(*a)

        def tell(self):
            return self.raw.tell()

    opened = fs.open
    monkeypatch.setattr(type(fs), "open", lambda self, p, mode, **_: Broken(opened(p, mode)))
    with pytest.raises(ConnectionError, match="went away"):
        audio.decode("memory://audio_test/a.flac")
