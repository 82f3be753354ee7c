"""Facts of a token step: counts over its shards, code usage by level, rejected clips; shards are added as they end."""

from __future__ import annotations

from typing import Any

import numpy as np

from audiolm.data.token_index import ShardRecord, TokenError
from audiolm.data.tokens import level_name
from audiolm.models.entropy import entropy_bits

TOKENIZER = {"semantic": "kmeans", "acoustic": "codec"}  # which -> the step whose artifact encodes
LISTED = 3  # rejected clips that are named


class EncodeFacts:
    """Sums over shards, whose `rows` are all planned clips and copies; they take the memory of one shard's counts."""

    def __init__(self, which: str, rows: int, corpus: Any):
        self.which, self.rows, self.corpus = which, rows, corpus
        self.clips, self.copies, self.dedup, self.counts_QV = 0, 0, 0, 0
        self.rejected: dict[int, dict[str, str]] = {}  # shard -> reasons by clip

    def add(self, record: ShardRecord, rejected: dict[str, str]) -> None:
        """Adds a shard; `rejected` has the reasons by clip. Copies count in `copies` alone.

        Raises TokenError once more clips are rejected than corpus.max_rejected allows of all rows.
        """
        own = record.clips - record.copies
        self.clips, self.copies = self.clips + own, self.copies + record.copies
        self.counts_QV = self.counts_QV + record.counts_QV.astype(np.int64)
        if record.n_dedup is not None:
            self.dedup += int(record.n_dedup[:own].sum())
        if not rejected:
            return
        self.rejected[record.shard] = rejected
        if sum(map(len, self.rejected.values())) > self.corpus.max_rejected * self.rows:
            raise TokenError(
                f"{self._rejected_text()}; that is more than corpus.max_rejected ({self.corpus.max_rejected}) allows of "
                f"{self.rows} clips: bring the files back, or raise corpus.revision to {self.corpus.revision + 1} for a "
                "manifest of the new ones")

    def facts(self, shards: int, skipped: int, audio_s: float, encoded_s: float, seconds: float) -> dict[str, Any]:
        """The step's facts, of `shards` of which `skipped` were there already.

        x_realtime (audio s per s) counts what was encoded now and is left out where that is nothing. Raises TokenError for a
        collapsed tokenizer.
        """
        frames, rejected = int(self.counts_QV[0].sum()), self._rejected_text()
        found: dict[str, Any] = {"clips": self.clips, "audio_s": round(audio_s, 3), "frames": frames, "shards": shards,
                                 "copies": self.copies, "shards_skipped": skipped, "seconds": round(seconds, 3)}
        if encoded_s:
            found["x_realtime"] = round(encoded_s / max(seconds, 1e-9), 2)
        # Entropy and codes in use, level by level: a collapsed tokenizer would let every later stage
        # learn nothing.
        for q, counts in enumerate(self.counts_QV):
            used = int((counts > 0).sum())
            if used < 2:
                # Silence stands for rejected clips and may be the whole cause, so they come first.
                raise TokenError(
                    f"{rejected}{'; ' if rejected else ''}the {self.which} tokenizer collapsed: level {q + 1} uses {used} of "
                    f"{len(counts)} codes over {frames} frames. Look at the {TOKENIZER[self.which]} step (losses, code usage) "
                    "and at whether the audio is silent, and train longer or with a lower learning rate")
            found[f"used.{level_name(q)}"] = used
            found[f"entropy_bits.{level_name(q)}"] = round(entropy_bits(counts), 4)
        if self.which == "semantic":
            found |= {"tokens_dedup": self.dedup, "mean_run": round(frames / self.dedup, 4)}
        if rejected:
            found |= {"rejected": sum(map(len, self.rejected.values())), "notes": [rejected]}
        return found

    def _rejected_text(self) -> str:
        """How many clips are rejected, and the first of them with the reasons; empty where there is none."""
        rejected = [f"{i} ({why})" for shard in sorted(self.rejected) for i, why in sorted(self.rejected[shard].items())]
        text = f"{len(rejected)} clips rejected: {'; '.join(rejected[:LISTED])}"
        return (text + " and more" if len(rejected) > LISTED else text) if rejected else ""
