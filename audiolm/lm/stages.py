"""Token layouts of the three stages (2209.03143 III-C): one `Stage` value each, shared by packing, loss and sampling.

    semantic   BOS z z z ... [EOS]            loss on z and EOS; EOS only where the crop reaches its clip's end
    coarse     BOS z z z ... SEP y y y ... [EOS]  loss on y and EOS; y: levels 1 to Q', frame by frame
    fine       BOS c c c ... SEP f f f ...    loss on f; c: levels 1 to Q', f: levels Q' + 1 to Q, frame by frame

Targets are the ids with loss, counted from 0; target n stands in slot n % slots of its frame, and each slot is one level.
Ids: semantic, then the codes of each level (offset by level: III-B), then BOS, EOS, SEP.  `fine` has no semantic ids.
`lengths`: each deduplicated z also has the number of frames that it lasts, a second target of its place; stages 2 and 3
then know the frame of every id.  `aligned`: a target's condition is the semantic id (stage 2) or the coarse codes (stage
3) of its own frame.  `frames`: rows and models of stage 2 hold a frame in one position (lm.frames).
Shapes: z_T int64 semantic ids at 25 Hz, undeduplicated; codes_TQ int64 at 50 Hz, a column a level; ids int64; cond_TC ids.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from audiolm.data.tokens import RATIO
from audiolm.lm.run_lengths import dedupe, run_lengths

SEMANTIC_HZ = 25


class Packed(NamedTuple):
    """A crop in a stage's layout."""

    ids: np.ndarray  # ids_T
    target: np.ndarray  # target_T: True where ids[t] carries loss
    cond: np.ndarray  # cond_TC: condition of the target at t + 1; C = 0 where the stage has none
    length: np.ndarray | None = None  # length_T: frames that ids[t] lasts, 0 where that is not known


