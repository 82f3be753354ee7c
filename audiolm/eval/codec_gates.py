"""Gates of the codec, in the step `codec_figures`: acoustic stages learn nothing of use from a codec that is not understood.

`wer`: the words that a recogniser loses with all levels; `levels`: levels whose codes collapsed.  Verdicts, `--force` and
gates.json are those of eval/stage_gates.py; `codec.gates: warn` turns failures into notes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from audiolm.eval.stage_gates import Verdict, collapsed, settle
from audiolm.tokenizers.base import ACOUSTIC_HOP, SAMPLE_RATE

MAX_WER = 60.0  # percent: more than half of the words are lost, and no language model on these codes can bring them back


def check_codec(table: Mapping[str, Any], gates: str, out: Any) -> dict[str, Any]:
    """Facts of the gates of a table of `codec_quality.compare`: "gate/failed", and the failures that were forced or only
    warn as "notes". Raises GateFailed."""
    verdicts = {name: v for name, v in (("wer", wer_verdict(table)), ("levels", levels_verdict(table))) if v}
    known = settle(out, verdicts, "the measurements are kept", gates, "codec_figures", "codec.gates")
    failed = [f"GATE {v['text']}" for v in known.values() if not v["ok"]]
    return {"gate/failed": len(failed), "notes": failed}


def wer_verdict(table: Mapping[str, Any]) -> Verdict | None:
    """The verdict on the WER with all levels; None where it was not measured or tells nothing of the codec.

    A recogniser of another language fails on the originals, and without texts on every good codec too.
    """
    wer = table["levels"][-1]["wer"]
    others = [row["wer"] for row in table["rows"] if row["codec"] not in ("identity", "this codec") and row["wer"] is not None]
    original = next(row["wer"] for row in table["rows"] if row["codec"] == "identity")
    if wer is None or max(original, min(others, default=0.0)) > MAX_WER:
        return None
    against = "their text" if table["wer"]["reference"] == "texts" else "what it hears in the original"
    return {"ok": wer <= MAX_WER, "figures": {},
            "text": f"the codec is not understood: with all levels {table['wer']['asr']} gets {wer:.0f} % of the words wrong, "
                    f"against {against}, where {MAX_WER:.0f} % is the most",
            "look": "the players and the mel distance by level in codec.json, and the codec's curves of val.mel and val.pesq "
                    "(where they still improve: codec.train.steps; where they do not: codec.weights, codec.n_q, codec.vocab, "
                    "more channels)"}


def levels_verdict(table: Mapping[str, Any]) -> Verdict:
    """The verdict on the use of each level's codes on the clips of the table."""
    frames = round(table["seconds"] * SAMPLE_RATE / ACOUSTIC_HOP)
    bad = []
    for level in table["usage"]:
        vocab, bits = round(level["used"] / level["share"]), math.log2(level["perplexity"])
        if collapsed(vocab, frames, level["used"], bits):
            bad.append(f"level {level['level']} uses {level['used']} of {vocab} codes and {bits:.2f} of {math.log2(vocab):.2f} "
                       "bits")
    return {"ok": not bad, "figures": {}, "text": f"the codec's codes collapsed: {'; '.join(bad)}" if bad else "",
            "look": "used and perplexity by level in the codec's validations (codec.quantize_from, codec.dead_share, fewer "
                    "levels or codes)"}
