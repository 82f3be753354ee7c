"""Facts of a token step: counts of its shards, code usage by level, rejected clips.

A shard's part is a dict: clips, frames, dedup, counts (by level), copies, skipped and rejected (reasons by clip).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from audiolm.data import tokens
from audiolm.models.entropy import entropy_bits
from audiolm.tokenizers.base import TokenSpec

TOKENIZER = {"semantic": "kmeans", "acoustic": "codec"}  # which -> the step whose artifact encodes
LISTED = 3  # rejected clips that are named


def shard_facts(path: str, spec: TokenSpec, which: str, own: int) -> dict[str, Any]:
    """Counts of the first `own` clips.

    They are read from the file, so a skipped shard counts like a new one.
    """
    levels = [tokens.level_name(q) for q in range(spec.n_q)]
    columns = tokens.read_shard(path, ["n_frames", *levels, *(["n_dedup"] if which == "semantic" else [])])
    frames = int(columns["n_frames"][:own].sum())
    return {"clips": own, "frames": frames, "dedup": int(columns["n_dedup"][:own].sum()) if which == "semantic" else 0,
            "counts": np.stack([np.bincount(columns[n].values[:frames], minlength=spec.vocab) for n in levels])}


def rejected_facts(parts: list[dict[str, Any]], corpus: Any) -> dict[str, Any]:
    """Facts about rejected clips, none where there is none. Raises tokens.TokenError for too many."""
    rejected = {i: why for part in parts for i, why in part["rejected"].items()}
    if not rejected:
        return {}
    first = "; ".join(f"{i} ({why})" for i, why in list(rejected.items())[:LISTED])
    text = f"{len(rejected)} clips rejected: {first}" + (" and more" if len(rejected) > LISTED else "")
    if len(rejected) > corpus.max_rejected * sum(part["clips"] + part["copies"] for part in parts):
        raise tokens.TokenError(f"{text}; that is more than corpus.max_rejected ({corpus.max_rejected}) allows: bring the "
                                f"files back, or raise corpus.revision to {corpus.revision + 1} for a manifest of the new ones")
    return {"rejected": len(rejected), "notes": [text]}


def facts_of(which: str, parts: list[dict[str, Any]], sizes: list[float], seconds: float) -> dict[str, Any]:
    """The step's facts; `sizes` are the parts' audio s.

    x_realtime (audio s per s) counts shards that were encoded now and is left out where none was.
    """
    total = {k: sum(p[k] for p in parts) for k in ("clips", "copies", "frames", "dedup", "skipped")}
    facts: dict[str, Any] = {"clips": total["clips"], "audio_s": round(sum(sizes), 3), "frames": total["frames"],
                             "shards": len(parts), "copies": total["copies"], "shards_skipped": total["skipped"],
                             "seconds": round(seconds, 3)}
    if encoded_s := sum(s for s, part in zip(sizes, parts, strict=True) if not part["skipped"]):
        facts["x_realtime"] = round(encoded_s / max(seconds, 1e-9), 2)
    # Entropy and codes in use, level by level: a collapsed tokenizer would let every later stage
    # learn nothing.
    for q, counts in enumerate(sum(p["counts"] for p in parts)):
        used = int((counts > 0).sum())
        if used < 2:
            raise tokens.TokenError(
                f"the {which} tokenizer collapsed: level {q + 1} uses {used} of {len(counts)} codes over "
                f"{total['frames']} frames. Look at the {TOKENIZER[which]} step (losses, code usage) and at whether "
                "the audio is silent, and train longer or with a lower learning rate")
        facts[f"used.{tokens.level_name(q)}"] = used
        facts[f"entropy_bits.{tokens.level_name(q)}"] = round(entropy_bits(counts), 4)
    if which == "semantic":
        facts |= {"tokens_dedup": total["dedup"], "mean_run": round(total["frames"] / total["dedup"], 4)}
    return facts
