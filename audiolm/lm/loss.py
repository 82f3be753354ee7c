"""Negative log-likelihood of a stage's targets in nats, by level: one rule for training, validation and evaluation.

A target's probability is over the ids that its slot may take.  `prepare` finds the targets on the CPU, so no step waits
for the device; the tensors' sizes depend on the batch's shape alone, or are one of few, so little is compiled twice.
Shapes: ids_BT, target_BT (the id carries loss), doc_BT, cond_BTC, length_BT as lm.batches; index_SN, label_SN, nats_SN as
models.lm.heads: S slots, N places of targets.  Where the stage has run lengths they are one more slot, the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from audiolm.lm.stages import Stage
from audiolm.models.lm.attention import ALONE, Documents, documents
from audiolm.models.lm.heads import NO_TARGET

Inputs = dict[str, torch.Tensor]
SIZES = 16  # of the loss tensors on rows of one shape where positions are frames: the depth network runs over empty places
EXTRA = ("cond_BTC", "length_BT")  # of a batch, where the stage has them


def prepare(stage: Stage, batch: Mapping[str, torch.Tensor], flash: bool = False) -> Inputs:
    """The tensors that a model takes (`inputs_of`) of a batch on the CPU, and count_2: its targets, its ids without padding.

    `flash`: documents are laid out for flash attention, also where every row is one document.
    Raises ValueError for a target that no slot may take.
    """
    # the id at t + 1 is predicted from the place t: at_N numbers these places among B x T
    ids_BT, target_BT, doc_BT = batch["ids_BT"], batch["target_BT"], batch["doc_BT"]
    at_N = target_BT[:, 1:].flatten().nonzero()[:, 0]
    at_N += at_N // (ids_BT.shape[1] - 1)
    ids_N = ids_BT.flatten()[at_N + 1]
    slot_V, label_V = _tables(stage)
    if stage.frames and stage.slots > 1:  # a place predicts all codes of the frame after it
        others_NR = batch["cond_BTC"].flatten(0, 1)[at_N + 1, stage.n_cond:]
        ids_N, at_N = torch.cat([ids_N[:, None], others_NR], 1).flatten(), at_N.repeat_interleave(stage.slots)
    slot_N, label_N = slot_V[ids_N], label_V[ids_N]
    if (slot_N < 0).any():
        raise ValueError(f"{stage.name}: id {int(ids_N[slot_N < 0][0])} is marked as a target and belongs in no slot")
    # group the targets by slot, each group padded to one fixed size, or to one of a few
    each = [(slot_N == s).nonzero()[:, 0] for s in range(stage.slots)]
    part = math.ceil(ids_BT.numel() / SIZES)
    least = part * math.ceil(max(1, len(each[0])) / part) if stage.frames else math.ceil(stage.target_share * ids_BT.numel())
    size = max(least, *map(len, each))
    # padded places read different ids: gradients of zero added to one place would wait for each other on a GPU
    index_SN = (torch.arange(size) % ids_BT.numel()).repeat(stage.slots, 1)
    label_SN = torch.full((stage.slots, size), NO_TARGET)
    for s, own in enumerate(each):
        index_SN[s, :len(own)], label_SN[s, :len(own)] = at_N[own], label_N[own]
    if stage.lengths:  # a length is predicted where its id is
        length_N = batch["length_BT"].flatten()[at_N + 1]
        own = torch.full((1, size), NO_TARGET)
        own[0, :len(at_N)] = torch.where(length_N > 0, length_N - 1, NO_TARGET)
        index_SN, label_SN = index_SN.repeat(2, 1), torch.cat([label_SN, own])
    # rows of one document need no mask: causal attention is enough, padding comes last
    docs = documents(doc_BT, flash) if flash or (target_BT & (doc_BT > 0)).any() else ALONE
    rows_B = torch.where(target_BT, torch.arange(1, ids_BT.shape[1] + 1), 0).amax(1)  # a row ends with its last target
    count_2 = torch.tensor([len(ids_N), int(rows_B.sum())])
    return {"ids_BT": ids_BT, "index_SN": index_SN, "label_SN": label_SN, "count_2": count_2,
            **{name: batch[name] for name in EXTRA if name in batch},
            **{name: x for name, x in docs._asdict().items() if x is not None}}


def inputs_of(tensors: Inputs) -> tuple:
    """The model's arguments: ids_BT, its documents, index_SN, label_SN, cond_BTC, length_BT."""
    docs = Documents(*(tensors.get(name) for name in Documents._fields))
    return tensors["ids_BT"], docs, tensors["index_SN"], tensors["label_SN"], *(tensors.get(name) for name in EXTRA)


def level_sums(stage: Stage, nats_SN: torch.Tensor, label_SN: torch.Tensor) -> torch.Tensor:
    """float64 (2, n_sums): nats and number of targets, summed at level + 1 (0: semantic); add them up, then divide.

    Stage 1's run lengths, where it has them, stand at 1.
    """
    sums = torch.zeros(2, n_sums(stage), dtype=torch.float64, device=nats_SN.device)
    first = 0 if stage.name == "semantic" else stage.levels[0] + 1
    sums[0, first:] = nats_SN.double().sum(1)
    sums[1, first:] = (label_SN != NO_TARGET).sum(1)
    return sums


def n_sums(stage: Stage) -> int:
    """Columns of `level_sums`."""
    return stage.levels[1] + 1 + int(stage.lengths)


def mean_loss(stage: Stage, sums: torch.Tensor) -> torch.Tensor:
    """Nats per target token of level sums; a run length's nats belong to its id."""
    return sums[0].sum() / (sums[1, 0] if stage.lengths else sums[1].sum())


def batch_sums(model: torch.nn.Module, stage: Stage, batch: Mapping[str, torch.Tensor],
               device: str | torch.device) -> torch.Tensor:
    """`level_sums` of a batch under a model on `device`."""
    tensors = {name: x.to(device) for name, x in prepare(stage, batch).items()}
    return level_sums(stage, model(*inputs_of(tensors)), tensors["label_SN"])


def _tables(stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
    """(slot_V, label_V): each id's slot and its row in that slot's head; -1 where it is never a target."""
    slot_V, label_V = np.full((2, stage.vocab_size), -1)
    for slot, ids in enumerate(stage.slot_ids()):
        slot_V[ids], label_V[ids] = slot, np.arange(len(ids))
    return torch.from_numpy(slot_V), torch.from_numpy(label_V)
