"""A private Ray: one that is started for one run alone is closed to everybody else.

Ray's servers listen on every interface, and who may talk to them may run code. So such a Ray listens on loopback, and
takes only calls with a random token that the run's own processes inherit. It is in no file and on no command line.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def guarded() -> Iterator[None]:
    """Makes a `ray.init(address="local")` in the block start a closed Ray, whatever the environment says.

    The processes that Ray starts there get the settings, and this process keeps them in memory until `read_settings`. Its
    environment is afterwards as it was.
    """
    from ray._private import ray_constants

    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
                "RAY_ENABLE_K8S_TOKEN_AUTH": "0"}  # else Kubernetes would check tokens, and refuse this one
    if sys.platform == "linux":
        settings["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")  # else by the machine's name
    before, clusters = {k: os.environ.get(k) for k in settings}, ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(settings)
    # Ray turns a loopback address that it is given into an outside one, except where it thinks that machines cannot join.
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        read_settings()
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        for k, value in before.items():
            os.environ.pop(k, None) if value is None else os.environ.__setitem__(k, value)


def read_settings() -> None:
    """Makes Ray read this process's environment and token anew; else it keeps those of its first cluster."""
    import ray
    from ray._raylet import AuthenticationTokenLoader, Config

    if not ray.is_initialized():  # a cluster that is in use needs its own token
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
