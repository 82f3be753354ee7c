"""m4a, mp4, aac, webm and Ogg FLAC through PyAV: whole, in pieces, cut, and without PyAV."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from audiolm.data import audio, scan
from audiolm.data.audio_check import check_audio
from audiolm.data.containers.raw import Unusable

av = pytest.importorskip("av")
RATE, N = 16_000, 96_000
TONE = (0.3 * np.sin(2 * np.pi * (200 + np.arange(N) / 300) * np.arange(N) / RATE)).astype(np.float32)


def encoded(path, form: str, codec: str, rate: int = RATE, layout: str = "mono", **options: str) -> bytes:
    """The tone as FFmpeg writes it."""
    with av.open(str(path), "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        wav_CT = np.stack([TONE] * (2 if layout == "stereo" else 1))
        source = av.AudioFrame.from_ndarray(wav_CT, format="fltp", layout=layout)
        source.rate, source.pts = RATE, 0
        resampler = av.AudioResampler(stream.codec_context.format, layout, rate)
        fifo = av.AudioFifo()
        for frame in [*resampler.resample(source), *resampler.resample(None)]:
            fifo.write(frame)
        while frame := fifo.read(stream.codec_context.frame_size or 1024, partial=True):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


FORMS = {"m4a": ("ipod", "aac", {}), "mp4": ("mp4", "aac", {"movflags": "+faststart"}), "alac": ("ipod", "alac", {}),
         "fragments": ("mp4", "aac", {"movflags": "frag_keyframe+empty_moov"}), "adts": ("adts", "aac", {}),
         "webm": ("webm", "libopus", {"rate": 48_000}), "mka": ("matroska", "flac", {}), "oga": ("ogg", "flac", {}),
         "stereo": ("ipod", "aac", {"layout": "stereo"})}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("media")
    return {name: encoded(folder / name, form, codec, **options) for name, (form, codec, options) in FORMS.items()}


@pytest.mark.parametrize("name", FORMS)
def test_what_ffmpeg_decodes_is_read_whole_and_in_pieces(tmp_path, sounds, name):
    path = str(tmp_path / "a.wav")  # the bytes tell the format, not the name
    (tmp_path / "a.wav").write_bytes(sounds[name])
    measured = scan.measure(path)
    assert measured.frames / measured.rate == pytest.approx(N / RATE, abs=0.2)  # AAC's frames are 64 ms long
    check_audio(path)
    wav_T, rate = audio.decode(path)
    assert (len(wav_T), rate) == (measured.frames, measured.rate)
    at_16k_T = np.concatenate([*audio.stream(path)])
    shift = int(np.argmax(np.correlate(at_16k_T[:20_000], TONE[4000:16_000])))
    assert np.corrcoef(at_16k_T[shift:][:60_000], TONE[4000:64_000])[0, 1] > 0.99
    for start in (0, 500, 3 * rate + 77):
        piece_T, _ = audio.decode(path, start, 5000)
        np.testing.assert_allclose(piece_T, wav_T[start:start + 5000], atol=1e-4)


@pytest.mark.parametrize("name", ["m4a", "mp4", "alac", "fragments", "webm"])
def test_what_is_cut_off_is_truncated(tmp_path, sounds, name):
    (tmp_path / "a").write_bytes(sounds[name][:len(sounds[name]) * 2 // 3])
    with pytest.raises(Unusable, match="truncated"):
        scan.measure(str(tmp_path / "a"))


def test_an_aac_stream_that_ends_within_a_frame_is_read_to_there(tmp_path, sounds):
    (tmp_path / "a").write_bytes(sounds["adts"][:len(sounds["adts"]) // 2])
    assert scan.measure(str(tmp_path / "a")).frames == pytest.approx(N / 2, abs=6000)


def test_a_video_without_sound_and_damage_are_refused(tmp_path, sounds):
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode(None))
    data = sounds["m4a"]
    for content, text in ((sink.getvalue(), "holds no audio"), (data[:200] + bytes(len(data) - 200), "unreadable|truncated")):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(Unusable, match=text):
            scan.measure(str(tmp_path / "a"))


def test_a_missing_pyav_names_the_extra(tmp_path, sounds, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.m4a").write_bytes(sounds["m4a"])
    for read in (scan.measure, check_audio):
        with pytest.raises(ValueError, match=r'MP4 or M4A audio needs PyAV: pip install "audiolm\[media\]"'):
            read(str(tmp_path / "a.m4a"))
