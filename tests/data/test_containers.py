"""Files whose headers are wrong, missing or not the first thing in them: all of their sound, or a refusal that says why."""

from __future__ import annotations

import io
import os
import struct

import fsspec
import numpy as np
import pytest
import soundfile as sf

from audiolm.data import audio, scan
from audiolm.data.audio_check import check_audio
from audiolm.data.containers.raw import Raw, Unusable, Window

RATE, SECONDS = 16_000, 4.0
N = int(RATE * SECONDS)
NOISE = (0.1 * np.random.default_rng(0).standard_normal(N)).astype(np.float32)
LOUD_FIRST = NOISE * np.where(np.arange(N) < N // 8, 5, 1e-3).astype(np.float32)  # a guess from the first frames is short
ID3 = b"ID3\x03\0\0\0\0\0\x0a" + bytes(10)
ID3V1 = b"TAG" + bytes(125)
APE = b"APETAGEX" + struct.pack("<4I", 2000, 32 + 40, 1, 0x80000000) + bytes(8)
APE = APE[:8] + struct.pack("<4I", 2000, 72, 1, 0xA0000000) + bytes(8) + b"\xff\xfb\x90\0" * 10 + APE


def encoded(form: str, coding: str | None = None, wav=NOISE, rate: int = RATE, **options) -> bytes:
    sink = io.BytesIO()
    sf.write(sink, wav, rate, format=form, subtype=coding, **options)
    return sink.getvalue()


def put(data: bytes, at: int, form: str, *values: int) -> bytes:
    """The data with numbers written over it."""
    new = struct.pack(form, *values)
    return data[:at] + new + data[at + len(new):]


def mp3(wav=NOISE, counted: bool = True) -> bytes:
    """A variable-rate MP3; not `counted`: without the first frame, which holds the Xing header."""
    data = encoded("MP3", wav=wav, bitrate_mode="VARIABLE", compression_level=0.3)
    return data if counted else data[len(mpeg_frame(data)):]


def mpeg_frame(data: bytes) -> bytes:
    """The first frame, to the next one's beginning."""
    return data[:data.index(data[:2], 40)]


def wav_at(data: bytes) -> int:
    """Where the size of a WAV's samples stands."""
    return data.index(b"data") + 4


def with_chunk(data: bytes, name: bytes, body: bytes, padded: bool = True) -> bytes:
    at = data.index(b"data")
    return data[:at] + name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2 * padded) + data[at:]


WAV, FLAC, OGG, OPUS = encoded("WAV", "PCM_16"), encoded("FLAC"), encoded("OGG", "VORBIS"), encoded("OGG", "OPUS")
AIFF, AU, W64, CAF, NIST, RF64, RIFX = (
    *(encoded(f, "PCM_16") for f in ("AIFF", "AU", "W64", "CAF", "NIST", "RF64")), encoded("WAV", "PCM_16", endian="BIG"))
XING = mp3().index(b"Xing")
SSND, W64_DATA, CAF_DATA = AIFF.index(b"SSND"), W64.index(b"data"), CAF.index(b"data")
LIST = b"LIST" + struct.pack("<I", 12) + b"INFO" + bytes(8)

