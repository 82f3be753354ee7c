"""Standard output and error of a command, which never fail its work.

A pipe that is closed (`| head -1`), a terminal that is gone, a full disk behind the log and characters that the terminal lacks
lose text, and nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from audiolm.store import hide_credentials

GONE = (OSError, ValueError)  # what a pipe, disk or terminal raises; a closed stream


class Output:
    """A text stream that raises nothing, and whose texts lose their credentials. `stream`: None where there is none."""

    def __init__(self, stream: Any):
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115  open as long as the process

    def write(self, text: str) -> int:
        text = hide_credentials(text)
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except GONE:  # tried again with the next text: a disk may have room by then
            pass
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except GONE:
            pass

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except GONE:
            return False

    def finish(self) -> None:
        """Flushes; what cannot be written is dropped, so that the interpreter's own flush at the end is no error."""
        try:
            self._stream.flush()
        except GONE:
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
            except GONE:  # a closed stream, which is not flushed again
                pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def outputs() -> Iterator[None]:
    """Within the block standard output and error are an Output each."""
    fill_descriptors()
    out, err = Output(sys.stdout), Output(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            out.finish()
            err.finish()


def fill_descriptors() -> None:
    """Opens those of descriptors 0 to 2 that are closed (`>&-`): else the next file has the number, and gets others' texts."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
