"""Patience with a store: the one place where a call is tried again, and where it is told that a call waits.

While a store does not answer (time-out, broken connection, HTTP 408, 409, 429, 5xx) a call is tried again, with growing
pauses, for `patience` seconds.  Then NoAnswer names the path and the cause.  An answer is never asked for again.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from audiolm.store.credentials import hide_credentials

PATIENCE_S = 300.0  # a restart of a server or a network's fault takes minutes, and a training is worth the wait

_patience_s: ContextVar[float] = ContextVar("patience_s")  # of this thread, PATIENCE_S by default

Teller = Callable[[object, str, str | None], None]  # (the call, its path, why it waits; None once it ended)


class NoAnswer(OSError):
    """A store that did not answer for as long as a call was patient; names the path, and the last error as its cause."""


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Bounds how long this thread's calls wait for a store that does not answer."""
    token = _patience_s.set(seconds)
    try:
        yield
    finally:
        _patience_s.reset(token)


def patience_s() -> float:
    """Seconds that a call of this thread may wait."""
    return _patience_s.get(PATIENCE_S)


def _log_wait(call: object, path: str, reason: str | None) -> None:
    if reason:
        logging.getLogger(__name__).warning("the store does not answer, trying for %.0f s: %s: %s", patience_s(), path, reason)


_tell: list[Teller] = [_log_wait]  # the last one is told


@contextmanager
def waits_told_to(tell: Teller) -> Iterator[None]:
    """Has `tell` called, in place of a line in the log, when a call of any thread begins to wait and when that wait ends."""
    _tell.append(tell)
    try:
        yield
    finally:
        _tell.remove(tell)


def persist(path: str, call: Callable[[], Any]) -> Any:
    """`call()`, tried again while the store does not answer; it must be safe to repeat. Raises NoAnswer."""
    began, pause_s, tell, this = time.monotonic(), 0.5, None, object()
    try:
        while True:
            try:
                return call()
            except Exception as e:
                if isinstance(e, NoAnswer) or not _no_answer(e):
                    _name(e, path)
                    raise
                left_s = patience_s() - (time.monotonic() - began)
                if left_s < pause_s:
                    shown = hide_credentials(f"{path}: {type(e).__name__}: {e}")
                    raise NoAnswer(f"the store did not answer for {time.monotonic() - began:.0f} s: {shown}") from e
                if tell is None:
                    tell = _tell[-1]
                    tell(this, hide_credentials(path), hide_credentials(_reason(e)))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 10.0)
    finally:
        if tell:
            tell(this, hide_credentials(path), None)


def _reason(error: BaseException | None) -> str:
    """Why a store does not answer, in a few words, such as `503 SlowDown`."""
    text = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
    while error is not None:
        if (status := http_status(error)) is not None:
            code = error.response.get("Error", {}).get("Code", "") if isinstance(error.response, dict) else ""
            return f"{status}" if code == str(status) else f"{status} {code}".strip()
        error = error.__cause__ or error.__context__
    return text


def _name(error: Exception, path: str) -> None:
    """Adds the path to an error of a disk or a store that has none."""
    if isinstance(error, NoAnswer) or not isinstance(error, OSError) or error.filename is not None:
        return
    if error.errno is not None:
        error.filename = path
    elif len(error.args) == 1 and str(error) not in path:
        error.args = (f"{path}: {error}",)


def _no_answer(error: BaseException | None) -> bool:
    """True for an error after which the same call may succeed: the store was out of reach or busy."""
    if isinstance(error, (FileNotFoundError, FileExistsError, PermissionError)):
        return False  # an answer, and a common one: without imports that take longer than the call
    from aiohttp import ClientError
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    while error is not None:
        if (status := http_status(error)) is not None:
            return status in (408, 409, 429) or status >= 500
        if isinstance(error, (TimeoutError, ConnectionError, NoConnection, HTTPClientError, IncompleteReadError, ClientError)):
            return True
        if any(kind.__name__ == "TransportError" for kind in type(error).__mro__):  # httpx's, which the Hub's client raises
            return True
        if getattr(error, "errno", None) == errno.ESTALE:  # NFS: the server was started anew
            return True
        error = error.__cause__ or error.__context__
    return False


def http_status(error: BaseException) -> int | None:
    """The HTTP status in an error of botocore or of the Hub's client."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(response, "status_code", None)