WHOLE = {  # name: (bytes, seconds)
    "mp3": (mp3(), SECONDS),
    "mp3 without a count": (mp3(LOUD_FIRST, False), SECONDS),
    "mp3 without a count, Info in a tag": (
        b"ID3\x03\0\0\0\0\0\x32" + b"COMM" + struct.pack(">I", 40) + bytes(2) + b"\0engMore Info: www.example.org".ljust(40)
        + mp3(LOUD_FIRST, False), SECONDS),
    "mp3 that counts half": (put(mp3(), XING + 8, ">I", 56), SECONDS),
    "mp3 that counts double": (put(mp3(), XING + 8, ">I", 222), SECONDS),
    "mp3 that counts nothing": (put(mp3(), XING + 4, ">I", 0), SECONDS),
    "mp3s end to end": (mp3() * 3, 3 * SECONDS),
    "mp3s with tags end to end": (mp3() + ID3V1 + ID3 + mp3() + APE + ID3V1, 2 * SECONDS),
    "mp3s of which the first has no count": (mp3(counted=False) + mp3(), 2 * SECONDS),
    "mp3s of which the first is cut and has no count": (
        mp3(counted=False)[:9000] + mp3(), SECONDS * (1 + 9000 / len(mp3(counted=False)))),
    "mp3s of one and two channels": (mp3() + mp3(np.stack([NOISE, NOISE], 1)), 2 * SECONDS),
    "mp3 with garbage in it": (bytes(5000) + mp3(counted=False)[:9000] + os.urandom(70_000) + mp3(counted=False)[9000:],
                               SECONDS),
    "mp3 behind two tags": (ID3 * 2 + mp3(), SECONDS),
    "mp3 from the middle of a frame": (mp3(counted=False)[50:], SECONDS),
    "chained vorbis": (OGG + encoded("OGG", "VORBIS", LOUD_FIRST), 2 * SECONDS),
    "a file chained to itself": (OGG * 2, 2 * SECONDS),
    "chained opus": (OPUS * 3, 3 * SECONDS),
    "chained vorbis and opus": (OGG + OPUS, 2 * SECONDS),
    "chained, one and two channels": (OGG + encoded("OGG", "VORBIS", np.stack([NOISE, NOISE], 1)), 2 * SECONDS),
    "chained, garbage between": (OGG + bytes(3000) + OGG + ID3V1, 2 * SECONDS),
    "ogg behind a tag": (ID3 + OGG, SECONDS),
    "wav": (WAV, SECONDS),
    "wav of size 0": (put(WAV, wav_at(WAV), "<I", 0), SECONDS),
    "wav of size 0, RIFF too": (put(put(WAV, wav_at(WAV), "<I", 0), 4, "<I", 0), SECONDS),
    "wav of size 0, a chunk behind": (put(WAV, wav_at(WAV), "<I", 0) + LIST, SECONDS),
    "wav of float and size 0": (put(f := encoded("WAV", "FLOAT"), wav_at(f), "<I", 0), SECONDS),
    "wav of size -1": (put(WAV, wav_at(WAV), "<I", 0xFFFFFFFF), SECONDS),
    "wav of size 2 GB": (put(WAV, wav_at(WAV), "<I", 0x7FFFF000), SECONDS),
    "wav that promises half": (put(WAV, wav_at(WAV), "<I", N), SECONDS / 2),
    "wav, sound and garbage": (WAV + os.urandom(3000), SECONDS),
    "wav behind a tag": (ID3 + WAV, SECONDS),
    "wav of size 0 behind two tags": (ID3 * 2 + put(WAV, wav_at(WAV), "<I", 0), SECONDS),
    "wav, 3 MB before its sound": (with_chunk(WAV, b"bext", bytes(3 << 20)), SECONDS),
    "wav, odd chunk": (with_chunk(WAV, b"note", b"x" * 33), SECONDS),
    "wav, odd chunk unpadded": (with_chunk(WAV, b"note", b"x" * 33, padded=False), SECONDS),
    "wavs end to end": (WAV + encoded("WAV", "FLOAT"), 2 * SECONDS),
    "rifx of size 0": (put(RIFX, wav_at(RIFX), ">I", 0), SECONDS),
    "rf64 of size 0": (put(RF64, RF64.index(b"ds64") + 16, "<Q", 0), SECONDS),
    "rf64 of size -1": (put(RF64, RF64.index(b"ds64") + 16, "<Q", (1 << 64) - 1), SECONDS),
    "bw64": (b"BW64" + RF64[4:], SECONDS),
    "w64 of size 0": (put(W64, W64_DATA + 16, "<Q", 0), SECONDS),
    "w64 of size 2**63 - 1": (put(W64, W64_DATA + 16, "<Q", (1 << 63) - 1), SECONDS),
    "caf of size -1": (put(CAF, CAF_DATA + 4, ">Q", (1 << 64) - 1), SECONDS),
    "aiff of size 0": (put(AIFF, SSND + 4, ">I", 0), SECONDS),
    "aiff, 70 KB before its sound": (AIFF[:12] + b"ANNO" + struct.pack(">I", 70_001) + bytes(70_002) + AIFF[12:], SECONDS),
    "aiff behind a tag": (ID3 + AIFF, SECONDS),
    "au of size 0": (put(AU, 8, ">I", 0), SECONDS),
    "au of size -1": (put(AU, 8, ">I", 0xFFFFFFFF), SECONDS),
    "au that promises half": (put(AU, 8, ">I", N), SECONDS / 2),
    "nist, garbage behind": (NIST + b"junk" * 1000, SECONDS),
    "flac behind two tags": (ID3 * 2 + FLAC, SECONDS),
    "flac before a tag": (FLAC + ID3V1, SECONDS),
    "flac before tags": (ID3 + FLAC + APE + ID3V1, SECONDS),
    "flac before garbage": (FLAC + bytes(30_000), SECONDS),
    "flac that counts 0": (put(FLAC, 22, ">I", 0), SECONDS),
    "flac that counts a second": (put(FLAC, 22, ">I", RATE), SECONDS),
    "flac of silence": (encoded("FLAC", wav=np.concatenate([NOISE, np.zeros(5000)])), SECONDS + 5000 / RATE),
}
BAD = {  # name: (bytes, reason, text)
    "mp3 cut": (mp3()[:len(mp3()) // 2], "truncated", "of 114 MP3 frames"),
    "mp3s, the second cut": (mp3() + mp3()[:9000], "truncated", "MP3 frames"),
    "mp3s of two rates": (mp3() + encoded("MP3", wav=NOISE, rate=24_000), "unreadable", "parts of 16000 and 24000 Hz"),
    "oggs of two rates": (OGG + encoded("OGG", "VORBIS", rate=22_050), "unreadable", "parts of 16000 and 22050 Hz"),
    "ogg cut": (OGG[:-2000], "truncated", "no end page"),
    "oggs, the second cut": (OGG + OGG[:-2000], "truncated", "no end page"),
    "wav cut": (WAV[:-1], "truncated", f"{2 * N - 1} of {2 * N} bytes of samples"),
    "wav of 2.1 GB cut": (put(WAV, wav_at(WAV), "<I", 0x80000000 + 4000), "truncated", f"{2 * N} of 2147487648"),
    "wav cut behind 3 MB": (with_chunk(WAV, b"bext", bytes(3 << 20))[:-9000], "truncated", f"of {2 * N} bytes of samples"),
    "wav cut before its sound": (with_chunk(WAV, b"bext", bytes(3 << 20))[:1 << 20], "truncated", "of chunk 'bext'"),
    "wav cut behind a tag": ((ID3 + WAV)[:9000], "truncated", "bytes of samples"),
    "wavs, the second cut": (WAV + WAV[:9000], "truncated", "bytes of samples"),
    "wav of rate 0": (put(WAV, 24, "<I", 0), "sample rate", "0 Hz"),
    **{f"{name} cut": (data[:N], "truncated", "bytes of samples") for name, data in {
        "rifx": RIFX, "rf64": RF64, "w64": W64, "caf": CAF, "aiff": AIFF, "au": AU, "nist": NIST,
        "au little": encoded("AU", "PCM_16", endian="LITTLE")}.items()},
    "aifc cut": (encoded("AIFF", "ULAW")[:9000], "truncated", "bytes of samples"),
    "nist shorten": (NIST.replace(b"-s3 pcm", b"-s26 pcm,embedded-shorten-v2.00"), "unreadable", "sph2pipe"),
    "flac cut": (FLAC[:len(FLAC) // 2], "truncated", f"of {N} samples"),
    "flac cut behind a tag": ((ID3 + FLAC)[:len(FLAC) // 2], "truncated", f"of {N} samples"),
    "flac that counts a second more": (put(FLAC, 22, ">I", N + RATE), "truncated", f"{N} of {N + RATE} samples"),
    "flacs end to end": (FLAC * 2, "unreadable", "several FLAC files end to end"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_all_of_the_sound_is_read_whatever_the_header_counts(tmp_path, name):
    data, seconds = WHOLE[name]
    path = tmp_path / "a"  # the bytes tell the format, not the name
    path.write_bytes(data)
    measured = scan.measure(str(path))
    slack = 0.12 if name.startswith("mp3") else 0  # padding, and frames beside garbage
    assert measured.frames / measured.rate == pytest.approx(seconds, abs=slack)
    check_audio(str(path))
    wav_T = np.concatenate([*audio.stream(str(path))])
    assert len(wav_T) == measured.frames
    # mpg123 adds in another order after a seek.
    np.testing.assert_allclose(audio.decode(str(path), 20_077, 1000)[0], wav_T[20_077:21_077], atol=1e-6)
    if name.startswith(("wav", "rifx", "rf64", "bw64", "w64", "caf", "aiff", "au", "nist", "flac")):
        np.testing.assert_allclose(wav_T[:30_000], NOISE[:30_000], atol=2e-4)  # no header or tag is heard


@pytest.mark.parametrize("name", BAD)
def test_what_a_header_promises_and_a_file_lacks_is_refused_alike_everywhere(tmp_path, name):
    data, reason, text = BAD[name]
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(Unusable) as error:
        scan.measure(str(tmp_path / "a"))
    assert error.value.args[0] == reason and text in error.value.args[1]
    with pytest.raises(ValueError, match=reason) as error:
        check_audio(str(tmp_path / "a"))
        [*audio.stream(str(tmp_path / "a"))]
    assert str(tmp_path / "a") in str(error.value)


@pytest.mark.parametrize("name", ["mp3s end to end", "chained opus", "wav of size 0, a chunk behind", "flac before tags"])
def test_a_remote_file_is_read_as_a_local_one(tmp_path, name):
    (tmp_path / "a").write_bytes(WHOLE[name][0])
    fsspec.filesystem("memory").pipe("/containers/a", WHOLE[name][0])
    local, remote = (scan.measure(p) for p in (str(tmp_path / "a"), "memory://containers/a"))
    assert local.frames == remote.frames
    np.testing.assert_array_equal(local.peaks, remote.peaks)


def test_a_wav_over_4_gb_is_counted_by_its_bytes(tmp_path):
    """Its header counts modulo 2**32."""
    seconds, head = 200_000, WAV[:wav_at(WAV)]
    with open(tmp_path / "a.wav", "wb") as f:
        f.write(head + struct.pack("<I", 2 * RATE * seconds % 2**32))
        f.truncate(len(head) + 4 + 2 * RATE * seconds)  # without taking room on the disk
    with audio.open_sound(str(tmp_path / "a.wav")) as sound:
        assert sound.frames == RATE * seconds
        sound.seek(RATE * seconds - 10)
        assert len(sound.read(100)) == 10


def raw_of(data: bytes) -> Raw:
    return Raw("a", io.BytesIO(data), len(data), True)


@pytest.mark.timeout(60)
def test_many_gaps_chunks_or_links_are_refused_soon(tmp_path):
    frames = mpeg_frame(mp3()) + mp3(counted=False)[:2000]
    page = OGG[:OGG.index(b"OggS", 4)]
    for data in (b"".join(frames + bytes(50) for _ in range(1500)), WAV[:12] + b"JUNK\0\0\0\0" * 5000, page * 1,
                 (page + OGG[OGG.index(b"OggS", 4):][:5000]) * 1500):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(Unusable):
            scan.measure(str(tmp_path / "a"))


def test_a_window_joins_bytes_and_ranges():
    window = Window(raw_of(bytes(range(100))), ((10, 20), b"abc", (50, 52)))
    assert window.read() == bytes(range(10, 20)) + b"abc" + bytes([50, 51]) and window.read(5) == b""
    window.seek(-4, 2)
    assert (window.tell(), window.read(3), window.size) == (11, b"bc\x32", 15)
