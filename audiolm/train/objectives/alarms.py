"""Alarms of a training that has collapsed: what a validation reports although the loss looks fine.

They ring in the progress line and as `val.alarm/NAME`; they stop nothing.  A stage whose tokenizer has collapsed is
stopped by eval/stage_gates.py, and numbers that are not finite by train/guards.py.
"""

from __future__ import annotations

from collections.abc import Mapping

COLLAPSED = 0.1  # of the targets' perplexity: predictions that use fewer targets than this have collapsed


def is_constant(before: float | None, loss: float) -> bool:
    """True for a validation's loss that equals the one before it: nothing is learned."""
    return before is not None and abs(before - loss) < 1e-5 * before


def with_alarms(report: dict[str, float], alarms: Mapping[str, bool]) -> dict[str, float]:
    """A validation's report with "alarm/NAME", 1.0 where it rings."""
    return report | {f"alarm/{name}": float(on) for name, on in alarms.items()}
