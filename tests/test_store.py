"""The store under faults: lost answers, a server that is away or hangs, disks without hard links, full disks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from audiolm import store as stores
from audiolm.dag import lease
from audiolm.dag.execute import StepFailed, execute
from audiolm.dag.lease import Lease, Waiter
from audiolm.dag.plan import plan
from audiolm.dag.step import Step
from audiolm.store import get, get_json, join, names, patience, put, put_json
from tests.worlds.basics import ROOT
from tests.worlds.servers import faulty_s3

ONES, TWOS = b"1" * 1000, b"2" * 1000


@pytest.fixture
def s3(s3_server):
    with faulty_s3(s3_server) as proxy:
        yield proxy, f"s3://tests/{time.time_ns()}"


def once_a_path(fault):
    """A fault at the first exclusive PUT of every path."""
    seen = set()

    def plant(method, path, headers):
        if "If-None-Match" not in headers or path in seen:
            return None
        seen.add(path)
        return fault

    return plant


# ---- an exclusive write whose answer is lost

def test_a_claim_whose_answer_was_lost_is_ones_own(s3):
    proxy, folder = s3
    proxy.fault = once_a_path("lose")
    claimed = Lease(f"{folder}/build")
    assert proxy.planted and claimed.attempt == 1
    with pytest.raises(FileExistsError):
        Lease(f"{folder}/build", after=0)
    claimed.close("done")


def test_a_run_all_of_whose_exclusive_writes_lose_their_answer_is_done(s3):
    proxy, folder = s3
    proxy.fault = once_a_path("lose")
    a = Step("a", lambda config, inputs, out: {})
    b = Step("b", lambda config, inputs, out: {}, {}, (a,))
    built = execute(plan([a, b], folder), folder, inline=True)
    assert [built[n].record["attempt"] for n in "ab"] == [1, 1]
    assert len(proxy.planted) == 6  # build.json, the attempt and done.json of both


def test_of_other_bytes_the_first_wins(store):
    put(join(store, "x"), ONES, exclusive=True)
    put(join(store, "x"), ONES, exclusive=True)
    with pytest.raises(FileExistsError, match="x"):
        put(join(store, "x"), TWOS, exclusive=True)
    assert get(join(store, "x")) == ONES and names(store) == ["x"]


# ---- a store that is away

def test_a_lease_outlasts_an_outage_longer_than_itself_and_a_waiter_lets_it(s3, monkeypatch):
    """The owner neither stops nor is taken over while nobody reaches the store."""
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.3)
    monkeypatch.setattr(lease, "LEASE_S", 6.0)
    monkeypatch.setattr(lease, "is_dead", lambda attempt: False)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # else the client's own retries cover an outage this short
    proxy, folder = s3
    away, waited = threading.Event(), []
    proxy.fault = lambda *request: "reset" if away.is_set() else None

    def work(config, inputs, out):
        away.set()
        threading.Timer(8.0, away.clear).start()
        back = 0
        while back < 10:
            back += not away.is_set()
            waited.append(waiter.free())  # as another driver would
            out.check()
            time.sleep(0.1)
        return {}

    step = Step("long", work)
    waiter = Waiter(join(step.root(folder), "0001"))
    built = execute(plan([step], folder), folder, inline=True)
    assert built["long"].record["attempt"] == 1 and not any(waited)


def test_a_lease_that_was_taken_over_meanwhile_is_lost_when_the_store_is_back(s3, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.3)
    proxy, folder = s3
    first = Lease(f"{folder}/build")
    away = threading.Event()
    away.set()
    proxy.fault = lambda method, path, headers: "reset" if away.is_set() else None
    time.sleep(1.0)
    away.clear()
    second = Lease(f"{folder}/build")
    deadline = time.monotonic() + 60
    while not first.lost.is_set() and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(lease.LeaseLost, match="taken over"):
        first.check()
    second.check(now=True)
    second.close("done")


def test_the_first_error_is_the_one_that_is_told(s3, monkeypatch):
    monkeypatch.setattr(stores, "CLEANUP_S", 1.0)
    proxy, folder = s3

    def work(config, inputs, out):
        out.log(1, {"loss": 1.0})
        proxy.fault = lambda *request: "reset"
        raise ValueError("codec.lr is too high")

    with pytest.raises(StepFailed, match="ValueError: codec.lr is too high") as e:
        execute(plan([Step("bad", work)], folder), folder, inline=True)
    assert any("while cleaning up: NoAnswer" in note for note in e.value.__cause__.__notes__)


@pytest.mark.parametrize("fault", ["reset", "503", "hang"])
def test_a_call_waits_a_bounded_time_and_names_path_and_cause(s3, fault, monkeypatch):
    """`hang` at a body that no socket buffer holds: the client itself has no time-out for sending."""
    monkeypatch.setattr(stores, "CALL_S", 2.0 if fault == "hang" else 30.0)  # answers come at once, however busy the machine is
    monkeypatch.setattr(stores, "SLOWEST", 1e9)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # else the client's own retries take all the time
    proxy, folder = s3
    proxy.fault = lambda *request: fault
    ended, told = [], []

    def write():
        with patience(4.0), pytest.raises(stores.NoAnswer, match=f"{folder}/large") as e:
            put(f"{folder}/large", bytes(20_000_000 if fault == "hang" else 10))
        ended.append(e.value)

    thread = threading.Thread(target=write, daemon=True)
    with stores.waits_told_to(lambda call, path, reason: told.append((path, reason))):
        thread.start()
        thread.join(90)
    assert ended and ended[0].__cause__ is not None
    assert told[0][0] == f"{folder}/large" and told[0][1] and told[1:] == [(f"{folder}/large", None)]
    assert fault != "503" or told[0][1] == "503"
    proxy.fault = lambda *request: None
    put(f"{folder}/large", b"back")
    assert get(f"{folder}/large") == b"back"


def test_a_large_object_goes_in_parts_and_a_fault_repeats_one_of_them(s3, monkeypatch):
    monkeypatch.setattr(stores, "PART", 5 * 2**20)
    proxy, folder = s3
    data, sent = os.urandom(12 * 2**20), []

    def plant(method, path, headers):
        if method == "PUT":
            sent.append(path.partition("partNumber=")[2].partition("&")[0])
            return "503" if sent[-1] == "2" and sent.count("2") == 1 else None

    proxy.fault = plant
    put(f"{folder}/large", data, exclusive=True)
    assert sorted(sent) == ["1", "2", "2", "3"] and get(f"{folder}/large") == data
    with pytest.raises(FileExistsError):
        put(f"{folder}/large", data[::-1], exclusive=True)


def test_an_answer_is_not_asked_for_again(s3):
    proxy, folder = s3
    began = []
    proxy.fault = lambda method, path, headers: began.append(path)
    assert get_json(f"{folder}/none") is None and not stores.exists(f"{folder}/none")
    proxy.fault = lambda method, path, headers: began.append(path) or "403"
    before = time.monotonic()
    with pytest.raises(PermissionError, match=f"{folder}/denied"):
        put(f"{folder}/denied", ONES)
    assert len(began) < 8 and time.monotonic() - before < 60


# ---- disks

@pytest.fixture
def no_links(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


def test_without_hard_links_one_of_many_writers_wins_and_nobody_sees_a_part(tmp_path, no_links):
    for n in range(20):
        path, won, parts = f"{tmp_path}/{n}.json", [], []

        def claim(i, path=path, won=won):
            try:
                put_json(path, [i] * 1000, exclusive=True)
                won.append(i)
            except FileExistsError:
                pass

        threads = [threading.Thread(target=claim, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        while any(t.is_alive() for t in threads):
            parts.append(get_json(path))
        assert len(won) == 1 and get_json(path) == won * 1000
        assert all(part in (None, won * 1000) for part in parts)
    assert len(names(str(tmp_path))) == 20 == len(os.listdir(tmp_path))


def test_a_claim_whose_writer_died_reads_as_absent_and_is_taken_when_it_is_old(tmp_path, no_links):
    path = tmp_path / "done.json"
    path.touch()
    assert get_json(str(path)) is None
    with pytest.raises(FileExistsError):
        put_json(str(path), 1, exclusive=True)
    os.utime(path, (time.time() - 120,) * 2)
    put_json(str(path), 1, exclusive=True)
    assert get_json(str(path)) == 1


FULL = """
import os, resource, signal, sys
from audiolm.metrics_log import MetricsFile
from audiolm.store import put
def refuse(*a, **k): raise PermissionError(1, "Operation not permitted")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
"""


@pytest.mark.parametrize(("code", "left"), [
    ("put(sys.argv[1], b'x' * 100_000, exclusive=True)", []),
    ("os.link = refuse; put(sys.argv[1], b'x' * 100_000, exclusive=True)", []),
    ("m = MetricsFile(sys.argv[1])\nfor step in range(1000): m.add(step, {'loss': 1.0})", ["it"])])
def test_a_full_disk_leaves_no_part_and_the_error_names_the_path(tmp_path, code, left):
    """A limit of the file's size stands for the disk's; a log alone keeps what it had."""
    ended = subprocess.run([sys.executable, "-c", FULL + code, str(tmp_path / "it")], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1 and f"{tmp_path}/it" in ended.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == left


def test_a_torn_file_is_named_with_the_fix(tmp_path):
    (tmp_path / "done.json").write_text('{"facts": {')
    with pytest.raises(ValueError, match=rf"{tmp_path}/done.json is no whole JSON.*remove that file"):
        get_json(str(tmp_path / "done.json"))


def test_a_writer_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path):
    path = str(tmp_path / "x.json")
    code = f"from audiolm.store import put_json\nn = 0\nwhile True:\n    n += 1\n    put_json({path!r}, [n] * 20_000)"
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        while not os.path.exists(path):
            time.sleep(0.05)
        time.sleep(0.3)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        found = get_json(path)
        assert found and len(found) == 20_000 and len(set(found)) == 1
        os.unlink(path)


def test_names_come_in_the_order_of_their_numbers(store):
    wanted = [f"shard-{n:05d}.parquet" for n in (9, 99_999, 100_000, 100_001)]
    for name in reversed(wanted):
        put(join(store, name), ONES)
    assert names(store) == wanted
