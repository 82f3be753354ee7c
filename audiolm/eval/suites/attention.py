"""Attention of stage 2 (coarse acoustic) over its semantic prefix: does it look at the token that it is about to speak?

A stage that uses its prefix does: the pictures show a diagonal, and much of the attention lies within `NEAR_S` of the predicted
frame.  Computed with the clips' own codes (teacher forcing), mean over heads.
Legend: N targets (acoustic codes, frame by frame), S semantic tokens as the stage takes them, L layers, F frames, C clips.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from audiolm import store
from audiolm.data.clips import Clip
from audiolm.data.tokens import RATIO, run_starts
from audiolm.eval.ladder import slug
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.results import Progress, Result, no_progress
from audiolm.eval.suites.base import SuiteContext, ladder_clips, load_audiolm, save_sounds
from audiolm.generate.audiolm import AudioLM
from audiolm.lm.frames import frame_positions
from audiolm.lm.stages import SEMANTIC_HZ, Stage
from audiolm.models.lm.attention_maps import attention_maps
from audiolm.models.lm.transformer import Transformer
from audiolm.render import plots

NEAR_S = 0.2
TABLE = "stage 2's attention"


def attention_results(lm: AudioLM, clips: Sequence[tuple[Clip, np.ndarray]], folder: str, seed: int = 0,
                      progress: Progress = no_progress) -> tuple[list[Result], list[str]]:
    """(rows, pictures): the share of the attention to the prefix near the predicted frame, over all layers and of each.

    Beside it stand even attention, and the prefix's share of all attention. Writes a picture a clip to {folder}/attention/.
    `clips` as eval.ladder.held_out returns them, within the coarse stage's crop.
    """
    began, files, near, even, prefix = time.monotonic(), [], [], [], []
    if "coarse" not in lm.models:
        raise ValueError("the parallel decoder has no prefix to attend to: this table is of lm.acoustic=stages alone")
    model, stage = lm.models["coarse"]
    if not stage.conditioned:
        raise ValueError("lm.ablation took stage 2's prefix away, so there is none to attend to: name a run without it")
    wavs = [wav for _, wav in clips]
    for n, ((clip, _), z_T, codes_TQ) in enumerate(zip(clips, lm.tokenize(wavs), lm.encode(wavs), strict=True), 1):
        share_LNS = prefix_attention(model, stage, z_T, codes_TQ[:, :stage.levels[1]], lm.device)
        near_NS = near_prefix(stage, z_T, stage.slots * len(codes_TQ))
        near.append((share_LNS * near_NS).sum((1, 2)) / share_LNS.sum((1, 2)))
        even.append(near_NS.mean())
        prefix.append(share_LNS.sum(2).mean(1))
        # The picture has a row a frame: the mean over the frame's codes.
        frame_LFS = share_LNS.reshape(len(share_LNS), -1, stage.slots, share_LNS.shape[2]).mean(2)
        picture = plots.attention(frame_LFS, spans_of(stage, z_T), f"Stage 2 over its semantic prefix, {clip.id}")
        files.append(f"attention/{n}-{slug(clip.id)}.png")
        store.put(store.join(folder, files[-1]), picture)
        progress(n, len(clips), "clips")
    names, near_CL, prefix_CL = [clip.id for clip, _ in clips], np.array(near), np.array(prefix)
    metric = f"attention to the prefix within {NEAR_S:g} s of what is spoken, %"
    columns = [("all layers", metric, near_CL.mean(1), "ours"), ("even attention", metric, np.array(even), "floor"),
               ("all layers", "attention to the prefix, of all, %", prefix_CL.mean(1), "ours"),
               *((f"layer {i + 1}", metric, near_CL[:, i], "ours") for i in range(near_CL.shape[1]))]
    seconds = time.monotonic() - began
    return [Result(TABLE, item, metric, *bootstrap_interval(100 * values_C, names, seed), len(names), "clips", role,
                   seconds=seconds) for item, metric, values_C, role in columns], files


def prefix_attention(model: Transformer, stage: Stage, z_T: np.ndarray, codes_TQ: np.ndarray,
                     device: str = "cpu") -> np.ndarray:
    """share_LNS of the attention that predicts each coarse code of a clip; the rest to 1 falls on BOS, SEP and earlier codes.

    Codes of a frame that is one position have its attention. Raises ValueError for codes that are not the stage's."""
    prompt, targets = stage.prompt(z_T), stage.targets(codes_TQ)  # BOS z... SEP, which predicts the first code
    ids_T = np.concatenate([prompt, targets])
    cond_TC = stage.place_conditions(len(ids_T), len(prompt), stage.conditions(z_T))
    if stage.frames:
        model, (ids_T, cond_TC) = model.backbone, frame_positions(stage, ids_T, len(prompt), cond_TC)
    ids_T, cond_TC = (torch.from_numpy(x[:-1]).to(device) for x in (ids_T, cond_TC))
    rows, columns = slice(len(prompt) - 1, None), slice(1, len(prompt) - 1)
    maps = attention_maps(model, ids_T, cond_TC if stage.n_added else None)
    share_LNS = np.stack([share_TT[rows, columns].cpu().numpy() for share_TT, _ in maps])
    return share_LNS.repeat(stage.slots, 1) if stage.frames else share_LNS


def spans_of(stage: Stage, z_T: np.ndarray) -> np.ndarray:
    """spans_S2: start and end, in seconds, of each token of the prefix in the audio."""
    starts = np.flatnonzero(run_starts(z_T)) if stage.dedupe else np.arange(len(z_T))
    return np.stack([starts, np.append(starts[1:], len(z_T))], 1) / SEMANTIC_HZ


def near_prefix(stage: Stage, z_T: np.ndarray, targets: int) -> np.ndarray:
    """near_NS: true where a token's span lies within NEAR_S of the middle of the predicted frame."""
    spans_S2 = spans_of(stage, z_T)
    middle_N1 = (np.arange(targets)[:, None] // stage.slots + 0.5) / (RATIO * SEMANTIC_HZ)
    return (spans_S2[:, 0] < middle_N1 + NEAR_S) & (spans_S2[:, 1] > middle_N1 - NEAR_S)


def attention_suite(context: SuiteContext) -> list[Result]:
    """Attention of stage 2 on the stage ladder's clips, with pictures."""
    rows, pictures = attention_results(load_audiolm(context), ladder_clips(context), context.folder, context.seed,
                                       context.progress)
    save_sounds(context, [("Stage 2's attention over the semantic tokens", file.rsplit("/", 1)[-1].removesuffix(".png"), file,
                           None) for file in pictures])
    return rows