@dataclass(frozen=True)
class Stage:
    """Layout of one stage: which ids exist, in which order they are packed, which may be drawn at a position."""

    name: str  # semantic, coarse, fine; or parallel (lm.parallel)
    k: int  # semantic vocabulary
    vocab: int  # codes of an acoustic level
    levels: tuple[int, int]  # target levels [from, to), counted from 0; (0, 0) in stage 1
    n_coarse: int  # Q'
    dedupe: bool
    crop_s: float
    min_crop_s: float = 0.0  # rows are cut further, into random crops of at least this; 0: only at a row's or clip's end
    lengths: bool = False  # stage 1 predicts how many frames an id lasts
    aligned: bool = False  # targets have the condition of their own frame, beside the prefix
    dropped: float = 0.0  # share of training documents without prefix and condition, which guidance needs; 1: all, always
    frames: bool = False  # a frame is one position

    # -- vocabulary: [semantic ids | level 1 | level 2 | ... | BOS EOS SEP] -----------------------

    @property
    def needs_semantic(self) -> bool:
        return self.name == "semantic" or (self.name != "fine" and self.conditioned)

    @property
    def conditioned(self) -> bool:
        """True for an acoustic stage with a prefix; without one where all documents are dropped (lm.ablation)."""
        return self.name != "semantic" and self.dropped < 1

    @property
    def needs_acoustic(self) -> bool:
        return self.name != "semantic"

    @property
    def columns(self) -> tuple[int, ...]:
        """Acoustic levels that `pack` takes, in order."""
        return tuple(range(self.levels[1]))

    @property
    def offset(self) -> int:
        """Id of code 0 of level 0."""
        return self.k if self.needs_semantic else 0

    @property
    def bos(self) -> int:
        return self.offset + len(self.columns) * self.vocab

    @property
    def eos(self) -> int:
        return self.bos + 1

    @property
    def sep(self) -> int:
        return self.bos + 2

    @property
    def vocab_size(self) -> int:
        return self.bos + 3

    @property
    def n_cond(self) -> int:
        """Conditions of a target; 0 where there are none."""
        return 0 if not self.aligned else 1 if self.name == "coarse" else self.n_coarse

    @property
    def n_added(self) -> int:
        """Ids beside a position's own: conditions and, where positions are frames, the other codes of its frame."""
        return self.n_cond + (self.slots - 1) * self.frames

    @property
    def no_cond(self) -> int:
        """Id that stands for no condition."""
        return self.bos

    @property
    def ends(self) -> bool:
        """True where EOS ends a crop: in stage 1, and in a stage 2 that does not know how long its prefix lasts."""
        return self.name == "semantic" or (self.name == "coarse" and self.dedupe)

    @property
    def slots(self) -> int:
        """Targets of an acoustic frame, one a level; 1 in stage 1."""
        return max(1, self.levels[1] - self.levels[0])

    @property
    def crop_frames(self) -> int:
        """Semantic frames of the longest crop."""
        return int(self.crop_s * SEMANTIC_HZ + 1e-6)  # 0.4 s are 10 frames, also where the product rounds below

    @property
    def min_crop_frames(self) -> int:
        """Semantic frames of the shortest random crop; 0: there are none."""
        return min(self.crop_frames, int(self.min_crop_s * SEMANTIC_HZ + 1e-6))

    @property
    def n_special(self) -> int:
        """Special ids of a packed crop: BOS, SEP and EOS where the layout has them."""
        return 1 + int(self.ends) + int(self.name != "semantic")

    @property
    def frame_ids(self) -> int:
        """Acoustic positions of a semantic frame, prefix and targets together: a position is an id, or a frame."""
        return RATIO * (1 if self.frames else len(self.columns))

    @property
    def max_len(self) -> int:
        """Positions of the longest packed crop, and of every training row."""
        return (int(self.needs_semantic) + self.frame_ids) * self.crop_frames + self.n_special

    @property
    def target_share(self) -> float:
        """Upper bound of the share of a row's ids that are targets of one slot; fixes the loss tensors' shapes."""
        if self.name == "semantic":
            return 1.0
        if self.name == "fine":
            return 1 / len(self.columns)
        # densest in slot 0, where n semantic frames deduplicate to one id or none: 2n + 1 (EOS) targets
        return max(1 / self.slots, 3 / ((3 if self.dropped else 4) + 2 * self.slots))

    # -- tokens to ids ----------------------------------------------------------------------------

    def prompt(self, z_T: np.ndarray | None = None, coarse_TQ: np.ndarray | None = None) -> np.ndarray:
        """Ids before the first target: BOS; BOS z... SEP; BOS coarse SEP."""
        if self.name == "semantic":
            return np.array([self.bos], np.int64)
        if not self.conditioned:
            return self.no_prompt()
        body = self.semantic_ids(z_T) if self.needs_semantic else self._acoustic_ids(coarse_TQ, 0, self.n_coarse)
        return np.concatenate([[self.bos], body, [self.sep]]).astype(np.int64)

    def no_prompt(self) -> np.ndarray:
        """`prompt` of a crop whose condition is dropped."""
        return np.array([self.bos, self.sep], np.int64)

    def targets(self, codes: np.ndarray) -> np.ndarray:
        """Target ids without EOS, of z_T (stage 1) or of codes_TQ with the columns levels[0] to levels[1]."""
        return self.semantic_ids(codes) if self.name == "semantic" else self._acoustic_ids(codes, *self.levels)

    def semantic_ids(self, z_T: np.ndarray) -> np.ndarray:
        """z_T checked and, where the stage deduplicates, deduplicated."""
        z_T = np.asarray(z_T, np.int64)
        if z_T.ndim != 1 or not _within(z_T, self.k):
            raise ValueError(f"{self.name}: z_T must be (T,) with ids in [0, {self.k}), got shape {z_T.shape}; "
                             "are the token store and the stage of one tokenizer?")
        if self.lengths:
            return run_lengths(z_T)[0]
        return dedupe(z_T) if self.dedupe else z_T

    def conditions(self, z_T: np.ndarray | None = None, coarse_TQ: np.ndarray | None = None) -> np.ndarray:
        """cond_NC of all targets of a crop: ids of z_T in stage 2, of coarse_TQ in stage 3."""
        if not self.aligned:
            return np.zeros((0, 0), np.int64)
        if self.name == "coarse":
            return np.repeat(np.asarray(z_T, np.int64), RATIO * self.slots)[:, None]
        return np.repeat(self._acoustic_ids(coarse_TQ, 0, self.n_coarse).reshape(-1, self.n_coarse), self.slots, 0)

    def place_conditions(self, ids: int, first: int, cond_NC: np.ndarray) -> np.ndarray:
        """cond_TC of a sequence of `ids` ids whose target 0 is id `first`: the id before a target has its condition."""
        cond_TC = np.full((ids, self.n_cond), self.no_cond, np.int64)
        if self.aligned and len(cond_NC):
            n = min(len(cond_NC), ids - first + 1)
            cond_TC[first - 1:first - 1 + n] = cond_NC[:n]
        return cond_TC

    def _acoustic_ids(self, codes_TQ: np.ndarray, first: int, last: int) -> np.ndarray:
        """Ids of the levels [first, last), frame after frame, the levels of a frame side by side (III-B)."""
        codes_TQ = np.asarray(codes_TQ, np.int64)
        if codes_TQ.ndim != 2 or codes_TQ.shape[1] != last - first:
            raise ValueError(f"{self.name}: codes must be (T, {last - first}), levels {first} to {last - 1}, "
                             f"got {codes_TQ.shape}")
        if not _within(codes_TQ, self.vocab):
            raise ValueError(f"{self.name}: codes must lie in [0, {self.vocab}), got {codes_TQ.min()} to "
                             f"{codes_TQ.max()}; are the token store and the stage of one codec?")
        return (codes_TQ + self.offset + self.vocab * np.arange(first, last)).reshape(-1)

    def pack(self, z_T: np.ndarray | None, codes_TQ: np.ndarray | None, at_end: bool, drop: bool = False) -> Packed:
        """One crop: z_T its semantic ids, codes_TQ its codes of all `columns`; None if unused.

        `at_end`: the crop reaches its clip's end. `drop`: without prefix and condition.
        Raises ValueError for shapes or ids that do not belong to the stage.
        """
        if self.name == "semantic":
            prefix, targets, cond_NC = self.prompt(), self.targets(z_T), self.conditions()
        else:
            codes_TQ = np.asarray(codes_TQ)
            if codes_TQ.ndim != 2 or codes_TQ.shape[1] != len(self.columns):
                raise ValueError(f"{self.name}: codes_TQ must have {len(self.columns)} columns, got {codes_TQ.shape}")
            if self.needs_semantic and len(codes_TQ) != RATIO * len(z_T):
                raise ValueError(f"coarse: {len(codes_TQ)} acoustic frames do not match {len(z_T)} semantic ones "
                                 f"(x {RATIO}): are both stores of one manifest?")
            coarse_TQ = codes_TQ[:, :self.n_coarse]
            prefix = self.no_prompt() if drop else self.prompt(z_T, coarse_TQ)
            targets = self.targets(codes_TQ[:, self.levels[0]:])
            cond_NC = np.zeros((0, self.n_cond), np.int64) if drop else self.conditions(z_T, coarse_TQ)
        # stage 2, after deduplication, ends every crop with EOS: it alone knows how long its prefix lasts
        has_eos = self.ends and (at_end or self.name == "coarse")
        ids = np.concatenate([prefix, targets, [self.eos] if has_eos else []]).astype(np.int64)
        cond_TC = self.place_conditions(len(ids), len(prefix), cond_NC)
        return Packed(ids, np.arange(len(ids)) >= len(prefix), cond_TC, self._lengths(ids, z_T, at_end))

    def _lengths(self, ids: np.ndarray, z_T: np.ndarray | None, at_end: bool) -> np.ndarray | None:
        """length_T of a packed crop; the last id's is not known where the crop may cut it."""
        if not self.lengths:
            return None
        length_T, own = np.zeros(len(ids), np.int64), run_lengths(z_T)[1]
        length_T[1:1 + len(own)] = own
        if not at_end:
            length_T[len(own)] = 0
        return length_T

    def split(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A packed crop as (prompt ids up to and with BOS or SEP, target ids without EOS)."""
        ids = np.asarray(ids, np.int64)
        head = 1 if self.name == "semantic" else int(np.flatnonzero(ids == self.sep)[0]) + 1
        return ids[:head], ids[head:len(ids) - (ids[-1] == self.eos)]

    def unpack(self, targets: np.ndarray) -> np.ndarray:
        """Target ids (a final EOS is dropped) back to z (stage 1) or to codes_TQ of the target levels.

        Raises ValueError where an id does not belong in its slot: special ids never reach the codec.
        """
        targets = np.asarray(targets, np.int64)
        targets = targets[:-1] if len(targets) and targets[-1] == self.eos else targets
        if self.name == "semantic":
            if not _within(targets, self.k):
                raise ValueError(f"semantic: ids outside [0, {self.k}) among the targets")
            return targets
        if len(targets) % self.slots:
            raise ValueError(f"{self.name}: {len(targets)} targets are not whole frames of {self.slots}")
        codes_TQ = targets.reshape(-1, self.slots) - self.offset - self.vocab * np.arange(*self.levels)
        if not _within(codes_TQ, self.vocab):
            raise ValueError(f"{self.name}: an id stands in another level's slot")
        return codes_TQ

    # -- legal ids: one rule for the output heads, the loss and sampling --------------------------

    def slot_ids(self) -> list[np.ndarray]:
        """Ids that each slot of a frame may take, in the order of its output head; EOS, where it is legal, comes last."""
        if self.name == "semantic":
            return [np.append(np.arange(self.k), self.eos)]
        ids = [self.offset + level * self.vocab + np.arange(self.vocab) for level in range(*self.levels)]
        if self.ends:
            ids[0] = np.append(ids[0], self.eos)
        return ids

    def eos_legal(self, n_target: int | np.ndarray) -> bool | np.ndarray:
        """True where EOS may be target `n_target`: after whole frames, at least one, in a stage that has it."""
        return (n_target > 0) & (n_target % self.slots == 0) & self.ends

    @property
    def no_repeat(self) -> bool:
        """True where the id before may not be drawn again: deduplicated ids never repeat, but after MAX_RUN frames."""
        return self.name == "semantic" and self.dedupe and not self.lengths

    def to_json(self) -> dict:
        return {**asdict(self), "levels": list(self.levels)}


def _within(ids: np.ndarray, vocab: int) -> bool:
    return not ids.size or 0 <= ids.min() <= ids.max() < vocab
