"""Steps whose workers die, drivers that wait for others or are stopped, and owners whose clock is set."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from audiolm.dag import execute as execute_dag
from audiolm.dag import lease
from audiolm.dag.execute import StepFailed, execute, run_step
from audiolm.dag.plan import plan
from audiolm.dag.step import Step
from tests.worlds.basics import ROOT


def test_an_owner_lives_on_when_the_clock_is_set(monkeypatch):
    """psutil derives a process's start from the boot time, and that from the clock: here it is set an hour on."""
    sleeper = subprocess.Popen([sys.executable, "-c", """
import json, time
from audiolm.dag.lease import owner
print(json.dumps(owner()), flush=True)
time.sleep(600)
"""], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        found = json.loads(sleeper.stdout.readline())
        began = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: began(process) + 3600)
        assert not lease.is_dead(found)
        assert lease.is_dead({**found, "started": found["started"] + 3600})  # the pid is another process's now
    finally:
        sleeper.kill()
    sleeper.wait(60)
    assert lease.is_dead(found)


class Said:
    """An observer that keeps what is said."""

    def __init__(self):
        self.lines, self.ends = [], []

    def say(self, text):
        self.lines.append(text)

    def began(self, out):
        pass

    def progress(self, out, done, total, unit, note):
        pass

    def ended(self, out, status, facts, error):
        self.ends.append((status, error))


def test_a_waiting_driver_says_for_whom_and_until_when(store, monkeypatch):
    monkeypatch.setattr(execute_dag, "WAIT_SAID_S", 0.2)
    begun, end, said = threading.Event(), threading.Event(), Said()

    def slow(config, inputs, out):
        begun.set()
        assert end.wait(60)
        return {}

    step = Step("shared", slow)
    threads = [threading.Thread(target=run_step, args=(step, store, {}), kwargs=more)
               for more in ({}, {"observer": said, "poll_s": 0.05})]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    deadline = time.monotonic() + 60
    while len(said.lines) < 2 and time.monotonic() < deadline:  # repeated
        time.sleep(0.01)
    end.set()
    for t in threads:
        t.join(60)
    assert re.fullmatch(rf"shared: waits since \d\d:\d\d for attempt 1, process {os.getpid()} on {socket.gethostname()}; "
                        r"goes on when that ends, or 60 s after its last heartbeat", said.lines[1])


class NodeGone(RuntimeError):
    pass


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(execute_dag, "BACKOFF_S", 0.0)


def test_a_step_that_gets_on_between_deaths_is_launched_as_often_as_it_needs(store, at_once):
    kept, said = iter([0, 1, 2, 3, 3, 3]), Said()  # after each death, as newer checkpoints

    def mortal(config, inputs, out):
        raise NodeGone("node died\nand more")

    with pytest.raises(StepFailed, match="NodeGone"):
        execute(plan([Step("mortal", mortal)], store), store, retries=2, may_retry=lambda e: isinstance(e, NodeGone),
                kept=lambda build: next(kept), observer=said)
    assert len(said.ends) == 6 and next(kept, None) is None
    assert [line.split("time ")[1][0] for line in said.lines] == ["1", "1", "1", "1", "2"]
    assert said.lines[0] == "mortal: launched again in 0 s, time 1 of 2 without progress, after NodeGone: node died"


def test_steps_that_end_because_the_user_stopped_the_run_did_not_fail(store):
    begun, gone, said = threading.Event(), threading.Event(), Said()

    def waits(config, inputs, out):
        begun.set()
        assert gone.wait(60)
        raise NodeGone("Ray was shut down")

    def interrupt():
        assert begun.wait(60)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            execute(plan([Step("waits", waits)], store), store, observer=said, retries=2, may_retry=lambda e: True)
    finally:
        gone.set()
        signal.signal(signal.SIGUSR1, before)
    for thread in (t for t in threading.enumerate() if t.name == "waits"):
        thread.join(60)
    assert said.ends == [("stopped", "interrupted")]


def test_a_step_is_launched_again_only_after_a_worker_died(store, at_once):
    tries = []

    def flaky(config, inputs, out):
        tries.append(out.attempt)
        if len(tries) < 3:
            raise NodeGone("node died")
        return {}

    execute(plan([Step("flaky", flaky)], store), store, retries=2, may_retry=lambda e: isinstance(e, NodeGone))
    assert tries == [1, 2, 3]
    with pytest.raises(StepFailed, match="ZeroDivisionError"):
        execute(plan([Step("bug", lambda c, i, o: 1 / 0)], store), store, retries=2,
                may_retry=lambda e: isinstance(e, NodeGone))
