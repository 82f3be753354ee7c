"""A masked model by its validation, and its features by ABX and by the phones that clusters of them tell apart.

ABX is of the layer that k-means clusters, of every layer where that is `auto`, on held-out speakers of the item file
(`semantic.abx`).  PNMI (HuBERT, 2106.07447) is of clusters that are fitted on those speakers' own files, so it compares
checkpoints of one model with each other, and not with a tokenizer's, which is fitted on training audio.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from audiolm import rng, store
from audiolm.eval.metrics import abx
from audiolm.eval.metrics import token_statistics as ts
from audiolm.eval.results import Result, not_measured
from audiolm.eval.steps.layers import AbxTask, frames_of, held_out_items, layers_of, score_layer, score_mfcc, zscored
from audiolm.eval.steps.semantic import frame_phones, read_phones
from audiolm.eval.suites.base import SuiteContext
from audiolm.models import kmeans
from audiolm.tokenizers.extractor import window_of
from audiolm.tokenizers.semantic import load_extractor

NAME = "masked model"
CLUSTERS = 100  # where kmeans.k is auto
ITERATIONS = 30
# What the two objectives validate: (its key in final.json, metric, factor).
VALIDATION = (("loss", "loss, nats a masked frame", 1.0), ("accuracy", "right on masked frames, %", 100.0),
              ("prediction_perplexity", "perplexity of what it predicts", 1.0))


def masked_suite(context: SuiteContext) -> list[Result]:
    """Rows of validation, ABX and PNMI; the last two need the run's item file and alignment."""
    cfg, model = context.config, context.steps["masked_model"]
    rows, semantic = validation_rows(store.get_json(store.join(model, "final.json")) or {}), cfg.semantic
    if semantic.abx is None:
        why = "no triphones: name a ZeroSpeech item file, semantic.abx={items: FILE, audio: [FOLDER], phones: FILE}"
        return [*rows, not_measured(NAME, "features", "ABX error %", why)]
    speakers, paths = held_out_items(semantic.abx, context.steps["manifest"], semantic.where)
    window = window_of(semantic.kmeans.window_s, semantic.kmeans.overlap_s)
    task = AbxTask(model, semantic.abx.items, paths, speakers, window, context.seed, context.device)
    numbers = layers_of(semantic.sweep, semantic.kmeans.layer, load_extractor(model).layers)
    floor, *scored = context.map(_part, [(score_mfcc, task), *((score_layer, task, n) for n in numbers)], "layers")
    of = len(abx.read_items(task.items).of(speakers).file)
    for row, role in ((floor, "baseline"), *((row, "ours") for row in scored)):
        item = "MFCC" if row["layer"] is None else f"layer {row['layer']}"
        rows += [Result(NAME, item, f"ABX {mode} %", row[mode], *row[f"interval_{mode}"], n=of, of="triphones", role=role)
                 for mode in abx.MODES]
    if semantic.abx.phones is None:
        why = "no alignment: name it by semantic.abx.phones=FILE, lines of `file onset offset phone`"
        return [*rows, not_measured(NAME, "features", "PNMI", why)]
    best = min(scored, key=lambda row: row["within"] + row["across"])["layer"]
    k = CLUSTERS if semantic.kmeans.k == "auto" else semantic.kmeans.k
    phones, = context.map(score_phones, [(task, semantic.abx.phones, best, k)], "layers")
    item = f"layer {best}, {k} clusters"
    return [*rows, Result(NAME, item, "PNMI", phones["pnmi"], n=phones["frames"], of="frames"),
            Result(NAME, f"{item}, shuffled", "PNMI", phones["shuffled"], n=phones["frames"], of="frames", role="floor"),
            Result(NAME, item, "phone purity", phones["phone_purity"], n=phones["frames"], of="frames")]


def _part(task: Any, *arguments: Any) -> Any:
    return task(*arguments)


def validation_rows(final: Mapping[str, Any]) -> list[Result]:
    """What the checkpoint's own validation said, beside guessing each target by its frequency."""
    if "val.loss" not in final:
        return [not_measured(NAME, "validation", VALIDATION[0][1], "the training has not validated this checkpoint: "
                             "semantic.model.train.eval_every says how often; an imported model has no validation")]
    item = f"validation at step {final['exported_step']}"
    rows = [Result(NAME, item, metric, final[f"val.{key}"] * factor, of="frames")
            for key, metric, factor in VALIDATION if f"val.{key}" in final]
    if "val.target_entropy" in final:
        rows.append(Result(NAME, f"{item}: by frequency", VALIDATION[0][1], final["val.target_entropy"], of="frames",
                           role="floor"))
    return rows


def score_phones(task: AbxTask, alignment: str, layer: int, k: int) -> dict[str, Any]:
    """One task: token_statistics.phone_figures of k clusters of a layer, "frames", and "shuffled": PNMI of clusters that are
    drawn without regard to the sound. Raises ValueError where the alignment names no file or there are too few frames."""
    spoken = read_phones(alignment, sorted(task.paths))
    if not spoken:
        raise ValueError(f"semantic.abx.phones {alignment} names none of the item file's {len(task.paths)} files: give the "
                         "alignment that belongs to it")
    features = zscored(frames_of({f: task.paths[f] for f in spoken}, load_extractor(task.model, task.device), layer,
                                 task.window))
    x_ND = torch.from_numpy(np.concatenate(list(features.values()))).to(task.device)
    try:
        centroids_KD = kmeans.fit([x_ND], k, rng.derive(task.seed, "phones", layer, k), ITERATIONS).centroids
    except ValueError as e:
        raise ValueError(f"semantic.kmeans.k={k} clusters of {len(x_ND)} frames: {e}") from e
    codes_N = kmeans.assign(x_ND, centroids_KD).cpu().numpy()
    number_of = {p: i for i, p in enumerate(sorted({p for _, _, phones in spoken.values() for p in phones}))}
    numbers, tokens, start = [], [], 0
    for file, frames_TD in features.items():
        onset, offset, phones = spoken[file]
        at_T, inside_T = frame_phones(onset, offset, len(frames_TD))
        numbers.append(np.array([number_of[p] for p in phones])[at_T[inside_T]])
        tokens.append(codes_N[start:start + len(frames_TD)][inside_T])
        start += len(frames_TD)
    phone_M, token_M = np.concatenate(numbers), np.concatenate(tokens)
    shuffled_M = rng.generator(task.seed, "shuffled phones").permutation(token_M)
    return {**ts.phone_figures(_counts(phone_M, token_M, k)), "frames": len(token_M),
            "shuffled": ts.phone_figures(_counts(phone_M, shuffled_M, k))["pnmi"]}


def _counts(phone_M: np.ndarray, token_M: np.ndarray, k: int) -> np.ndarray:
    """frames_PK by phone and cluster."""
    counts_PK = np.zeros((phone_M.max() + 1, k), np.int64)
    np.add.at(counts_PK, (phone_M, token_M), 1)
    return counts_PK
