"""The tiny pipeline under random faults, for minutes: in the end the tokens, losses and exports of an undisturbed run.

    python tests/bench/soak/run.py --minutes 30
    python tests/bench/soak/run.py --minutes 5 --seed 1 --out /tmp/soak

Rounds run tests/e2e.yaml up to its trained stages: on a Ray cluster that is joined, on a Ray of its own, without Ray, and with
two training workers; on a small disk (a tmpfs, as root) and on SeaweedFS behind a proxy that plants faults.  A command that
ends is started again.  Each round's files, facts and metrics are compared with those of a run without faults, bit for bit.
OUT/faults.jsonl logs every fault, OUT/*.log what the commands said; the table comes last.  Exit status 1 where something was
lost or doubled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from tests.bench.ray_node import Node, environment  # noqa: E402
from tests.bench.soak.command import Command  # noqa: E402
from tests.bench.soak.faults import FAULTS, Field  # noqa: E402
from tests.bench.soak.outcome import differences, made_again, outcome  # noqa: E402
from tests.worlds.servers import FaultyS3, seaweedfs  # noqa: E402

FIRST = "manifest,masked_model,kmeans,semantic_tokens,lm_semantic"
TRAINED = f"{FIRST},codec,acoustic_tokens,lm_coarse,lm_fine"  # what comes after is made from these in one go
MODES = {"joined": ["--only", TRAINED], "private": ["--only", TRAINED], "inline": ["--only", TRAINED, "--inline"],
         "two": ["--only", FIRST, "cluster.train_workers=2"]}  # each training of two takes a minute
JOIN = {"joined", "two"}  # modes on the one Ray cluster of all rounds
ROUNDS = [("disk", "joined"), ("s3", "inline"), ("s3", "joined"), ("disk", "inline"), ("disk", "private"), ("s3", "two"),
          ("s3", "private"), ("disk", "two")]
DISK_MB = 256
MOST = 10  # faults of a round
PATIENCE_S = 900.0  # of a round that has no more faults


@dataclass
class Soak:
    """A soak's settings and its log."""

    out: Path
    draw: random.Random
    until: float
    began: float = field(default_factory=time.monotonic)
    records: list[dict] = field(default_factory=list)

    def log(self, **record) -> None:
        record = {"at_s": round(time.monotonic() - self.began, 1), **record}
        self.records.append(record)
        with (self.out / "faults.jsonl").open("a") as f:
            f.write(json.dumps(record) + "\n")
        print(record["at_s"], *(f"{k}: {v}" for k, v in record.items() if k != "at_s" and v not in ("", None, [])), flush=True)


