"""A part of the GPU command whose items go wrong in every way."""

from __future__ import annotations

import os
import time

from tests.bench.figures import Figure


def items(device, tiny):
    def half():
        yield Figure("before the error", 2.0, "s")
        raise ValueError("planted\nwith a second line")

    return {"raises": half, "wrong": lambda: [Figure("beyond", 0.5, "", most=0.1), Figure("no number", float("nan"), "")],
            "dies": lambda: os._exit(3), "good": lambda: [Figure("train semantic, torch", 700_000.0, "tokens/s")],
            "hangs": lambda: time.sleep(600), "never begins": lambda: []}
