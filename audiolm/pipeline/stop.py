"""Ctrl-C and SIGTERM: the first one raises KeyboardInterrupt in the main thread, the second ends the process at once.

SIGHUP, the end of the terminal, ends nothing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOPPED = "stopped; the same command continues"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []  # signals since the command began


@contextmanager
def stoppable(with_terminal: bool = False) -> Iterator[None]:
    """Within the block both signals stop the command, and SIGHUP does nothing or, `with_terminal`, what it does by default.

    In another thread than the main one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGHUP)}
    _received.clear()
    take_signals()
    if not with_terminal:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def take_signals() -> None:
    """Takes both signals, again after a library that took one; an ignored one, as of a shell's `&`, stays ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)


def exit_status() -> int:
    """130 after Ctrl-C, 143 after SIGTERM, as shells have it."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if len(_received) > 1:  # a killed run continues as a stopped one does
        with suppress(OSError):
            os.write(2, f"\n{STOPPED}\n".encode())
        os._exit(exit_status())
    raise KeyboardInterrupt