def calm(mode: str, folder: Path) -> dict:
    """The outcome of an undisturbed run; Ray and inline have the same."""
    uri = str(folder / f"calm-{mode}")
    command = [sys.executable, "workflows/full_pipeline.py", "tests/e2e.yaml", *MODES[mode], f"store={uri}", "tracking=none"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return outcome(uri, "e2e")


def one_round(soak: Soak, n: int, mode: str, reference: dict, place: str, cluster: Node | None, disk: Path | None,
              s3: FaultyS3 | None) -> None:
    """A run under faults to its end, and the comparison."""
    name = {"round": n, "store": "s3" if s3 else "disk", "mode": mode}
    env = environment(**({"AWS_ENDPOINT_URL": s3.url} if s3 else {}), **({"RAY_ADDRESS": cluster.address} if cluster else {}))
    command = Command(["tests/e2e.yaml", *MODES[mode], f"store={place}", f"tracking={'none' if s3 else 'sqlite'}"], place, env,
                      soak.out / f"{n:02d}-{name['store']}-{mode}.log")
    target, struck, done = Field(command, cluster, disk, s3), 0, False
    try:
        while not done and struck < MOST and time.monotonic() < soak.until:
            done = _wait(command, soak.draw.uniform(1, 30))
            if not done:
                struck += 1
                soak.log(**name, **strike(target, soak.draw))
        done = done or _wait(command, PATIENCE_S)
        lost, doubled = differences(outcome(place, "e2e"), reference) if done else (["all"], [])
        soak.log(**name, end="done" if done else "NOT DONE", faults=struck, lost=len(lost), doubled=len(doubled),
                 which=[str(k) for k in (*lost, *doubled)][:20], compared=len(reference), ends=command.ends,
                 again=made_again(place) if done else None)
    finally:
        command.stop()


def strike(target: Field, draw: random.Random) -> dict:
    """One fault and the time until the run got on after its end. What is drawn and has nothing to strike is drawn again."""
    names, what, ends = list(FAULTS), None, len(target.command.ends)
    while what is None:
        name = draw.choices(names, [FAULTS[n][1] for n in names])[0]
        what = FAULTS[name][0](target, draw)
    over, done = time.monotonic(), target.command.poll()
    before = target.command.work()
    while not done and time.monotonic() - over < PATIENCE_S and not target.command.work() - before:
        time.sleep(0.5)
        done = target.command.poll()
    ended = target.command.ends[ends:]
    said = target.command.said() if {1, 2} & {*ended} else ""
    return {"fault": name, "struck": what, "ended": ended, "said": said,
            "continue_s": round(time.monotonic() - over, 1)}


def _wait(command: Command, seconds: float) -> bool:
    """True as soon as the run is done."""
    until = time.monotonic() + seconds
    while not (done := command.poll()) and time.monotonic() < until:
        time.sleep(0.25)
    return done


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of DISK_MB that can be filled without harm to others; None, with the reason printed, where none can be mounted."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)],
                           capture_output=True, text=True)
    if mount.returncode:
        print(f"no disk is filled: {mount.stderr.strip()}", flush=True)
    try:
        yield None if mount.returncode else folder
    finally:
        if not mount.returncode:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def table(records: list[dict]) -> str:
    """Fault, how often, rounds with it, what those lost and doubled, time to continue: median and longest."""
    rounds = {r["round"]: r for r in records if "end" in r}
    lines = ["| fault | injected | rounds | lost | doubled | time to continue, median (longest) |", "|---|---|---|---|---|---|"]
    for name in FAULTS:
        if struck := [r for r in records if r.get("fault") == name]:
            of = [rounds[n] for n in {r["round"] for r in struck} if n in rounds]
            times = [r["continue_s"] for r in struck]
            lines.append(f"| {name} | {len(struck)} | {len(of)} | {sum(r['lost'] for r in of)} "
                         f"| {sum(r['doubled'] for r in of)} | {statistics.median(times):.0f} s ({max(times):.0f} s) |")
    lines.append(f"| all | {sum('fault' in r for r in records)} | {len(rounds)} | {sum(r['lost'] for r in rounds.values())} "
                 f"| {sum(r['doubled'] for r in rounds.values())} | |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--minutes", type=float, default=30.0, help="afterwards the last round ends without faults")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("soak"), help="the folder of the logs")
    p.add_argument("--modes", default=",".join(MODES), help="some of joined, private, inline, two")
    args = p.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends, too
    args.out.mkdir(parents=True, exist_ok=True)
    modes = args.modes.split(",")
    rounds = [r for r in ROUNDS if r[1] in modes]
    with tempfile.TemporaryDirectory(prefix="soak") as folder, seaweedfs(Path(folder)) as url, contextlib.ExitStack() as stack:
        proxy, cluster = FaultyS3(url), None
        if JOIN & {*modes}:
            cluster = Node(Path(folder), "soak", environment(AWS_ENDPOINT_URL=proxy.url), 2)
            stack.callback(cluster.kill)
        soak, references, n = Soak(args.out, random.Random(args.seed), time.monotonic() + 60 * args.minutes), {}, 0
        while time.monotonic() < soak.until:
            where, mode = rounds[n % len(rounds)]
            like = "two" if mode == "two" else "inline"
            if like not in references:  # its time is not the soak's
                began = time.monotonic()
                references[like] = calm(like, Path(folder))
                soak.until += time.monotonic() - began
            reference = references[like]
            n += 1
            joins = cluster if mode in JOIN else None
            if where == "s3":
                one_round(soak, n, mode, reference, f"s3://tests/round-{n}", joins, None, proxy)
            else:
                with small_disk(Path(folder) / f"disk-{n}") as disk:
                    one_round(soak, n, mode, reference, str((disk or Path(folder)) / f"round-{n}"), joins, disk, None)
    print(table(soak.records))
    ends = [r for r in soak.records if "end" in r]
    return int(any(r["lost"] or r["doubled"] for r in ends))


if __name__ == "__main__":
    sys.exit(main())
