"""Files and folders through a codec: audio to codes files and back, local or any fsspec URI, in constant memory.

A codes file is one safetensors file per audio file.  Tensor: `codes` uint16 (T, Q).  Metadata, as strings: format,
codec (its hash), name, sample_rate (Hz), hop (samples), n_q (levels stored), vocab, samples (true length at sample_rate),
source (relative name) and source_hash.  The last frame is padded with zeros; decoding cuts the sound to its true length.
Files appear whole or not at all; a file made of the same input by the same codec is skipped.
wav_T is float32 mono at the codec's rate.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import posixpath
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError

from audiolm import store
from audiolm.data import audio
from audiolm.data.audio_check import audio_errors, check_audio, error_line
from audiolm.data.containers.raw import Unusable
from audiolm.data.inputs import walk
from audiolm.local_disk import aside_of
from audiolm.places import short_name
from audiolm.tokenizers.acoustic import AcousticTokenizer, chunks

FORMAT = "audiolm codes 1"
CODES = ".safetensors"
NAME_BYTES = 255  # of a file name, on every disk in use
REDRAW_S = 0.5  # between two updates of a terminal's percentage
PIECE_S = 60.0  # audio given at once to an imported codec, which has no streaming of its own
Tick = Callable[[float, float], None]  # (seconds done, seconds in all by the file's header)


@dataclass(frozen=True)
class FileJob:
    """One file to encode or decode."""

    name: str  # the path below the INPUT folder
    path: str
    target: str


@dataclass(frozen=True)
class FileResult:
    """A file that was made."""

    audio_s: float
    kbps: float  # of the codes, nominal


def find_files(inputs: Iterable[str], suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
    """(name, path) of named files, whatever their suffix, and of files with a known suffix below folders.

    Hidden files and folders are left out; the order is natural (2 before 10), the same on every filesystem.
    Raises ValueError for a folder without such files.
    """
    files = []
    for place in inputs:
        fs, p = store.open_fs(place)
        found = [(posixpath.basename(p.rstrip("/")), place)]
        if fs.isdir(p):
            found = walk.find(place, lambda name: name.lower().endswith(suffixes))
        if not found:
            raise ValueError(f"no files ending in {', '.join(suffixes)} below {place}; name another folder, or the files")
        files += found
    return files


def plan(inputs: Iterable[str], suffixes: tuple[str, ...], out: str, ending: str) -> list[FileJob]:
    """The jobs: each file found becomes the same relative name below `out` with another ending.

    Raises ValueError as `find_files` does and where two inputs would have one target.
    """
    jobs: dict[str, FileJob] = {}
    for name, path in find_files(inputs, suffixes):
        folder, base = posixpath.split(posixpath.splitext(name)[0])
        base = short_name(base, NAME_BYTES - len(ending))  # the other ending may be longer
        job = FileJob(name, path, store.join(out, posixpath.join(folder, base + ending)))
        if job.target in jobs:
            raise ValueError(f"{path} and {jobs[job.target].path} would both become {job.target}: take them one at a "
                             "time, with an --out of its own each")
        jobs[job.target] = job
    return list(jobs.values())


def work(jobs: list[FileJob], do: Callable[[FileJob, Tick], FileResult | None]) -> int:
    """Does the jobs and prints a line each and a total. A bad file is reported and skipped; returns their number.

    `do` returns None where a file is done already.
    """
    # On a terminal a percentage overwrites itself; in a log there are whole lines alone.
    began, counts, total_s = time.monotonic(), {"done": 0, "skipped": 0, "failed": 0}, 0.0
    tty = sys.stdout.isatty()
    clear = "\r\x1b[K" if tty else ""
    for job in jobs:
        start = time.monotonic()
        try:
            done = do(job, _ticker(job.name) if tty else lambda done_s, of_s: None)
        except Exception as e:  # noqa: BLE001  whatever a file or filesystem raises, the next one is tried
            counts["failed"] += 1
            print(clear, end="", flush=True)
            print(f"error: {error_line(job.path, e)}", file=sys.stderr, flush=True)
            continue
        if done is None:
            counts["skipped"] += 1
            print(f"{clear}{job.name}  is done already", flush=True)
            continue
        counts["done"] += 1
        total_s += done.audio_s
        print(f"{clear}{job.name}  {_speed(done.audio_s, time.monotonic() - start)}, {done.kbps:.2f} kb/s", flush=True)
    total = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    print(total + (f": {_speed(total_s, time.monotonic() - began)}" if counts["done"] else ""), flush=True)
    return counts["failed"]


def _speed(audio_s: float, wall_s: float) -> str:
    return f"{audio_s:.2f} s of audio in {wall_s:.2f} s, {audio_s / max(wall_s, 1e-9):.1f}x real time"


def _ticker(name: str) -> Tick:
    """A Tick that shows a percentage, at most every REDRAW_S seconds."""
    shown = time.monotonic()

    def tick(done_s: float, of_s: float) -> None:
        nonlocal shown
        if time.monotonic() - shown > REDRAW_S:
            shown = time.monotonic()
            print(f"\r{name}  {min(100.0, 100 * done_s / max(of_s, 1e-9)):3.0f} %", end="", flush=True)

    return tick


def _result(codec: Any, levels: int, samples: int) -> FileResult:
    spec = codec.spec
    return FileResult(samples / spec.sample_rate, spec.rate_hz * levels * math.log2(spec.vocab) / 1000)


def encode_file(codec: Any, job: FileJob, levels: int, force: bool, tick: Tick) -> FileResult | None:
    """Audio file to codes file, `levels` of them; None where the file is done already.

    Raises ValueError and FileNotFoundError for audio that is missing, empty, truncated, not audio or not finite.
    """
    spec, samples = codec.spec, 0
    source_hash, about_s = check_audio(job.path)
    meta = {"format": FORMAT, "codec": codec.hash, "name": spec.name, "sample_rate": str(spec.sample_rate),
            "hop": str(spec.hop), "n_q": str(levels), "vocab": str(spec.vocab), "source": job.name, "source_hash": source_hash}
    if not force and _is_done(job.target, meta):
        return None

    def blocks() -> Iterator[np.ndarray]:
        nonlocal samples
        for wav_T in audio.stream(job.path, spec.sample_rate):
            samples += len(wav_T)
            yield wav_T
            tick(samples / spec.sample_rate, about_s)

    with audio_errors(job.path):
        # 12 levels at 50 Hz in 16 bits are 4 MB an hour, so the codes of a whole file stay in memory.
        codes_TQ = np.concatenate([codes_TQ[:, :levels].numpy().astype(np.uint16) for codes_TQ in _encode(codec, blocks())])
    store.put(job.target, safetensors.numpy.save({"codes": codes_TQ}, {**meta, "samples": str(samples)}))
    return _result(codec, levels, samples)


def decode_file(codec: Any, job: FileJob, levels: int | None, form: str, force: bool, tick: Tick) -> FileResult | None:
    """Codes file to a 16-bit wav or flac file (`form`) of the true length, from the first `levels` or all there are.

    None where it is done already. Raises ValueError for files of another codec or not ours.
    """
    import soundfile

    spec = codec.spec
    codes_TQ, meta = read_codes(job.path)
    samples = _check_fits(job.path, codes_TQ, meta, codec)
    levels = levels or codes_TQ.shape[1]
    if levels > codes_TQ.shape[1]:
        raise ValueError(f"{job.path} holds {codes_TQ.shape[1]} levels, --levels asks for {levels}: give at most those")
    # The audio file notes what it was made from, in its comment field, so that a second run can skip it and a file
    # that somebody else put there is never replaced.
    content = hashlib.blake2b(codes_TQ.tobytes() + meta["samples"].encode(), digest_size=8).hexdigest()
    comment = f"audiolm codec {codec.hash} levels {levels} codes {content}"
    if not force and (there := _comment(job.target)) is not None:
        if there == comment:
            return None
        if not there.startswith("audiolm codec "):
            raise ValueError(f"{job.target} is there and was not made by decode: name another --out, or --force")
    # Write chunk by chunk and cut the last one at the true length: its padding is no part of the recording.
    step, written = int(PIECE_S * spec.rate_hz), 0
    pieces = (torch.from_numpy(codes_TQ[i:i + step, :levels].astype(np.int64)) for i in range(0, len(codes_TQ), step))
    with appearing(job.target) as aside, soundfile.SoundFile(aside, "w", spec.sample_rate, 1, "PCM_16", format=form) as f:
        f.comment = comment
        for wav_T in _decode(codec, pieces):
            wav_T = wav_T[:samples - written].numpy()
            f.write(np.clip(wav_T, -1.0, 1.0))  # 16 bits cannot hold more, and would wrap around
            written += len(wav_T)
            tick(written / spec.sample_rate, samples / spec.sample_rate)
    return _result(codec, levels, samples)


def read_codes(path: str) -> tuple[np.ndarray, dict[str, str]]:
    """(codes_TQ uint16, metadata) of a codes file. Raises FileNotFoundError, ValueError for any other file."""
    data = store.get(path)
    try:
        meta = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        codes_TQ = safetensors.numpy.load(data)["codes"]
        if meta["format"] != FORMAT or codes_TQ.dtype != np.uint16 or codes_TQ.ndim != 2 or not codes_TQ.size:
            raise ValueError(meta["format"])
        if not 0 < int(meta["samples"]) <= len(codes_TQ) * int(meta["hop"]):
            raise ValueError(meta["samples"])
        return codes_TQ, meta
    except (ValueError, KeyError, TypeError, SafetensorError) as e:
        raise ValueError(f"{path} is no whole codes file (safetensors with `codes` uint16 (T, Q) and format {FORMAT!r}): make "
                         "it with `codec.py encode`") from e


def _check_fits(path: str, codes_TQ: np.ndarray, meta: dict[str, str], codec: Any) -> int:
    """The true length in samples. Raises ValueError where the codes are not this codec's."""
    spec, levels = codec.spec, codes_TQ.shape[1]
    if meta["codec"] != codec.hash:
        raise ValueError(f"{path} was made by codec {meta['codec']} ({meta.get('name')}), this codec is {codec.hash} "
                         f"({spec.name}): name the one that made it with --codec, or encode the audio again with this one")
    if levels > spec.n_q:
        raise ValueError(f"{path} holds {levels} levels, this codec has {spec.n_q}: the file was changed, encode again")
    if (high := int(codes_TQ.max())) >= spec.vocab:
        raise ValueError(f"{path} holds code {high}, this codec has codes 0 to {spec.vocab - 1}: the file was changed, "
                         "encode again")
    return int(meta["samples"])


