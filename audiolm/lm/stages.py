"""Token layouts of the three stages (paper III-C), one `Stage` value each; packing and sampling share them.

Stage 1 `BOS z... [EOS]`, stage 2 `BOS z... SEP y... EOS`, stage 3 `BOS coarse SEP fine`; acoustic codes frame by frame
with an offset per level (paper III-B).  Ids: semantic first, then the levels, then BOS, EOS, SEP beyond all of them.
Shapes: z_T int64, semantic ids at 25 Hz, undeduplicated; codes_TQ int64 at 50 Hz, one column per acoustic level;
ids int64; mask_V bool.  Targets are the ids after BOS (stage 1) or after SEP (2 and 3), counted from 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from audiolm.config.lm import LMConfig

SEMANTIC_HZ = 25
FRAMES = 2  # acoustic frames per semantic frame
NO_LEVEL = -2  # of BOS and SEP
FINE_MIN_S = 1.0  # the last piece of a generated sound is shorter than the rest


def dedupe(z_T: np.ndarray) -> np.ndarray:
    """Runs of equal ids collapsed to one (paper III-B, as GSLM)."""
    z_T = np.asarray(z_T)
    begins = np.ones(len(z_T), bool)
    begins[1:] = z_T[1:] != z_T[:-1]
    return z_T[begins]


@dataclass(frozen=True)
class Stage:
    name: str  # semantic, coarse or fine
    k: int  # semantic vocabulary
    vocab: int  # codes of an acoustic level
    levels: tuple[int, int]  # target levels [from, to); (0, 0) in stage 1
    n_coarse: int  # Q'
    dedupe: bool
    crop_s: float
    min_crop_s: float = 0.0  # training rows are cut on into crops of at least this; 0: only where a row or clip ends

    @property
    def needs_semantic(self) -> bool:
        return self.name != "fine"

    @property
    def needs_acoustic(self) -> bool:
        return self.name != "semantic"

    @property
    def columns(self) -> tuple[int, ...]:
        """The acoustic levels that `pack` wants, in order."""
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
    def slots(self) -> int:
        """Targets a frame."""
        return max(1, self.levels[1] - self.levels[0])

    @property
    def crop_frames(self) -> int:
        """Semantic frames of the crop."""
        return int(self.crop_s * SEMANTIC_HZ + 1e-6)

    @property
    def min_crop_frames(self) -> int:
        """Semantic frames of the shortest crop that a row is cut into; 0: it is not."""
        return min(self.crop_frames, int(self.min_crop_s * SEMANTIC_HZ + 1e-6))

    @property
    def special(self) -> int:
        """BOS, SEP and EOS of a packed crop."""
        return 3 if self.name == "coarse" else 2

    @property
    def frame_ids(self) -> int:
        """Acoustic ids of a semantic frame."""
        return FRAMES * len(self.columns)

    @property
    def max_len(self) -> int:
        """Ids of the longest packed crop, and of a packed row."""
        return (int(self.needs_semantic) + self.frame_ids) * self.crop_frames + self.special

    def prompt(self, z_T: np.ndarray | None = None, coarse_TQ: np.ndarray | None = None) -> np.ndarray:
        """The ids before the first target: BOS; BOS z... SEP; BOS coarse SEP."""
        if self.name == "semantic":
            return np.array([self.bos], np.int64)
        body = self.semantic_ids(z_T) if self.needs_semantic else self._flat(coarse_TQ, 0, self.n_coarse)
        return np.concatenate([[self.bos], body, [self.sep]]).astype(np.int64)

    def targets(self, codes: np.ndarray) -> np.ndarray:
        """Target ids, no EOS, of z_T (stage 1) or of the target levels' codes_TQ (columns levels[0] to levels[1])."""
        return self.semantic_ids(codes) if self.name == "semantic" else self._flat(codes, *self.levels)

    def semantic_ids(self, z_T: np.ndarray) -> np.ndarray:
        """z_T checked and, where the stage says so, deduplicated."""
        z_T = np.asarray(z_T, np.int64)
        if z_T.ndim != 1 or (len(z_T) and not 0 <= z_T.min() <= z_T.max() < self.k):
            raise ValueError(f"{self.name}: z_T must be (T,) with ids in [0, {self.k}), got shape {z_T.shape}; "
                             "are the token store and the stage of one tokenizer?")
        return dedupe(z_T) if self.dedupe else z_T

    def _flat(self, codes_TQ: np.ndarray, first: int, last: int) -> np.ndarray:
        codes_TQ = np.asarray(codes_TQ, np.int64)
        if codes_TQ.ndim != 2 or codes_TQ.shape[1] != last - first:
            raise ValueError(f"{self.name}: codes must be (T, {last - first}), levels {first} to {last - 1}, "
                             f"got {codes_TQ.shape}")
        if codes_TQ.size and not 0 <= codes_TQ.min() <= codes_TQ.max() < self.vocab:
            raise ValueError(f"{self.name}: codes must lie in [0, {self.vocab}), got {codes_TQ.min()} to "
                             f"{codes_TQ.max()}; are the token store and the stage of one codec?")
        return (codes_TQ + self.offset + self.vocab * np.arange(first, last)).reshape(-1)

    def pack(self, z_T: np.ndarray | None, codes_TQ: np.ndarray | None, at_end: bool) -> tuple[np.ndarray, np.ndarray]:
        """(ids, target_mask) of one crop: z_T its semantic ids, codes_TQ its codes of all `columns`; None if unused.

        `at_end`: the crop reaches the clip's end (stage 1's EOS). target_mask[t] is True where ids[t] carries loss.
        Raises ValueError for shapes or ids that do not belong to the stage.
        """
        if self.name == "semantic":
            targets, end = self.targets(z_T), at_end
        else:
            codes_TQ = np.asarray(codes_TQ)
            if codes_TQ.ndim != 2 or codes_TQ.shape[1] != len(self.columns):
                raise ValueError(f"{self.name}: codes_TQ must have {len(self.columns)} columns, got {codes_TQ.shape}")
            if self.needs_semantic and len(codes_TQ) != FRAMES * len(z_T):
                raise ValueError(f"coarse: {len(codes_TQ)} acoustic frames do not match {len(z_T)} semantic ones "
                                 f"(x {FRAMES}): are both stores of one manifest?")
            targets, end = self.targets(codes_TQ[:, self.levels[0]:]), self.name == "coarse"
        prefix = self.prompt(z_T, None if codes_TQ is None else np.asarray(codes_TQ)[:, :self.n_coarse])
        ids = np.concatenate([prefix, targets, [self.eos] if end else []]).astype(np.int64)
        return ids, np.arange(len(ids)) >= len(prefix)

    def split(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A packed row as (prompt ids up to and with BOS or SEP, target ids without EOS)."""
        ids = np.asarray(ids, np.int64)
        head = 1 if self.name == "semantic" else int(np.flatnonzero(ids == self.sep)[0]) + 1
        return ids[:head], ids[head:len(ids) - (ids[-1] == self.eos)]

    def unpack(self, targets: np.ndarray) -> np.ndarray:
        """Target ids (a final EOS is dropped) back to z (stage 1) or to the target levels' codes_TQ.

        Raises ValueError where an id does not belong in its slot: special ids never reach the codec.
        """
        targets = np.asarray(targets, np.int64)
        targets = targets[:-1] if len(targets) and targets[-1] == self.eos else targets
        if self.name == "semantic":
            if len(targets) and not 0 <= targets.min() <= targets.max() < self.k:
                raise ValueError(f"semantic: ids outside [0, {self.k}) among the targets")
            return targets
        if len(targets) % self.slots:
            raise ValueError(f"{self.name}: {len(targets)} targets are not whole frames of {self.slots}")
        codes_TQ = targets.reshape(-1, self.slots) - self.offset - self.vocab * np.arange(*self.levels)
        if codes_TQ.size and not 0 <= codes_TQ.min() <= codes_TQ.max() < self.vocab:
            raise ValueError(f"{self.name}: an id stands in another level's slot")
        return codes_TQ

    def slot_ids(self) -> list[np.ndarray]:
        """The ids each slot of a frame may take, in the order of its output head; EOS, where it may stand, comes last."""
        if self.name == "semantic":
            codes = [np.arange(self.k)]
        else:
            codes = [self.offset + level * self.vocab + np.arange(self.vocab) for level in range(*self.levels)]
        if self.name != "fine":
            codes[0] = np.append(codes[0], self.eos)
        return codes

    def slot_masks(self) -> np.ndarray:
        """mask_SV: the codes legal in each slot of a frame, without EOS."""
        mask_SV = np.zeros((self.slots, self.vocab_size), bool)
        for slot, ids in enumerate(self.slot_ids()):
            mask_SV[slot, ids[ids < self.bos]] = True
        return mask_SV

    @property
    def target_share(self) -> float:
        """The most of any row's ids that are targets of one slot: what `pack` makes is never denser."""
        if self.name == "semantic":
            return 1.0
        if self.name == "fine":
            return 1 / len(self.columns)
        # the first slot's in a crop of n semantic frames, all deduplicated into one: (2 n + 1) / (4 + 2 n slots)
        return max(1 / self.slots, 3 / (4 + 2 * self.slots))

    def eos_legal(self, n_target: int | np.ndarray) -> bool | np.ndarray:
        """EOS may follow `n_target` targets: after whole frames, at least one; never in stage 3."""
        return (n_target > 0) & (n_target % self.slots == 0) & (self.name != "fine")

    def allowed(self, n_target: int, previous_id: int | None = None) -> np.ndarray:
        """mask_V of the ids legal as target `n_target`; `previous_id` is the id before it."""
        mask_V = self.slot_masks()[n_target % self.slots]
        mask_V[self.eos] = self.eos_legal(n_target)
        if self.no_repeat and previous_id is not None:
            mask_V[previous_id] = False
        return mask_V

    @property
    def no_repeat(self) -> bool:
        """Deduplicated semantic ids never repeat at once."""
        return self.name == "semantic" and self.dedupe

    def level_table(self) -> np.ndarray:
        """levels_V: acoustic level from 0, or -1 semantic, of every id.

        EOS counts where it is predicted: -1 in stage 1, the first target level in stage 2. BOS and SEP: NO_LEVEL.
        """
        table = np.full(self.vocab_size, NO_LEVEL, np.int64)
        table[:self.offset] = -1
        table[self.offset:self.bos] = np.repeat(np.array(self.columns, np.int64), self.vocab)
        table[self.eos] = -1 if self.name == "semantic" else self.levels[0]
        return table

    def level_of(self, ids: np.ndarray) -> np.ndarray:
        """The level of each id, see `level_table`; any shape."""
        return self.level_table()[ids]

    def to_json(self) -> dict:
        return {**asdict(self), "levels": list(self.levels)}


def stage_from_json(data: dict) -> Stage:
    return Stage(**{**data, "levels": tuple(data["levels"])})


def build_stages(config: LMConfig, codec_n_q: int, codec_vocab: int, k: int) -> dict[str, Stage]:
    """The run's stages by step name; no lm_fine where Q' = Q (piano). Raises ValueError where Q' > Q."""
    coarse = config.coarse_levels
    if coarse > codec_n_q:
        raise ValueError(f"lm.coarse_levels ({coarse}) exceeds codec.n_q ({codec_n_q}): lower it or raise codec.n_q")
    levels = {"semantic": (0, 0), "coarse": (0, coarse), "fine": (coarse, codec_n_q)}
    stages = {}
    for name, span in levels.items():
        if name != "fine" or coarse < codec_n_q:
            shape = getattr(config, name)
            least = FINE_MIN_S if shape.min_crop_s is None and name == "fine" else shape.min_crop_s or 0.0
            stages[f"lm_{name}"] = Stage(name, k, codec_vocab, span, coarse, config.dedupe, shape.crop_s, least)
    return stages
