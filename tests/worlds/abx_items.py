"""ABX against a plain oracle (loops and dicts, after eval_ABX.py's text), at its edges, and from the command line."""

from __future__ import annotations

HEADER = "#file onset offset #phone prev-phone next-phone speaker\n"
