"""The services of infra/compose.yaml as processes of this machine, by the commands and variables of that file.

Only names of places change: `mlflow:5000` becomes a free port here, `/data` and `/etc/mlflow` folders of the test.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import yaml

from tests.worlds.basics import ROOT, free_port

INFRA = ROOT / "infra"
TEXT = (INFRA / "compose.yaml").read_text()
SECRETS = {name: secrets.token_hex(16) for name in re.findall(r"\$\{(\w+):\?", TEXT)}
SERVICES = yaml.safe_load(re.sub(r"\$\{(\w+):\?[^}]*\}", lambda m: SECRETS[m[1]], TEXT))["services"]
START_S = 900.0  # of a service, on a busy machine
PLACE = re.compile(rf"\b(?:({'|'.join(SERVICES)}):)?(8333|5432|5000|6379|8265|8080)\b")


def postgres_bin() -> str | None:
    """The folder of PostgreSQL's programs (Debian keeps them off the PATH), or None."""
    found = [shutil.which("initdb"), *sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))]
    return next((os.path.dirname(os.path.realpath(f)) for f in found if f), None)


class Services:
    """Running services of the file; `folder` holds their data and logs."""

    def __init__(self, folder: Path):
        self.folder, self.running = folder, []
        self.temp = tempfile.mkdtemp(prefix="r")  # short: the paths of Ray's sockets must stay below 108 characters
        self.database = tempfile.mkdtemp(prefix="pg")  # PostgreSQL is never root, and pytest's folders are root's

    @functools.cache  # noqa: B019
    def port(self, service: str, number: str) -> int:
        return free_port()

    def here(self, text: str, service: str) -> str:
        """A text of the file with this machine's ports and folders."""
        text = PLACE.sub(lambda m: ("127.0.0.1:" if m[1] else "") + str(self.port(m[1] or service, m[2])), text)
        for there, place in (("0.0.0.0", "127.0.0.1"), ("/data", f"{self.folder}/data"), ("/etc/mlflow", str(self.folder)),
                             ("/app/", f"{ROOT}/")):
            text = text.replace(there, place)
        return text

    def environment(self, service: str) -> dict[str, str]:
        mine = {k: self.here(str(v), service) for k, v in SERVICES[service].get("environment", {}).items()}
        scripts = sysconfig.get_path("scripts")
        return {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"], "PYTHONPATH": str(ROOT),
                "MLFLOW_DISABLE_TELEMETRY": "true", **mine}

    def start(self, service: str, *more: str, command: str = "") -> subprocess.Popen:
        """Starts a service's command, or another one in its place, with its variables."""
        words = shlex.split(command) or SERVICES[service].get("entrypoint", []) + shlex.split(SERVICES[service]["command"])
        log = (self.folder / f"{service}.log").open("ab")
        process = subprocess.Popen([*(self.here(w, service) for w in words), *more], env=self.environment(service),
                                   stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        self.running.append(process)
        return process

    def healthy(self, service: str) -> None:
        """Waits until the health check of the file succeeds."""
        _, *check = SERVICES[service]["healthcheck"]["test"]
        words, until = [self.here(w, service) for w in check], time.monotonic() + START_S
        while True:
            done = subprocess.run(words, env=self.environment(service), capture_output=True, timeout=120)
            if done.returncode == 0:
                return
            assert time.monotonic() < until, (service, (self.folder / f"{service}.log").read_text()[-4000:])
            time.sleep(0.5)

    def postgres(self) -> None:
        """Debian's PostgreSQL with the user, database and password that the image makes of its variables."""
        binary, env, port = postgres_bin(), self.environment("postgres"), self.port("postgres", "5432")
        user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
        if user:
            shutil.chown(self.database, "postgres", "postgres")
        password = Path(self.database, "password")
        password.write_text(env["POSTGRES_PASSWORD"])
        data = f"{self.database}/data"
        subprocess.run([f"{binary}/initdb", "-D", data, "-U", env["POSTGRES_USER"], "--auth=scram-sha-256", "--no-sync",
                        f"--pwfile={password}"], check=True, capture_output=True, cwd=self.database, **user)
        self.running.append(subprocess.Popen(
            [f"{binary}/postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", self.database],
            cwd=self.database, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **user))
        client = {**env, "PGHOST": "127.0.0.1", "PGPORT": str(port), "PGPASSWORD": env["POSTGRES_PASSWORD"]}
        until = time.monotonic() + START_S
        while subprocess.run(["createdb", "-U", env["POSTGRES_USER"], "--maintenance-db=postgres", env["POSTGRES_DB"]],
                             env=client, capture_output=True).returncode:
            assert time.monotonic() < until, "PostgreSQL did not come up"
            time.sleep(0.2)

    def s3(self) -> None:
        """SeaweedFS; what is added moves its inner servers to free ports."""
        ports = [f"-{name}.port{kind}={free_port()}" for name in ("master", "volume", "filer") for kind in ("", ".grpc")]
        self.start("s3", *ports, f"-s3.port.grpc={free_port()}")

    def ray(self, service: str) -> None:
        """A node of Ray, once it runs; what is added keeps it off the ports and folders of another Ray on this machine.

        Started again where it ended, as the file's `restart` does: Ray gives a node 30 s, which a busy machine exceeds.
        """
        temp, until = [f"--temp-dir={self.temp}"] if service == "ray-head" else [], time.monotonic() + START_S
        log, process = self.folder / f"{service}.log", None
        while not process or "Ray runtime started" not in log.read_text():
            if not process or process.poll() is not None:
                agents = [f"--dashboard-agent-{name}-port={free_port()}" for name in ("listen", "grpc")]
                process = self.start(service, *agents, *temp)
            assert time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(0.5)

    def url(self, service: str, number: str) -> str:
        return f"http://127.0.0.1:{self.port(service, number)}"

    def status(self, service: str, number: str, path: str, **headers: str) -> int:
        """The HTTP status of a GET."""
        request = urllib.request.Request(self.url(service, number) + path, headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as e:
            return e.code

    def stop(self) -> None:
        """Ends all of them, and what Ray's nodes started."""
        for process in reversed(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for process in psutil.process_iter(["cmdline"]):
            if any(self.temp in word for word in process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        for folder in (self.temp, self.database):
            shutil.rmtree(folder, ignore_errors=True)
