"""The progress of running steps on the driver's terminal: done/total, rate, time left.

On a terminal one line a running step, redrawn in place; elsewhere plain lines at the start, the end and about every
10 s.  While the store does not answer, one more line says why.  Thread-safe, and never an error (output.py).  Rates come
from a moving window and never count work that was there when a step began (resume).
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from audiolm.pipeline.output import Output

WINDOW_S = 30.0  # of the moving average of a rate
REDRAW_S = 0.2  # at most five times a second: terminals and people follow
PLAIN_S = 10.0  # between two plain lines of a step, in a log


@dataclass
class _Line:
    started: float
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    note: str = ""
    samples: deque = field(default_factory=deque)  # (time, done) within the window; the first is the window's start
    printed: float = 0.0

    def rate(self) -> float | None:
        """Units a second over the window; None until there were two different moments."""
        if len(self.samples) < 2:
            return None
        (t0, d0), (t1, d1) = self.samples[0], self.samples[-1]
        return (d1 - d0) / (t1 - t0) if t1 > t0 and d1 > d0 else None


class ProgressBoard:
    """The lines of all running steps. `clock` is for tests (seconds, monotonic)."""

    def __init__(self, stream=None, clock=time.monotonic):
        stream = sys.stdout if stream is None else stream
        self._out = stream if isinstance(stream, Output) else Output(stream)
        self._clock = clock
        self._lock = threading.Lock()
        self._lines: dict[str, _Line] = {}
        self._waits: dict[object, tuple[float, str]] = {}  # calls to the store that wait: since when, why
        self._tty = self._out.isatty()
        self._drawn_rows = 0  # lines on the terminal that may be redrawn
        self._drawn_at = float("-inf")

    def start(self, step: str) -> None:
        with self._lock:
            now = self._clock()
            self._lines[step] = _Line(now, printed=now)
            if self._tty:
                self._draw(now, force=True)
            else:
                self._print(f"{step}: started")

    def update(self, step: str, done: float, total: float | None, unit: str, note: str = "") -> None:
        """`done` counts from the step's very beginning, work of earlier attempts included."""
        with self._lock:
            line = self._lines.get(step)
            if line is None:
                return
            now = self._clock()
            # Another phase of the step has another rate; and no rate counts the time of starting up.
            if unit != line.unit or done < line.done or not done:
                line.samples.clear()
            line.done, line.total, line.unit, line.note = done, total, unit, note
            line.samples.append((now, done))
            while len(line.samples) > 2 and line.samples[1][0] <= now - WINDOW_S:
                line.samples.popleft()
            if self._tty:
                self._draw(now)
            elif now - line.printed >= PLAIN_S:
                line.printed = now
                self._print(_describe(step, line, now))

    def end(self, step: str, status: str, seconds: float, note: str = "") -> None:
        """Leaves one line for good, e.g. `kmeans  DONE  in 12 s`."""
        with self._lock:
            self._lines.pop(step, None)
            text = f"{step:<16} {status:<8} {'in ' + duration(seconds) if seconds >= 0.05 else ''}"
            self._say(f"{text.rstrip()}{'  ' + note if note else ''}")

    def waits(self, call: object, path: str, reason: str | None) -> None:
        """Shows why a call to the store waits, from its first failure until it ends (None). Of several the first is shown."""
        with self._lock:
            now, before = self._clock(), bool(self._waits)
            if reason is None:
                since, text = self._waits.pop(call, (now, ""))
                if text and not self._waits:
                    self._say(f"store: waited {duration(now - since)}, {text}")
            else:
                self._waits[call] = now, f"{reason} ({path})"
            if self._tty:
                self._draw(now, force=True)
            elif reason and not before:
                self._print(f"store: waiting, {reason} ({path})")

    def say(self, text: str) -> None:
        """Prints text above the running lines."""
        with self._lock:
            self._say(text)

    def _say(self, text: str) -> None:
        if self._tty:
            self._clear()
        self._print(text)
        if self._tty:
            self._draw(self._clock(), force=True)

    def _print(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()

    def _clear(self) -> None:
        if self._drawn_rows:
            self._out.write(f"\x1b[{self._drawn_rows}F\x1b[J")  # up to the first of our lines, then erase to the end
            self._drawn_rows = 0

    def _draw(self, now: float, force: bool = False) -> None:
        if not force and now - self._drawn_at < REDRAW_S:
            return
        self._drawn_at = now
        size = shutil.get_terminal_size((100, 24))
        rows = [_describe(step, line, now)[: size.columns - 1] for step, line in self._lines.items()]
        if self._waits:
            since, text = next(iter(self._waits.values()))
            rows.insert(0, f"{'store':<16}  waiting, {duration(now - since)}, {text}"[: size.columns - 1])
        rows = rows[: max(1, size.lines - 2)]  # a line that scrolled away cannot be redrawn
        self._clear()
        if rows:
            self._out.write("".join(row + "\n" for row in rows))
        self._out.flush()
        self._drawn_rows = len(rows)


def _describe(step: str, line: _Line, now: float) -> str:
    """One line: share, amounts, rate, time left and note, each as far as it is known."""
    if not line.unit:
        return f"{step:<16}  running, {duration(now - line.started)}"
    parts, done, rate = [f"{step:<16}"], amount(line.done, line.unit), line.rate()
    if line.total:
        parts.append(f"{min(1.0, line.done / line.total):4.0%}")
        done += f"/{amount(line.total, line.unit)}"
    parts.append(f"{done} {label(line.unit)}")
    if rate is not None:
        parts.append(rate_text(rate, line.unit))
        if line.total and line.done < line.total:
            parts.append(f"{duration((line.total - line.done) / rate)} left")
    return "  ".join([*parts, line.note] if line.note else parts)


def label(unit: str) -> str:
    return "min of audio" if unit == "audio s" else unit


def amount(value: float, unit: str) -> str:
    """A quantity as people write it: `audio s` in minutes, large counts as k and M."""
    if unit == "audio s":
        return f"{value / 60:.1f}" if value < 60_000 else f"{value / 60:,.0f}"
    return short(value)


def short(value: float) -> str:
    for size, mark in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if mark == 'k' else size):.3g}{mark}"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def rate_text(rate: float, unit: str) -> str:
    """Units a second as text; audio as hours of audio per hour, which is also `x real time`."""
    return f"{rate:.3g} audio h/h" if unit == "audio s" else f"{short(rate)} {unit}/s"


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
