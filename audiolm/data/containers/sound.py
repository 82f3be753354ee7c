"""Open audio files: libsndfile's streams, one or several end to end, or FFmpeg's, through one interface."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from audiolm.data.containers.layout import Layout, layout
from audiolm.data.containers.raw import Raw, Unusable, Window, check_rate, open_raw

if TYPE_CHECKING:
    import soundfile

UNKNOWN_FRAMES = 1 << 60  # libsndfile reports 2**63 - 1 frames for a length that it does not know
EXACT = ("PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW")  # of libsndfile's codings; these seek to the exact frame
SLACK = 2304  # samples that a lossy file may lack: two MP3 frames, as encoders count their padding differently


class Sound(Protocol):
    """An open file. `frames` is what the header promises or a count has found, None where only decoding tells.

    `exact`: after `seek` the same samples come as in reading straight on."""

    rate: int
    channels: int
    frames: int | None
    exact: bool
    comment: str

    def read(self, frames: int) -> np.ndarray:
        """wav_TC float32: the next frames; fewer or none at the end. Raises Unusable for a file that ends too early."""

    def seek(self, frame: int) -> None: ...


@contextmanager
def open_sound(path: str) -> Iterator[Sound]:
    """An open file, local or remote. A failing network raises its own error, never a format error.

    Raises FileNotFoundError, Unusable for what the container's rules refuse, soundfile.SoundFileError for other faults."""
    try:
        with open_raw(path) as raw, ExitStack() as stack:
            try:
                yield _opened(raw, stack)
            finally:
                if raw.error:
                    raise raw.error from None
    except Unusable as e:
        e.path = path
        raise


def _opened(raw: Raw, stack: ExitStack) -> Sound:
    if not raw.size:
        raise Unusable("empty", "no bytes")
    how = layout(raw)
    if how.media:
        from audiolm.data.containers.media import MediaSound

        sound: Sound = MediaSound(raw, how.media, stack)
    else:
        sound = FileSound(raw, how, stack)
    check_rate(sound.rate)
    return sound


class FileSound:
    """A Sound of libsndfile: the streams of a layout, read one after the other."""

    def __init__(self, raw: Raw, how: Layout, stack: ExitStack):
        self.raw, self.links, self.copied, self.stack = raw, list(how.links), how.copied, stack
        self.at = self.done = 0  # the open stream, and its frames so far
        self.file = self._open(0)
        self.rate, self.channels, self.comment = self.file.samplerate, self.file.channels, self.file.comment
        first = self._promised()
        self.frames = first if len(self.links) < 2 else None
        self.exact = len(self.links) < 2 and _is_exact(self.file)

    def _open(self, at: int) -> soundfile.SoundFile:
        import soundfile

        source = Window(self.raw, self.links[at][0] if self.links else ((0, self.raw.size),))
        if self.copied:
            aside = self.stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(source, aside, 1 << 20)
            aside.seek(0)
            source = aside.fileno()
        elif self.raw.on_disk and not self.links:
            source = self.raw.path
        try:
            f = soundfile.SoundFile(source, closefd=False)
        except soundfile.LibsndfileError as e:  # names what it was given
            raise soundfile.LibsndfileError(e.code, f"Error opening {self.raw.path!r}: ") from None
        # After each read of a seekable file soundfile seeks to the current position.  That leaves a gap in MP3 and a
        # click in Opus.
        f.seekable = lambda: False
        self.stack.enter_context(f)
        return f

    def _promised(self) -> int | None:
        """Frames of the open stream, as counted or by its header."""
        counted = self.links[self.at][1] if self.links else None
        return counted if counted is not None else self.file.frames if self.file.frames < UNKNOWN_FRAMES else None

    def read(self, frames: int) -> np.ndarray:
        parts, left = [], frames
        while left:
            # An exact file is not asked for more than it promises: behind that may be anything.
            most = max(0, (self._promised() or left) - self.done) if _is_exact(self.file) else left
            wav_TC = self.file.read(min(left, most), dtype="float32", always_2d=True)
            self.done, left = self.done + len(wav_TC), left - len(wav_TC)
            parts.append(wav_TC if wav_TC.shape[1] == self.channels else wav_TC.mean(1, keepdims=True).repeat(self.channels, 1))
            if not len(wav_TC) and not self._next():
                break
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.zeros((0, self.channels), np.float32)])

    def _next(self) -> bool:
        """Opens the next stream; False at the end. Raises Unusable where this one has fewer frames than it promised."""
        promised = self._promised() or 0
        if self.done < promised - SLACK * (not _is_exact(self.file)):
            raise Unusable("truncated", f"{self.done} of {promised} frames decode")
        if self.at + 1 >= len(self.links):
            return False
        self.file.close()
        self.at, self.done = self.at + 1, 0
        self.file = self._open(self.at)
        if self.file.samplerate != self.rate:
            raise Unusable("unreadable", f"parts of {self.rate} and {self.file.samplerate} Hz end to end; cut them apart")
        return True

    def seek(self, frame: int) -> None:
        """To a frame, from the beginning. Several streams, and codings that cannot seek, are decoded up to it."""
        if len(self.links) < 2 and (self.exact or self.file.format in ("MP3", "MPEG", "OGG")):
            self.done = self.file.seek(frame)
            return
        while frame and (n := len(self.read(min(frame, 1 << 16)))):
            frame -= n


def _is_exact(f: soundfile.SoundFile) -> bool:
    return f.format == "FLAC" or f.subtype.startswith(EXACT)
