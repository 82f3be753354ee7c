"""A tokenized corpus with a known law: a manifest and both token stores, without audio or tokenizers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from audiolm import store
from audiolm.data import tokens
from audiolm.data.clips import Clip, Part, clips_parquet
from audiolm.lm.stages import Stage

K, VOCAB, N_Q = 12, 16, 3
STAY = 0.75  # chance that the law holds


@dataclass(frozen=True)
class TokenCorpus:
    paths: dict[str, str]  # manifest, semantic_tokens, acoustic_tokens
    clips: list[Clip]
    z: dict[str, np.ndarray]
    codes: dict[str, np.ndarray]


def make(folder, frames: dict[str, list[int]], per_shard: int = 3, seed: int = 0, sources=("a",),
         runs: bool = False) -> TokenCorpus:
    """Clips of the given semantic frames by split. z is a chain z + 5 (else uniform), with `runs` of 1.5 frames or so; both
    frames of level 1 copy z (else uniform), level 2 repeats itself (else uniform), level 3 is level 1 plus 1 (else uniform)."""
    folder, draw = str(folder), np.random.default_rng(seed)
    clips, z, codes, shard = [], {}, {}, 0
    for split, lengths in frames.items():
        for i, n in enumerate(lengths):
            if i and i % per_shard == 0:
                shard += 1
            name = f"{split}-{i}"
            size = n * 640 - int(draw.integers(0, 640))  # a clip need not end on a frame
            source = sources[i % len(sources)]
            clips.append(Clip(name, source, source, f"s-{split}-{i}", split, 16_000, size,
                              (Part(name, name, 0, size, 0, None),), shard, i % per_shard))
            z[name], codes[name] = _law(n, draw, runs)
        shard += 1
    paths = {n: store.join(folder, n) for n in ("manifest", "semantic_tokens", "acoustic_tokens")}
    store.put(store.join(paths["manifest"], "clips.parquet"), clips_parquet(clips))
    for which, hop, n_q, vocab, data in (("semantic", 640, 1, K, {n: v[:, None] for n, v in z.items()}),
                                         ("acoustic", 320, N_Q, VOCAB, codes)):
        meta = {"which": which, "spec": {"name": which, "sample_rate": 16_000, "hop": hop, "n_q": n_q, "vocab": vocab},
                "hash": "h", "manifest": "m.0001", "shards": shard, "device": "cpu", "dtype": "float32", "versions": {}}
        for k in range(shard):
            ids = [c.id for c in clips if c.shard == k]
            data_k = tokens.shard_bytes(ids, [data[i] for i in ids], meta, k, dedup=which == "semantic")
            store.put(store.join(paths[f"{which}_tokens"], tokens.shard_name(k)), data_k)
        tokens.index_shards(paths[f"{which}_tokens"])
    return TokenCorpus(paths, clips, z, codes)


def retokenized(paths: dict[str, str], folder, k: int, ids, prefix: str = "") -> dict[str, str]:
    """A corpus' paths with `ids(z_T)` of a vocabulary k as its semantic ids; `prefix` goes before clips' names."""
    for n in range(len(tokens.listing(paths["semantic_tokens"]))):
        path = store.join(paths["semantic_tokens"], tokens.shard_name(n))
        meta, columns = tokens.read_meta(path), tokens.read_shard(path, ["id", "q00"])
        codes = [ids(columns["q00"][i].astype(np.int64))[:, None] for i in range(len(columns["id"]))]
        meta = {**meta, "hash": f"other {k}", "spec": {**meta["spec"], "vocab": k}}
        names = [prefix + i for i in columns["id"]]
        store.put(str(folder / "tokens" / tokens.shard_name(n)), tokens.shard_bytes(names, codes, meta, n, dedup=True))
    tokens.index_shards(str(folder / "tokens"))
    return {**paths, "semantic_tokens": str(folder / "tokens")}


def _law(n: int, draw: np.random.Generator, runs: bool) -> tuple[np.ndarray, np.ndarray]:
    z = np.zeros(n, np.int64)
    for t in range(n):
        z[t] = (z[t - 1] + 5) % K if t and draw.random() < STAY else draw.integers(K)
    if runs:
        z = z[np.sort(draw.integers(0, n, n))]
    codes = draw.integers(0, VOCAB, (2 * n, N_Q))
    kept = draw.random((2 * n, N_Q)) < STAY
    codes[:, 0] = np.where(kept[:, 0], np.repeat(z, 2), codes[:, 0])
    for t in range(1, 2 * n):
        codes[t, 1] = codes[t - 1, 1] if kept[t, 1] else codes[t, 1]
    codes[:, 2] = np.where(kept[:, 2], (codes[:, 0] + 1) % VOCAB, codes[:, 2])
    return z, codes


def legal_ids(stage: Stage, n_target: int, previous_id: int | None = None) -> np.ndarray:
    """mask_V of the ids that `stage` allows as target `n_target`, after the id `previous_id`."""
    mask_V = np.zeros(stage.vocab_size, bool)
    mask_V[stage.slot_ids()[n_target % stage.slots]] = True
    mask_V[stage.eos] = stage.eos_legal(n_target)
    if stage.no_repeat and previous_id is not None:
        mask_V[previous_id] = False
    return mask_V


NO_LEVEL = -2  # of BOS and SEP in level_table


def level_table(stage: Stage) -> np.ndarray:
    """levels_V: each id's acoustic level from 0, or -1 for semantic ids; BOS, SEP and an EOS that is not used have NO_LEVEL.

    EOS has the level of the slot that predicts it.
    """
    table = np.full(stage.vocab_size, NO_LEVEL, np.int64)
    table[:stage.offset] = -1
    table[stage.offset:stage.bos] = np.repeat(np.array(stage.columns, np.int64), stage.vocab)
    if stage.ends:
        table[stage.eos] = -1 if stage.name == "semantic" else stage.levels[0]
    return table
