"""Shipped codecs to compare with, on the same clips: Opus and Lyra v2.

A `Baseline` maps wav_T (mono float32 at 16 kHz) to (made_T, bits): the decoded audio, as long as wav_T and aligned with
it, and the size of its packets without any container.  Opus is `opusenc` where that is on the PATH, else libsndfile's
encoder; both use variable bit rates, so rates are measured.  Lyra v2 (a shipped SoundStream) needs the package
ai-edge-litert and its three models.  A codec that is missing gives the reason in `absent`.
"""

from __future__ import annotations

import functools
import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audiolm import store
from audiolm.tokenizers.base import SAMPLE_RATE

OPUS_KBPS, LYRA_KBPS = (6.0, 12.0, 16.0), (3.2, 6.0, 9.2)
LYRA_HOP, LYRA_BITS = 320, 4  # samples a frame; bits of one quantizer level, in all 64, 120 or 184 a frame
LYRA_MODELS = ("soundstream_encoder.tflite", "quantizer.tflite", "lyragan.tflite")


@dataclass(frozen=True)
class Baseline:
    """A shipped codec at one bit rate."""

    codec: str
    kbps: float  # nominal
    round_trip: Callable[[np.ndarray], tuple[np.ndarray, int]] | None
    absent: str = ""  # the reason where there is no round_trip


def baselines(lyra: str | None = None) -> list[Baseline]:
    """Opus at 6, 12 and 16 kb/s and Lyra v2 at 3.2, 6 and 9.2; `lyra`: folder or URI of Lyra's three .tflite models."""
    return opus() + lyra_v2(lyra)


def opus(kbps: tuple[float, ...] = OPUS_KBPS) -> list[Baseline]:
    """Opus by opusenc and opusdec, else by libsndfile; one absent entry where neither can."""
    import soundfile

    if shutil.which("opusenc") and shutil.which("opusdec"):
        name, encode = "Opus (opusenc)", opus_by_tools
    elif "OPUS" in soundfile.available_subtypes("OGG"):
        name, encode = f"Opus (libsndfile {soundfile.__libsndfile_version__})", opus_by_libsndfile
    else:
        return [Baseline("Opus", kbps[0], None, "no opusenc and opusdec on the PATH and a libsndfile without Opus: install "
                                                "opus-tools or soundfile's own wheel")]
    return [Baseline(name, k, functools.partial(encode, kbps=k)) for k in kbps]


def opus_by_tools(wav_T: np.ndarray, kbps: float) -> tuple[np.ndarray, int]:
    """Round trip through opus-tools. Raises CalledProcessError where they fail."""
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        source, packed, made = (f"{folder}/{name}" for name in ("in.wav", "x.opus", "out.wav"))
        soundfile.write(source, wav_T, SAMPLE_RATE, subtype="PCM_16")
        subprocess.run(["opusenc", "--quiet", "--bitrate", f"{kbps:g}", source, packed], check=True)
        subprocess.run(["opusdec", "--quiet", "--no-dither", "--rate", str(SAMPLE_RATE), packed, made], check=True)
        made_T, _ = soundfile.read(made, dtype="float32")
        return _fit(made_T, len(wav_T)), opus_bits(Path(packed).read_bytes())


def opus_by_libsndfile(wav_T: np.ndarray, kbps: float) -> tuple[np.ndarray, int]:
    """Round trip through libsndfile, which maps compression levels 0 to 1 to 256 to 6 kb/s and drops the pre-skip."""
    import soundfile

    sink = io.BytesIO()
    soundfile.write(sink, wav_T, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=1 - (kbps - 6) / 250)
    bits = opus_bits(sink.getvalue())
    sink.seek(0)
    made_T, _ = soundfile.read(sink, dtype="float32")
    return _fit(made_T, len(wav_T)), bits


def opus_bits(ogg: bytes) -> int:
    """Bits of an Ogg Opus file's audio packets: no pages, no headers (RFC 3533, 7845). Raises ValueError for no Ogg."""
    # A page: 27 bytes of header, whose last is the number of segments, their lengths, then their bytes.
    packets, size, at = [], 0, 0
    while at < len(ogg):
        if ogg[at:at + 4] != b"OggS":
            raise ValueError(f"no Ogg page at byte {at} of {len(ogg)}: give a whole Ogg Opus file")
        segments = ogg[at + 27:at + 27 + ogg[at + 26]]
        for segment in segments:
            size += segment
            if segment < 255:  # a packet ends with its first segment that is not full
                packets.append(size)
                size = 0
        at += 27 + len(segments) + sum(segments)
    return 8 * sum(packets[2:])  # the first two are OpusHead and OpusTags


def _fit(made_T: np.ndarray, samples: int) -> np.ndarray:
    return np.pad(made_T[:samples], (0, max(0, samples - len(made_T)))).astype(np.float32)


def lyra_v2(folder: str | None, kbps: tuple[float, ...] = LYRA_KBPS) -> list[Baseline]:
    """Lyra v2 from a folder or URI with its models; one absent entry where a model or ai-edge-litert is missing."""
    def absent(why: str) -> list[Baseline]:
        return [Baseline("Lyra v2", kbps[0], None, why)]

    if folder is None:
        return absent("no folder with its models was given (evaluate.lyra)")
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        return absent("ai-edge-litert is not installed (pip install ai-edge-litert)")
    try:
        encoder, quantizer, decoder = (store.get(store.join(folder, name)) for name in LYRA_MODELS)
    except FileNotFoundError:
        return absent(f"{folder} lacks one of {', '.join(LYRA_MODELS)}")
    runner = Interpreter(model_content=quantizer, num_threads=1)
    quantize, dequantize = (runner.get_signature_runner(name) for name in ("encode", "decode"))

    def round_trip(wav_T: np.ndarray, rate_kbps: float) -> tuple[np.ndarray, int]:
        bits = round(1000 * rate_kbps * LYRA_HOP / SAMPLE_RATE)  # of a frame
        # A new pair for each clip: both carry state from frame to frame, and a reset leaves some of the last clip's.
        encode, decode = (Interpreter(model_content=model, num_threads=1) for model in (encoder, decoder))
        encode.allocate_tensors()
        decode.allocate_tensors()
        frames_TN = np.pad(wav_T.astype(np.float32), (0, -len(wav_T) % LYRA_HOP)).reshape(-1, 1, LYRA_HOP)
        decoded = []
        for frame in frames_TN:
            outputs = quantize(input_frames=_invoke(encode, frame), num_quantizers=np.int32(bits // LYRA_BITS))
            codes = next(v for v in outputs.values() if v.dtype == np.int32)  # the other output are the quantized features
            features, = dequantize(encoding_indices=codes).values()
            decoded.append(_invoke(decode, features)[0])
        return _fit(np.concatenate(decoded), len(wav_T)), bits * len(frames_TN)

    return [Baseline("Lyra v2", k, functools.partial(round_trip, rate_kbps=k)) for k in kbps]


def _invoke(model, x: np.ndarray) -> np.ndarray:
    model.set_tensor(model.get_input_details()[0]["index"], x)
    model.invoke()
    return model.get_tensor(model.get_output_details()[0]["index"])
