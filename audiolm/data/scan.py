"""Decodes audio files once, in parallel tasks, and cuts them into usable stretches.

Only decoding gives the true length of lossy files and finds silent, truncated and non-finite audio.  Audio longer than
`max_s` is cut at the quietest tenth of a second near equal parts.  `scan_group` is the task: it writes one JSON file
named by a hash of its input, so a resumed step decodes no file twice.  All positions are frames at the file's own rate.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import partial

import numpy as np

from audiolm import store
from audiolm.config.corpus import CorpusConfig, Source
from audiolm.data import apart, audio_check, filters
from audiolm.data.audio import BLOCK_SAMPLES, open_sound
from audiolm.data.channels import FAR_LESS, check_level, mix
from audiolm.data.containers.raw import Unusable
from audiolm.data.inputs.found import Found, ending
from audiolm.data.inputs.packed import members

QUIET_S = 2.0  # how far a cut may move from its even place to a quiet one
ROOM_TO_CUT = 0.95  # pieces are planned this much shorter than max_s, so that every cut can move
ROUNDING_S = 0.1  # how far a table's rounded start and duration may pass the file's end
MOST_S = 14 * 24 * 3600  # of a file: its peaks take 48 MB
CPU_S = 60  # for a minute of audio, which decodes in a second even with hundreds of channels
REASONS = ("missing", "empty", "unreadable", "sample rate", "truncated", "non-finite", "too loud", "silent", "too short",
           "too long", "out of range", "narrow band", "little speech", "low quality", "left out")


@dataclass(frozen=True)
class Measured:
    """A decoded file: frames as decoded, and the peak of every `block` frames (NaN or inf where a sample is).

    The peak is that of the loudest channel.  `powers`, of several channels: a row a block of the power of their mean, the
    strongest channel's, and its index."""

    rate: int
    frames: int
    block: int
    peaks: np.ndarray
    powers: np.ndarray

    def channel(self, start: int, frames: int) -> int | None:
        """The strongest channel of a stretch where the mean of the channels has far less power, else None."""
        mean, strongest, index = self.powers[start // self.block:-(-(start + frames) // self.block)].T
        if not mean.sum() < FAR_LESS * strongest.sum():
            return None
        return int(np.argmax(np.bincount(index.astype(np.int64), weights=strongest)))


Scanned = tuple[str, Measured | Unusable]  # (content hash, the measured file or its fault)


def scan_group(found: list[Found], corpus: CorpusConfig, folder: str) -> str:
    """Scans the files of some rows; writes and returns `{folder}/{key}.json`:
    {files: [[row, content hash]], units: [[row, rate, start, frames, piece, pieces, channel]],
    rejected: [[row, start, frames, reason, detail]], found: the sounds}, rows counted within these.

    They are `found`, or what the container holds that is its only entry; of that, `found` is written as rows of fields."""
    limits = [corpus.min_s, corpus.max_s, corpus.silence_db, *filters.floors(corpus).items()]
    source = next((s for s in corpus.sources if s.name == found[0].origin), None) if found[0].container else None
    recipe = json.dumps([limits, [(f.uri, *astuple(f)[:5], f.start, f.duration) for f in found],
                         *([source.model_dump(mode="json")] if source else [])])
    path = store.join(folder, hashlib.sha256(recipe.encode()).hexdigest()[:16] + ".json")
    if store.exists(path):
        return path
    # A container is read again from its beginning where a network fails within it.
    scanned = store.persist(found[0].path, lambda: _scan_all(found, corpus, source)) if source else _scan_all(found, corpus)
    store.put_json(path, scanned)
    return path


def _scan_all(found: list[Found], corpus: CorpusConfig, source: Source | None = None) -> dict:
    """What `scan_group` writes."""
    files, units, rejected, scanned, seen = [], [], [], {}, []
    for row, (f, scan) in enumerate(_scans(found, source, filters.floors(corpus))):
        seen.append(f)
        if f.path not in scanned:  # rows of a user's Parquet may share a file; they follow each other
            scanned = {f.path: scan()}
            files.append([row, scanned[f.path][0]])
        try:
            measured = scanned[f.path][1]
            if isinstance(measured, Unusable):
                raise measured
            start, frames = _stretch(f, measured)
            pieces = _cut(measured, start, frames, corpus)
        except Unusable as e:
            rejected.append([row, 0, 0, *e.args])
            continue
        for piece, (a, b) in enumerate(pieces):
            try:
                _check_piece(measured, a, b, corpus)
                units.append([row, measured.rate, a, b - a, piece, len(pieces), measured.channel(a, b - a)])
            except Unusable as e:  # one silent piece costs only itself; a whole file is rejected as (0, 0)
                rejected.append([row, a, b - a, *e.args] if len(pieces) > 1 else [row, 0, 0, *e.args])
    own = [list(vars(f).values()) for f in seen] if source else None
    return {"files": files, "units": units, "rejected": rejected, "found": own}


def _scans(found: list[Found], source: Source | None,
           floors: dict[str, float]) -> Iterator[tuple[Found, Callable[[], Scanned]]]:
    """(sound, the scan of its file) for each sound of `found`, or of the container of `source`."""
    if source is None:
        yield from ((f, partial(store.persist, f.path, partial(_scan_file, f, floors))) for f in found)
        return
    with tempfile.TemporaryDirectory() as folder:
        for f, data in members(source, found[0]):
            yield f, partial(_scan_bytes, f, floors, data, folder)


def _scan_bytes(f: Found, floors: dict[str, float], data: bytes, folder: str) -> Scanned:
    """Scans a container's sound from a file of its own on this machine: decoders read files, and a few tell by their ending."""
    path = os.path.join(folder, f"sound{ending(f.key)[:16]}")
    if not f.fault:
        with open(path, "wb") as file:
            file.write(data)
    return _scan_file(replace(f, path=path), floors)


def _scan_file(f: Found, floors: dict[str, float]) -> Scanned:
    """(content hash, the measured file or its fault). A network's failure is raised, so that Ray retries the task."""
    digest = ""
    try:
        if f.fault:
            raise Unusable(*f.fault)
        if f.size < 0:
            raise Unusable("missing", "no such file")
        head, tail = audio_check.edges(f.path, f.size)
        digest = audio_check.content_hash(head, tail, f.size)
        if f.size == 0:
            raise Unusable("empty", "no bytes")
        decode = partial(measure, f.path, partial(apart.allow_cpu, CPU_S))
        # an outage is known by its causes, which stay in the child
        measured = apart.call(store.persist, f.path, decode)
        if floors:
            apart.call(store.persist, f.path, partial(filters.check, f.path, measured.frames / measured.rate, floors))
        return digest, measured
    except Unusable as e:
        return digest, e
    except FileNotFoundError:
        return digest, Unusable("missing", "gone since it was listed")
    except PermissionError as e:
        return digest, Unusable("unreadable", f"denied: {e}")
    except apart.ChildDied as e:
        if e.status == -signal.SIGKILL:  # by somebody else: the file may be good
            name = f.name or f.path  # a container's sounds have a passing path
            raise RuntimeError(f"{name}: the process that decodes it was killed {apart.TRIES} times, as happens where memory "
                               "runs out: give the node more, or run fewer tasks at once (cluster.workers)") from None
        why = f"took over {CPU_S} s for a minute of it" if e.status == -signal.SIGXCPU else f"crashed ({e})"
        return digest, Unusable("unreadable", f"the decoder {why}, {apart.TRIES} times; convert the file anew")


def measure(path: str, at_block: Callable[[], None] = lambda: None) -> Measured:
    """Decodes a file once, and calls `at_block` before it is opened and before each minute of it.

    Raises Unusable: unreadable, sample rate, empty, truncated, too loud, too long."""
    import soundfile

    frames, promised, peaks, powers = 0, 0, [np.zeros(0, np.float32)], [np.zeros((0, 3), np.float32)]
    at_block()
    try:
        with open_sound(path) as f:
            rate, promised = f.rate, f.frames or 0
            block = rate // 10  # 0.1 s: short enough for a pause between words
            _check_length(promised, rate)
            at_once = block * max(1, min(600, BLOCK_SAMPLES // (block * f.channels)))  # whole blocks, a minute at most
            while len(wav_TC := f.read(at_once)):
                at_block()
                frames += len(wav_TC)
                _check_length(frames, rate)
                starts = np.arange(0, len(wav_TC), block)
                peaks.append(np.maximum.reduceat(np.abs(wav_TC).max(axis=1), starts))
                check_level(float(peaks[-1].max(initial=0, where=np.isfinite(peaks[-1]))))
                if f.channels > 1:
                    powers.append(_powers(wav_TC, starts))
    except soundfile.SoundFileError as e:
        if promised:
            raise Unusable("truncated", f"decoding stops within {promised} frames: {e}") from None
        raise Unusable("unreadable", f"{e}".replace(path, "").strip()) from None
    if frames == 0:
        raise Unusable("empty", "no frames")
    return Measured(rate, frames, block, np.concatenate(peaks), np.concatenate(powers))


def _powers(wav_TC: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(blocks, 3) as in Measured.powers."""
    by_channel = np.add.reduceat(np.square(wav_TC), starts)
    strongest = by_channel.argmax(axis=1)
    mean = np.add.reduceat(np.square(mix(wav_TC)), starts)
    return np.stack([mean, by_channel[np.arange(len(starts)), strongest], strongest], 1).astype(np.float32)


def _check_length(frames: int, rate: int) -> None:
    """Raises Unusable for more audio than one file may hold."""
    if frames > MOST_S * rate:
        raise Unusable("too long", f"more than {MOST_S // 3600} h at {rate} Hz; cut the file")


def _stretch(f: Found, m: Measured) -> tuple[int, int]:
    """(start, frames) within the file that a row names: all of it unless the row has a start or a duration."""
    start = round((f.start or 0.0) * m.rate)
    end = m.frames if f.duration is None else start + round(f.duration * m.rate)
    if start >= m.frames or end > m.frames + int(ROUNDING_S * m.rate):
        raise Unusable("out of range", f"{f.start or 0} s + {f.duration} s of {m.frames / m.rate:.2f} s")
    return start, min(end, m.frames) - start


def _cut(m: Measured, start: int, frames: int, corpus: CorpusConfig) -> list[tuple[int, int]]:
    """Stretches [a, b) of at most max_s that cover [start, start + frames)."""
    longest = int(corpus.max_s * m.rate)
    if frames <= longest:
        return [(start, start + frames)]
    n = -(-frames // int(ROOM_TO_CUT * longest))
    even = frames / n
    # Two neighbouring cuts may move towards or away from each other: each gets half of what max_s and min_s leave.
    room = int(max(0, min(QUIET_S * m.rate, (longest - even) / 2, (even - corpus.min_s * m.rate) / 2)))
    cuts = [start]
    for i in range(1, n):
        at = start + round(i * even)
        a, b = -(-(at - room) // m.block), (at + room) // m.block  # whole blocks inside the room
        # The middle of the quietest block, or the even place where the room holds no whole block.
        cuts.append((a + int(np.argmin(m.peaks[a:b]))) * m.block + m.block // 2 if a < b else at)
    return list(zip(cuts, [*cuts[1:], start + frames], strict=True))


def _check_piece(m: Measured, a: int, b: int, corpus: CorpusConfig) -> None:
    """Raises Unusable for a stretch [a, b) that is too short, has NaN or infinite samples, or is silent."""
    if b - a < corpus.min_s * m.rate:
        raise Unusable("too short", f"{(b - a) / m.rate:.3f} s, corpus.min_s is {corpus.min_s}")
    peaks = m.peaks[a // m.block:-(-b // m.block)]
    if not np.isfinite(peaks).all():
        raise Unusable("non-finite", "NaN or infinite samples")
    db = 20 * np.log10(max(float(peaks.max()), 1e-12))  # dB below full scale; the floor keeps log10 finite
    if db < corpus.silence_db:
        raise Unusable("silent", f"peak {db:.0f} dBFS, corpus.silence_db is {corpus.silence_db}")
