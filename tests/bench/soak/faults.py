"""The faults of the soak: each strikes a running command, ends after a while, and says what it struck.

A fault is a function (field, draw) -> text; None where there is nothing to strike now.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from audiolm.dag.lease import LEASE_S
from tests.bench.ray_node import Node, is_rank, is_task, title
from tests.bench.soak.command import Command
from tests.worlds.servers import FaultyS3


@dataclass(frozen=True)
class Field:
    """What faults strike: the command, the Ray cluster that it joins, and the disk or the S3 server of its store."""

    command: Command
    cluster: Node | None
    disk: Path | None  # a small one of its own
    s3: FaultyS3 | None


Fault = Callable[[Field, random.Random], str | None]


def wait(field: Field, seconds: float) -> None:
    """Lets time pass; a driver that ends is started again, as by a user who does not know why it ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not field.command.poll():
        time.sleep(0.25)


def signal_driver(number: int, field: Field, draw: random.Random) -> str | None:
    driver = field.command.drivers[0]
    _send(driver, number)
    try:
        driver.wait(60)
    except psutil.TimeoutExpired:
        return f"pid {driver.pid} lives on"
    return f"pid {driver.pid}"


def suspend_driver(field: Field, draw: random.Random) -> str | None:
    driver, seconds = field.command.drivers[0], draw.uniform(5, 20)
    _send(driver, signal.SIGSTOP)
    time.sleep(seconds)
    _send(driver, signal.SIGCONT)
    return f"pid {driver.pid} for {seconds:.0f} s"


def suspend_past_the_lease(field: Field, draw: random.Random) -> str | None:
    """The driver and its processes, but no joined cluster, sleep until a second driver has taken over; then both are at it."""
    first, sleeping = field.command.drivers[0], [*field.command.processes(), field.command.drivers[0]]
    if len(field.command.drivers) > 1:
        return None
    for process in sleeping:
        _send(process, signal.SIGSTOP)
    field.command.start()
    wait(field, LEASE_S + draw.uniform(30, 50))
    for process in sleeping:
        _send(process, signal.SIGCONT)
    return f"pid {first.pid} and {len(sleeping) - 1} more; a second driver"


def strike_ray(name: Callable[[str], bool], number: int, field: Field, draw: random.Random) -> str | None:
    """A signal to one of Ray's processes whose title `name` accepts; what it suspends goes on after some seconds."""
    joined = field.cluster.processes() if field.cluster and name is not is_raylet else []
    found = [(p, t) for p in [*field.command.processes(), *joined] if name(t := title(p))]
    if not found:
        return None
    process, what = draw.choice(found)
    _send(process, number)
    if number == signal.SIGSTOP:
        time.sleep(draw.uniform(5, 25))
        _send(process, signal.SIGCONT)
    return what


def is_raylet(title: str) -> bool:
    return title.split(" ")[0].endswith("/raylet")


def burst(kind: str, field: Field, draw: random.Random) -> str | None:
    """Seconds in which the S3 server does so to all requests, or to a third of them."""
    if field.s3 is None:
        return None
    share, seconds, struck = draw.choice((0.3, 1.0)), draw.uniform(3, 20), []
    dice = random.Random(draw.random())

    def fault(method: str, path: str, headers: dict) -> str | None:
        if dice.random() > share:
            return None
        struck.append(path)
        if kind == "slow":
            time.sleep(dice.uniform(1, 5))
            return None
        return kind

    field.s3.fault = fault
    wait(field, seconds)
    field.s3.fault = lambda *request: None
    return f"{len(struck)} requests in {seconds:.0f} s" if struck else None


def fill_disk(field: Field, draw: random.Random) -> str | None:
    if field.disk is None:
        return None
    ballast, seconds = field.disk / "ballast", draw.uniform(5, 25)
    with ballast.open("wb", buffering=0) as f:
        try:
            while True:
                f.write(bytes(4096))
        except OSError:
            pass
    wait(field, seconds)
    os.unlink(ballast)
    return f"for {seconds:.0f} s"


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


# Name -> (fault, its weight among those that are drawn)
FAULTS: dict[str, tuple[Fault, float]] = {
    "driver killed": (partial(signal_driver, signal.SIGKILL), 2),
    "driver stopped by SIGTERM": (partial(signal_driver, signal.SIGTERM), 1),
    "driver suspended": (suspend_driver, 1),
    "all suspended past the lease, a second driver": (suspend_past_the_lease, 0.4),
    "task killed": (partial(strike_ray, is_task, signal.SIGKILL), 3),
    "task suspended": (partial(strike_ray, is_task, signal.SIGSTOP), 1),
    "training worker of two killed": (partial(strike_ray, is_rank, signal.SIGKILL), 4),
    "training worker of two suspended": (partial(strike_ray, is_rank, signal.SIGSTOP), 1),
    "raylet killed": (partial(strike_ray, is_raylet, signal.SIGKILL), 1),
    "S3 answers 503": (partial(burst, "503"), 1),
    "S3 answers 500": (partial(burst, "500"), 1),
    "S3 answers get lost": (partial(burst, "lose"), 1),
    "S3 answers are cut": (partial(burst, "cut"), 1),
    "S3 connections are cut": (partial(burst, "reset"), 1),
    "S3 is slow": (partial(burst, "slow"), 1),
    "disk full": (fill_disk, 2),
}
