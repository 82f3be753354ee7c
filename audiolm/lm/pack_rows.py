"""Rows of packed documents, as tensors: ids_BT, target_BT, doc_BT, and cond_BTC and length_BT where the stage has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from audiolm.lm.frames import packed_frames
from audiolm.lm.stages import Packed, Stage


def pack_rows(stage: Stage, documents: Sequence[Sequence[Packed]], length: int | None = None) -> dict[str, torch.Tensor]:
    """Rows of `length` positions (None: as long as the longest) of packed documents.

    They are padded at the right with BOS, which carries no loss and which no earlier id sees.
    """
    if stage.frames:
        documents = [[packed_frames(stage, packed) for packed in row] for row in documents]
    shape = len(documents), length or max(sum(len(packed.ids) for packed in row) for row in documents)
    rows = {"ids": np.full(shape, stage.bos, np.int64), "target": np.zeros(shape, bool),
            "cond": np.full((*shape, stage.n_added), stage.no_cond, np.int64), "length": np.zeros(shape, np.int64)}
    doc_BT = np.empty(shape, np.int64)
    for b, row in enumerate(documents):
        at = 0
        for doc, packed in enumerate(row):
            end = at + len(packed.ids)
            doc_BT[b, at:end] = doc
            for name, values in rows.items():
                if (own := getattr(packed, name)) is not None:
                    values[b, at:end] = own
            at = end
        doc_BT[b, at:] = len(row)  # no id of a document attends to the padding, nor the padding to it
    out = {"ids_BT": rows["ids"], "target_BT": rows["target"], "doc_BT": doc_BT}
    out |= ({"cond_BTC": rows["cond"]} if stage.n_added else {}) | ({"length_BT": rows["length"]} if stage.lengths else {})
    return {k: torch.from_numpy(v) for k, v in out.items()}
