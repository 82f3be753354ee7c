"""Layouts of the language models' sequences for tests, as fields of LMConfig."""

PAPER = {"lengths": False, "conditioning": "prefix", "condition_dropout": 0.0, "tied": False, "centroids": False}
TIMED = {**PAPER, "lengths": True, "conditioning": "aligned", "condition_dropout": 0.1}  # the token of every frame is known
