"""The Ray that a run starts for itself: closed to whoever has not the run's token, and to other machines."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from tests.worlds.basics import ROOT

OWNER = """
    import json, os, sys
    from audiolm.pipeline.cli import quiet
    from audiolm.pipeline.ray_cluster import start_ray
    from audiolm.config.run import ClusterConfig

    quiet()
    before, said = dict(os.environ), []
    start_ray(ClusterConfig(device="cpu"), "", said.append)
    import ray

    changed = [k for k in {*before, *os.environ} if "AUTH" in k and before.get(k) != os.environ.get(k)]
    node = ray._private.worker._global_node
    print(json.dumps({"gcs": node.gcs_address, "session": node.get_session_dir_path(), "said": said, "changed": changed,
                      "token": ray.get(ray.remote(lambda: os.environ.get("RAY_AUTH_TOKEN")).remote())}), flush=True)
    sys.stdin.read()
    ray.shutdown()
"""
VISITOR = """
    import os, sys
    from ray._private import ray_constants
    from audiolm.pipeline.ray_cluster import start_ray
    from audiolm.config.run import ClusterConfig

    ray_constants.ENABLE_RAY_CLUSTER = False  # else Ray takes 127.0.0.1 for another address of the machine
    start_ray(ClusterConfig(address=sys.argv[1]), "", print)
    import ray

    print("ran as a child of", ray.get(ray.remote(lambda: os.getppid()).remote()))
"""
STARTER = """
    import sys
    from audiolm.config.run import ClusterConfig
    from audiolm.pipeline.cli import run_command
    from audiolm.pipeline.ray_cluster import start_ray

    sys.exit(run_command(lambda: start_ray(ClusterConfig(device="cpu"), "", print)))
"""
TOKEN, OLD_TOKEN = "0123456789abcdef" * 4, "fedcba9876543210" * 4


def python(code: str, *args: str, home: Path, **env: str) -> subprocess.Popen:
    """A process with a home of its own, so that no token file of this machine's user has a part in it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH") and k != "RAY_ADDRESS"}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *args], stdin=subprocess.PIPE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
                            env={**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), **env})


def keep_token(home: Path, token: str) -> None:
    """The file that Ray reads a token from where the environment has none."""
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(token)


def visit(address: str, home: Path, **env: str) -> tuple[bool, str]:
    """Whether a task of another process ran in the cluster that it joined, and what that process said."""
    visitor = python(VISITOR, address, home=home, RAY_NUM_REDIS_GET_RETRIES="1", **env)
    try:
        out, err = visitor.communicate(timeout=60)
    finally:
        visitor.kill()
    return visitor.returncode == 0 or "ran as" in out, out + err


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A run's own cluster, whose user has switched authentication off and has tokens of his own."""
    home = tmp_path_factory.mktemp("home")
    keep_token(home, OLD_TOKEN)
    owner = python(OWNER, home=home, RAY_ADDRESS="local", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN=TOKEN)
    line = owner.stdout.readline()
    processes = psutil.Process(owner.pid).children(recursive=True) if line else []
    try:
        assert line, owner.communicate(timeout=60)[1]
        yield {**json.loads(line), "processes": [psutil.Process(owner.pid), *processes]}
        _, err = owner.communicate(timeout=60)  # its input ends, it stops Ray
        assert owner.returncode == 0, err
        assert (home / ".ray" / "auth_token").read_text() == OLD_TOKEN
    finally:
        owner.kill()
        for process in psutil.wait_procs(processes, timeout=20)[1]:
            process.kill()


@pytest.mark.parametrize("env", [{}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
                                 {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)},
                                 {"RAY_AUTH_MODE": "token"}],
                         ids=["no mode", "no token", "the user's token", "another run's token", "an old token file"])
def test_a_stranger_runs_nothing(cluster, tmp_path, env):
    if env == {"RAY_AUTH_MODE": "token"}:
        keep_token(tmp_path, OLD_TOKEN)
    ran, said = visit(cluster["gcs"], tmp_path, **env)
    assert not ran and "Authentication token is missing or incorrect" in said, said


def test_another_address_of_this_machine_reaches_nothing(cluster, tmp_path):
    own = [a.address for addresses in psutil.net_if_addrs().values() for a in addresses
           if a.family == socket.AF_INET and not a.address.startswith("127.")]
    if not own:
        pytest.skip("this machine has no other address")
    port = int(cluster["gcs"].rsplit(":", 1)[1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((own[0], port), timeout=60)
    short = {"RAY_gcs_rpc_server_connect_timeout_s": "1", "RAY_py_gcs_connect_timeout_s": "1"}  # Ray asks for 40 s
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster["token"]}  # the right one does not help
    ran, said = visit(f"{own[0]}:{port}", tmp_path, **token, **short)
    assert not ran and f"cannot join the cluster at '{own[0]}" in said, said


@pytest.mark.parametrize("where", ["environment", "file"])
def test_who_has_the_token_joins_and_runs_tasks(cluster, tmp_path, where):
    token = cluster["token"] or "none"
    if where == "file":
        keep_token(tmp_path, token)
    env = {"RAY_AUTH_TOKEN": token} if where == "environment" else {}
    ran, said = visit(cluster["gcs"], tmp_path, RAY_AUTH_MODE="token", **env)
    assert ran, said


def test_nothing_listens_to_other_machines(cluster):
    listening = {}
    for process in cluster["processes"]:
        if process.is_running():
            listening.update({f"{c.laddr.ip}:{c.laddr.port}": process.name() for c in process.net_connections("inet")
                              if c.status == psutil.CONN_LISTEN})
    open_to_all = {k: v for k, v in listening.items() if not k.startswith(("127.", "::1:", "::ffff:127."))}
    assert len(listening) > 5 and not open_to_all, listening


def test_the_token_stays_in_the_memory_of_the_run(cluster):
    token = cluster["token"]
    assert len(token) == 64 and token != TOKEN and not cluster["changed"] and token not in "".join(cluster["said"])
    written = [p for p in Path(cluster["session"]).rglob("*") if p.is_file() and token.encode() in p.read_bytes()]
    shown = [p for p in cluster["processes"] if p.is_running() and token in " ".join(p.cmdline())]
    assert not written and not shown


def test_a_ray_that_does_not_start_is_told_with_the_cause_and_the_fix(tmp_path):
    starter = python(STARTER, home=tmp_path, RAY_TMPDIR="/proc/none")
    said = starter.communicate(timeout=120)[1]
    assert starter.returncode == 2 and "cannot start Ray here: [Errno 2]" in said and "run the same command again" in said, said
