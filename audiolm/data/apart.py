"""Calls of functions in a child process, for files that crash their decoder or keep it busy for ever.

The child serves this process's calls one after the other. After its death the next call starts another.
"""

from __future__ import annotations

import functools
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRIES = 3  # of a call that kills the child
SERVE = "from audiolm.data.apart import serve; serve()"


class ChildDied(Exception):
    """The child died TRIES times of one call; `status` as in subprocess, minus a signal's number."""

    def __init__(self, status: int):
        super().__init__(signal.Signals(-status).name if status < 0 else f"exit status {status}")
        self.status = status


def call(fn: Callable, *args: Any) -> Any:
    """fn(*args), computed in the child. Raises what it raises, and ChildDied."""
    for _ in range(TRIES):
        child = _child(frozenset(os.environ.items()))
        try:
            pickle.dump((fn, args), child.stdin)
            child.stdin.flush()
            error, result = pickle.load(child.stdout)
            break
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            _child.cache_clear()
            status = child.wait()
        except BaseException:  # its answer would be taken for that of the next call
            _child.cache_clear()
            child.kill()
            raise
    else:
        raise ChildDied(status)
    if error is not None:
        raise error
    return result


@functools.lru_cache(maxsize=1)
def _child(environment: frozenset[tuple[str, str]]) -> subprocess.Popen:
    """The child, in the environment of the present moment, which may have other credentials than an earlier one."""
    known = dict(environment)
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [known.get("PYTHONPATH")])])
    # A session of its own, so that Ctrl-C reaches this process alone; the child ends with its input.
    return subprocess.Popen([sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env={**known, "PYTHONPATH": path}, start_new_session=True)


def serve() -> None:
    """The child: answers calls from stdin with (error, result) until its input ends."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library may print
    try:
        while True:
            fn, args = pickle.load(sys.stdin.buffer)
            try:
                answer = pickle.dumps((None, fn(*args)))
            except Exception as e:  # noqa: BLE001  raised by `call`
                answer = _dumped(e)
            answers.write(answer)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)


def _dumped(error: Exception) -> bytes:
    try:
        pickle.loads(answer := pickle.dumps((error, None)))  # some errors break when they are loaded
        return answer
    except Exception:  # noqa: BLE001
        return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), None))


def allow_cpu(seconds: float) -> None:
    """Gives this process so much more CPU time from now on; it dies by SIGXCPU when that is spent.

    Time on the wall would count a slow disk, network or busy machine too.
    """
    import resource
    import time

    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, hard))
