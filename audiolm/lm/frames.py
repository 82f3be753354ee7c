"""Frames as positions: from a stage's ids, a code each, to rows in which the codes of a frame share one position.

A position has an id of its own and others whose embeddings are added to it.  A prefix position has its id; a frame has
the id of its first code and, as added ones, its other codes.  The position before a frame also has the condition of it.
Shapes: P positions; ids_P; added_PA: conditions, then other codes; cond_TC of lm.stages; S slots of a frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from audiolm.lm.loss import inputs_of
from audiolm.lm.stages import Packed, Stage
from audiolm.models.lm.frame_transformer import FrameTransformer


def last_ids(stage: Stage, first: int, ids: int) -> np.ndarray:
    """last_P, the place of each position's last id among so many, of which target 0 is `first`."""
    return np.append(np.arange(first), np.arange(first + stage.slots - 1, ids, stage.slots))


def frame_positions(stage: Stage, ids: np.ndarray, first: int, cond_TC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids_P, added_PA) of ids whose target 0 is id `first`.

    cond_TC may be longer than ids, with conditions of frames that are to be drawn; added_PA is longer then too.
    """
    frames_NS, cond_PC = ids[first:].reshape(-1, stage.slots), cond_TC[last_ids(stage, first, len(cond_TC))]
    added_PA = np.full((len(cond_PC), stage.n_added), stage.no_cond, np.int64)
    added_PA[:, :stage.n_cond] = cond_PC
    added_PA[first:first + len(frames_NS), stage.n_cond:] = frames_NS[:, 1:]
    return np.append(ids[:first], frames_NS[:, 0]), added_PA


def packed_frames(stage: Stage, packed: Packed) -> Packed:
    """A packed crop with its frames as positions."""
    first = len(stage.split(packed.ids)[0])
    ids_P, added_PA = frame_positions(stage, packed.ids, first, packed.cond)
    return Packed(ids_P, packed.target[last_ids(stage, first, len(packed.ids))], added_PA)


def replace_frames(stage: Stage, batch: Mapping[str, torch.Tensor], share: float,
                   draws: Sequence[np.random.Generator]) -> dict[str, torch.Tensor]:
    """ids_BT and cond_BTC of a batch in which others of its row stand in the place of some frames, as a model reads them.

    A row's share is uniform between 0 and twice `share`; draws: a generator a row.  Conditions stay, as do the labels, which
    are taken from the true batch.  Close to scheduled sampling (1506.03099), without a pass that draws.
    """
    ids_BT, cond_BTC = batch["ids_BT"].clone(), batch["cond_BTC"].clone()
    for ids_T, cond_TC, target_T, draw in zip(ids_BT, cond_BTC, batch["target_BT"], draws, strict=True):
        frames = target_T.nonzero()[:, 0]
        at = frames[draw.random(len(frames)) < 2 * share * draw.random()]
        other = frames[draw.integers(len(frames), size=len(at))]
        ids_T[at], cond_TC[at, stage.n_cond:] = ids_T[other], cond_TC[other, stage.n_cond:]
    return {"ids_BT": ids_BT, "cond_BTC": cond_BTC}


def own_draws(stage: Stage, batch: Mapping[str, torch.Tensor], share: float, passes: int,
              draws: Sequence[np.random.Generator]) -> dict[str, torch.Tensor]:
    """What `drawn_frames` and `own_frames` need of chance, by row: own_BT, where a frame is replaced, and uniform_BTU, which
    codes are drawn in each pass.

    A row's share is uniform between 0 and twice `share`; draws: a generator a row.
    """
    own, uniform = [], []
    for draw in draws:
        wanted, random_TU = 2 * share * draw.random(), draw.random((batch["ids_BT"].shape[1], 1 + passes * stage.slots))
        own.append(random_TU[:, 0] < wanted)  # a place's numbers do not depend on the row's padding
        uniform.append(random_TU[:, 1:].astype(np.float32))
    return {"own_BT": torch.from_numpy(np.stack(own)), "uniform_BTU": torch.from_numpy(np.stack(uniform))}


@torch.no_grad()
def drawn_frames(model: FrameTransformer, stage: Stage, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """codes_NS that the model draws at the targets of a batch (lm.loss.prepare, with `own_draws`).

    The first pass draws each frame after true ones (parallel scheduled sampling, 1906.04331), the next one each after frames of
    the pass before, as generation does.
    """
    uniform_NU, codes_NS = tensors["uniform_BTU"].flatten(0, 1)[_places(tensors)], None
    for uniform_NS in uniform_NU.split(stage.slots, 1):
        read = tensors if codes_NS is None else _with_frames(stage, tensors, codes_NS, torch.ones_like(tensors["own_BT"]))
        codes_NS = model(*inputs_of(read), uniform_NS=uniform_NS)
    return codes_NS


def own_frames(model: FrameTransformer, stage: Stage, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch's tensors in which frames that the model drew stand where own_BT is; conditions and labels stay."""
    return _with_frames(stage, tensors, drawn_frames(model, stage, tensors), tensors["own_BT"])


def _places(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The place of each target's frame: it is predicted at the one before."""
    return (tensors["index_SN"][0] + 1).clamp_max(tensors["ids_BT"].numel() - 1)


def _with_frames(stage: Stage, tensors: Mapping[str, torch.Tensor], codes_NS: torch.Tensor,
                 own_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors with codes_NS in the place of the targets' frames under own_BT."""
    ids_BT, cond_BTC, label_SN = (tensors[name] for name in ("ids_BT", "cond_BTC", "label_SN"))
    ids_NS = codes_NS + stage.offset + stage.vocab * torch.arange(stage.slots, device=ids_BT.device)
    places_N = _places(tensors)
    chosen_N = own_BT.flatten()[places_N] & (label_SN >= 0).all(0)
    to_N = torch.where(chosen_N, places_N, ids_BT.numel())  # a place outside: no size depends on the batch's content
    read_MS = torch.cat([ids_BT.flatten()[:, None], cond_BTC.flatten(0, 1)[:, stage.n_cond:]], 1)
    read_MS = F.pad(read_MS, (0, 0, 0, 1)).index_copy(0, to_N, ids_NS)[:-1].unflatten(0, ids_BT.shape)
    return {**tensors, "ids_BT": read_MS[..., 0], "cond_BTC": torch.cat([cond_BTC[..., :stage.n_cond], read_MS[..., 1:]], 2)}
