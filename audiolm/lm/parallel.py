"""Documents of the parallel decoder (SoundStorm, 2305.09636): which codes are masked, which carry loss, and batches of them.

A document is a crop of a clip at 50 Hz; each semantic id counts for the RATIO frames of its time.  In training one level is
drawn: after the prompt, in which all codes are known, a share of its codes is masked, all codes of finer levels are, and those
of coarser levels are known.  Masked codes of the drawn level carry the loss, no others.
Validation and evaluation mask each level as a whole instead, with the coarser levels true, so that their figures compare.
Shapes: z_T int64 at 25 Hz, codes_TQ int64 at 50 Hz, masked_TQ bool; ids_TC and batches as models.lm.parallel_decoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from audiolm.config.lm import LMConfig
from audiolm.data.tokens import RATIO
from audiolm.lm.loss import level_sums
from audiolm.lm.stages import Stage
from audiolm.models.lm.heads import NO_TARGET
from audiolm.models.lm.parallel_decoder import ParallelDecoder

PROMPTED = 0.5  # share of training documents with a prompt: sounds are also generated without one


def parallel_stage(config: LMConfig, codec_n_q: int, codec_vocab: int, k: int) -> Stage:
    """The decoder's vocabularies and crop. It is packed, as stage 2 without EOS, to plan rows and to count baselines alone."""
    return Stage("parallel", k, codec_vocab, (0, codec_n_q), codec_n_q, False, config.parallel.crop_s,
                 dropped=config.condition_dropout)


class Document(NamedTuple):
    """A crop with masks."""

    ids_TC: np.ndarray
    level: int
    label_T: np.ndarray  # the level's code where it carries loss, else NO_TARGET


def frame_ids(stage: Stage, z_T: np.ndarray, codes_TQ: np.ndarray, masked_TQ: np.ndarray, drop: bool = False) -> np.ndarray:
    """ids_TC of frames; masked codes are not read. `drop`: without condition.

    Raises ValueError for ids that are not the stage's, and where the rates of condition and codec differ.
    """
    if len(codes_TQ) != RATIO * len(z_T):
        raise ValueError(f"parallel: {len(codes_TQ)} acoustic frames do not match {len(z_T)} semantic ones (x {RATIO}): give "
                         "undeduplicated semantic tokens of the same audio")
    condition_T = np.repeat(stage.semantic_ids(z_T), RATIO)
    ids_TQ = stage.targets(np.where(masked_TQ, 0, codes_TQ)).reshape(codes_TQ.shape)
    masks_Q = stage.no_cond + 1 + np.arange(codes_TQ.shape[1])
    return np.column_stack([np.full_like(condition_T, stage.no_cond) if drop else condition_T,
                            np.where(masked_TQ, masks_Q, ids_TQ)])


def document(stage: Stage, z_T: np.ndarray, codes_TQ: np.ndarray, level: int, own_T: np.ndarray, start: int = 0,
             drop: bool = False) -> Document:
    """A crop whose codes of `level` are masked under own_T, and those of finer levels from frame `start` on."""
    masked_TQ = np.zeros(codes_TQ.shape, bool)
    masked_TQ[:, level], masked_TQ[start:, level + 1:] = own_T, True
    return Document(frame_ids(stage, z_T, codes_TQ, masked_TQ, drop), level, np.where(own_T, codes_TQ[:, level], NO_TARGET))


def draw_document(stage: Stage, z_T: np.ndarray, codes_TQ: np.ndarray, draw: np.random.Generator) -> Document:
    """A training document: prompt, level and masks are drawn (2305.09636, 3.2), and whether it has a condition."""
    frames = len(codes_TQ)
    start = int(draw.integers(frames)) if draw.random() < PROMPTED else 0
    level = int(draw.integers(stage.slots))
    # cosine schedule: mostly masked documents are as frequent as they are among the passes of generation
    own_T = draw.random(frames) < math.cos(draw.uniform(0, math.pi / 2))
    own_T[:start] = False
    if not own_T.any():
        own_T[draw.integers(start, frames)] = True
    return document(stage, z_T, codes_TQ, level, own_T, start, bool(draw.random() < stage.dropped))


def collate(stage: Stage, rows: Sequence[Sequence[Document]], gap: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """The model's inputs and count_2, targets and frames, of rows of documents with `gap` frames of padding between them.

    The numbers of frames and of places for targets are rounded up to a multiple.
    """
    length = _up(max(sum(len(d.label_T) + gap for d in row) - gap for row in rows), multiple)
    ids_BTC = np.full((len(rows), length, 1 + stage.slots), stage.no_cond, np.int64)
    doc_BT = np.full((len(rows), length), -1, np.int64)
    label_SBT = np.full((stage.slots, len(rows), length), NO_TARGET, np.int64)
    for b, row in enumerate(rows):
        at = 0
        for n, d in enumerate(row):
            end = at + len(d.label_T)
            ids_BTC[b, at:end], doc_BT[b, at:end], label_SBT[d.level, b, at:end] = d.ids_TC, n, d.label_T
            at = end + gap
    places = [np.flatnonzero(label_SBT[s] != NO_TARGET) for s in range(stage.slots)]
    size = _up(max(map(len, places)), multiple)
    # padded places read different frames, as in lm.loss
    index_SN = np.tile(np.arange(size) % doc_BT.size, (stage.slots, 1))
    label_SN = np.full((stage.slots, size), NO_TARGET, np.int64)
    for s, own in enumerate(places):
        index_SN[s, :len(own)], label_SN[s, :len(own)] = own, label_SBT[s].reshape(-1)[own]
    count_2 = np.array([sum(map(len, places)), (doc_BT >= 0).sum()])
    arrays = {"ids_BTC": ids_BTC, "doc_BT": doc_BT, "index_SN": index_SN, "label_SN": label_SN, "count_2": count_2}
    return {name: torch.from_numpy(x) for name, x in arrays.items()}


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def inputs_of(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The model's arguments."""
    return tuple(batch[name] for name in ("ids_BTC", "doc_BT", "index_SN", "label_SN"))


@torch.no_grad()
def whole_level_sums(model: ParallelDecoder, stage: Stage, crops: Iterable[tuple[np.ndarray, np.ndarray]],
                     device: str | torch.device) -> torch.Tensor:
    """`level_sums` of crops (z_T, codes_TQ) with each level masked as a whole; the model is in eval mode and on `device`."""
    sums = torch.zeros(2, stage.slots + 1, dtype=torch.float64, device=device)
    for z_T, codes_TQ in crops:  # a crop's levels are one batch, without padding
        rows = [[document(stage, z_T, codes_TQ, q, np.ones(len(codes_TQ), bool))] for q in range(stage.slots)]
        batch = {name: x.to(device) for name, x in collate(stage, rows, 0).items()}
        sums += level_sums(stage, model(*inputs_of(batch)), batch["label_SN"])
    return sums
