"""Layouts of the language models' sequences for tests: the paper's, whose stages have nothing but their prefix."""

PAPER = {"lengths": False, "conditioning": "prefix", "condition_dropout": 0.0, "tied": False}  # of LMConfig
