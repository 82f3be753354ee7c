"""The pipeline's command as a user repeats it: started again whenever it ends before the run is done."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

from audiolm import store
from tests.worlds.basics import ROOT

NEWS = re.compile(r"^\w+(?:: started| +DONE| +\d+%  \S+ )", re.M)  # a step began, ended, or came so far
NO_WORK = ("attempts/", ".probe/", "runs/", "mlflow.db")  # heartbeats and what follows from the steps' outputs


class Command:
    """Drivers of one run on the store `uri`; `poll` restarts what ended. Their output is appended to `log`."""

    def __init__(self, args: list[str], uri: str, env: dict[str, str], log: Path):
        self.args, self.uri, self.env, self.log = args, uri, env, log
        self.drivers: list[psutil.Popen] = []
        self.ends: list[int] = []  # exit statuses in order
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.drivers.append(psutil.Popen([sys.executable, "workflows/full_pipeline.py", *self.args], cwd=ROOT, env=self.env,
                                             stdout=out, stderr=subprocess.STDOUT, start_new_session=True))

    def poll(self) -> bool:
        """True once the run is done and no driver is left."""
        for driver in [d for d in self.drivers if d.poll() is not None]:
            self.drivers.remove(driver)
            self.ends.append(int(driver.returncode))
        if self.drivers:
            return False
        if self.ends[-1] == 0:
            return True
        time.sleep(2)  # what is left of the old driver's Ray ends within this
        self.start()
        return False

    def processes(self) -> list[psutil.Process]:
        """The drivers' descendants, such as Ray's processes."""
        found = []
        for driver in self.drivers:
            try:
                found += driver.children(recursive=True)
            except psutil.NoSuchProcess:
                continue
        return found

    def work(self) -> set:
        """What is done so far, as far as it can be seen: it only grows while the run gets on."""
        made = {(name, size) for name, size in store.files(self.uri).items() if not any(part in name for part in NO_WORK)}
        said = NEWS.finditer(self.log.read_text(errors="replace"))
        return made | {(m[0], 0 if "%" in m[0] else m.start()) for m in said}  # the same share may be said twice

    def said(self) -> str:
        """The last error on the terminal."""
        errors = re.findall(r"^error: .*", self.log.read_text(errors="replace"), re.M)
        return errors[-1][:300] if errors else ""

    def stop(self) -> None:
        for process in [*self.processes(), *self.drivers]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