def _encode(codec: Any, blocks: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
    """codes_TQ piece by piece. An imported codec gets real sound on both sides of a piece, and its own frames are kept."""
    if isinstance(codec, AcousticTokenizer):
        yield from codec.encode_stream(blocks)
        return
    # Seams: a frame near a cut sees `history` and `lookahead` frames of real sound instead of padding.
    hop, size = codec.spec.hop, int(PIECE_S * codec.spec.rate_hz)
    parts = (torch.from_numpy(wav_T)[None] for wav_T in blocks)
    for wav_BT, before, _ in chunks(parts, size * hop, codec.history * hop, codec.lookahead * hop):
        codes_TQ = codec.encode(wav_BT, torch.tensor([wav_BT.shape[1]]))[0]
        yield codes_TQ[before // hop:][:size]


def _decode(codec: Any, codes: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """wav_T piece by piece, as `_encode`."""
    if isinstance(codec, AcousticTokenizer):
        yield from codec.decode_stream(codes)
        return
    hop, size = codec.spec.hop, int(PIECE_S * codec.spec.rate_hz)
    for codes_BTQ, before, own in chunks((codes_TQ[None] for codes_TQ in codes), size, codec.history, codec.lookahead):
        yield codec.decode(codes_BTQ)[0, before * hop:(before + own) * hop].cpu()


def _is_done(path: str, meta: dict[str, str]) -> bool:
    try:
        found = read_codes(path)[1]
    except (FileNotFoundError, ValueError):
        return False
    return all(found.get(key) == value for key, value in meta.items())


def _comment(path: str) -> str | None:
    """The comment that decode_file left in the audio file at a path; None where none can be read."""
    import soundfile

    try:
        with audio.open_sound(path) as f:
            return f.comment
    except (FileNotFoundError, Unusable, soundfile.SoundFileError):
        return None


@contextmanager
def appearing(path: str) -> Iterator[str]:
    """A name on this machine's disk to write to; the file appears at `path` when the block ends without an error."""
    fs, p = store.open_fs(path)
    if not isinstance(fs, LocalFileSystem):
        with tempfile.TemporaryDirectory() as folder:
            yield (aside := os.path.join(folder, posixpath.basename(p)))
            fs.put_file(aside, p)
        return
    os.makedirs(os.path.dirname(p), exist_ok=True)
    aside = aside_of(p)
    try:
        yield aside
        os.replace(aside, p)
    finally:
        if os.path.exists(aside):
            os.unlink(aside)
