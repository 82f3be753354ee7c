"""What libsndfile does not decode: AAC, MP4, M4A, WebM, Matroska and Ogg FLAC, by FFmpeg in PyAV (the extra `media`).

The demuxer is named, so that no file can make FFmpeg open another file or the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction

import numpy as np

from audiolm.data.containers.raw import Raw, Unusable, Window

NAMES = {"mov": "MP4 or M4A", "matroska": "WebM or Matroska", "aac": "AAC", "ogg": "Ogg FLAC"}
EARLY_S = 1.0  # decoded and dropped before the target of a seek, as AAC's frames overlap


class MediaSound:
    """A Sound of FFmpeg: the file's first audio stream. Its header's length is an estimate, so only decoding tells."""

    frames, exact, comment = None, False, ""

    def __init__(self, raw: Raw, demuxer: str, stack: ExitStack):
        try:
            import av
        except ImportError as e:
            raise Unusable("unreadable", f'{NAMES[demuxer]} audio needs PyAV: pip install "audiolm[media]"') from e
        self.av, self.raw, self.demuxer, self.stack = av, raw, demuxer, stack
        self._start()
        first = next(self.frames_left, None)
        if first is None:
            raise Unusable("empty", "no frames")
        self.first_at, self.rest_TC = first
        self.channels = self.rest_TC.shape[1]

    def _start(self) -> None:
        """From the beginning."""
        try:
            window = Window(self.raw, ((0, self.raw.size),))
            self.container = self.stack.enter_context(self.av.open(window, format=self.demuxer, metadata_errors="ignore"))
        except self._errors() as e:
            raise Unusable("unreadable", f"FFmpeg: {e}") from None
        if not self.container.streams.audio:
            raise Unusable("unreadable", "it holds no audio")
        self.stream = self.container.streams.audio[0]
        self.rate = self.stream.rate or 0
        self.frames_left, self.rest_TC = self._decode(), np.zeros((0, 1), np.float32)

    def _errors(self) -> tuple[type[Exception], ...]:
        return self.av.error.FFmpegError, ValueError, IndexError  # the last two of streams that change midway

    def _decode(self) -> Iterator[tuple[Fraction | None, np.ndarray]]:
        """(time in seconds, wav_TC) frame by frame. A damaged packet is an error unless it is the last, cut by the end."""
        planes, damage = self.av.AudioResampler(format="fltp"), None
        for packet in self._packets():
            try:
                coded = packet.decode()
                frames = [(c.pts, c.time_base, f.to_ndarray().T) for c in coded for f in planes.resample(c)]
                # The decoder knows better than the header, which may give half the rate of HE-AAC.
                self.rate = coded[0].sample_rate if coded else self.rate
            except self._errors() as e:
                damage, frames = damage or e, []
            if damage and frames:
                raise Unusable("unreadable", f"FFmpeg: {damage}")
            yield from ((None if pts is None else pts * base, wav_TC) for pts, base, wav_TC in frames)

    def _packets(self) -> Iterator:
        try:
            yield from self.container.demux(self.stream)
        except self._errors() as e:
            raise Unusable("unreadable", f"FFmpeg: {e}") from None

    def read(self, frames: int) -> np.ndarray:
        parts, have = [self.rest_TC], len(self.rest_TC)
        while have < frames and (found := next(self.frames_left, None)):
            parts.append(found[1])
            have += len(found[1])
        wav_TC = np.concatenate([p for p in parts if len(p)] or parts[:1])
        self.rest_TC = wav_TC[frames:]
        return wav_TC[:frames]

    def seek(self, frame: int) -> None:
        """To a frame, by the times in an MP4. Other containers have none, or coarse ones, and are decoded up to it."""
        self._start()
        early = frame - int(EARLY_S * self.rate)
        exact_times = self.demuxer == "mov" and self.first_at is not None and self.stream.time_base == Fraction(1, self.rate)
        if exact_times and early > 0:
            self.container.seek(int((self.first_at + Fraction(early, self.rate)) / self.stream.time_base), stream=self.stream)
            at, self.rest_TC = next(self.frames_left, (None, self.rest_TC))
            here = None if at is None else round((at - self.first_at) * self.rate)
            if here is not None and here <= frame:
                self._skip(frame - here)
                return
            self._start()
        self._skip(frame)

    def _skip(self, frames: int) -> None:
        while frames and (n := len(self.read(min(frames, 1 << 16)))):
            frames -= n
