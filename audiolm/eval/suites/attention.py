"""What stage 2 listens to: how its attention falls on the semantic prefix while it speaks, and whether it follows it.

A stage that uses its prefix looks at the token that it is speaking: the pictures show a diagonal, and much of the attention
lies within `NEAR_S` of the frame that is predicted.  Taken from the weights, with the clips' own codes (teacher forcing), mean
over heads.  Legend: N targets (acoustic codes, frame by frame), S semantic tokens as the stage takes them, L layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from audiolm import store
from audiolm.data.clips import Clip
from audiolm.data.tokens import RATIO, run_starts
from audiolm.eval.ladder import slug
from audiolm.eval.results import Progress, Result, bootstrap_interval, no_progress
from audiolm.eval.suites.base import ladder_clips, load_audiolm
from audiolm.generate.audiolm import AudioLM
from audiolm.lm.stages import SEMANTIC_HZ, Stage
from audiolm.models.attention_maps import attention_maps
from audiolm.models.transformer import Transformer
from audiolm.render import plots

if TYPE_CHECKING:
    from audiolm.eval.suites.base import SuiteContext

NEAR_S = 0.2
TABLE = "stage 2's attention"


def attention_results(lm: AudioLM, clips: Sequence[tuple[Clip, np.ndarray]], folder: str, seed: int = 0,
              progress: Progress = no_progress) -> tuple[list[Result], list[str]]:
    """Rows of the share of the attention to the prefix that lies near what is spoken, over all layers and of each; beside it
    even attention, and how much of all attention the prefix has. Leaves and names a picture a clip, {folder}/attention/.

    `clips` as eval.ladder.held_out gives them, within the coarse stage's crop.
    """
    began, files, near, even, prefix = time.monotonic(), [], [], [], []
    model, stage = lm.models["coarse"]
    wavs = [wav for _, wav in clips]
    parts = zip(clips, lm.tokenize(wavs), lm.encode(wavs), strict=True)
    for n, ((clip, _), z_T, codes_TQ) in enumerate(parts, 1):
        share_LNS = prefix_attention(model, stage, z_T, codes_TQ[:, :stage.levels[1]], lm.device)
        near_NS = near_prefix(stage, z_T, stage.slots * len(codes_TQ))
        near.append((share_LNS * near_NS).sum((1, 2)) / share_LNS.sum((1, 2)))
        even.append(near_NS.mean())
        prefix.append(share_LNS.sum(2).mean(1))
        files.append(f"attention/{n}-{slug(clip.id)}.png")
        of_frame_LFS = share_LNS.reshape(len(share_LNS), -1, stage.slots, share_LNS.shape[2]).mean(2)
        store.put(store.join(folder, files[-1]), plots.attention(of_frame_LFS, spans_of(stage, z_T),
                                                                 f"Stage 2 over its semantic prefix, {clip.id}"))
        progress(n, len(clips), "clips")
    names, near_CL, prefix_CL = [clip.id for clip, _ in clips], np.array(near), np.array(prefix)
    metric = f"attention to the prefix within {NEAR_S:g} s of what is spoken, %"
    figures = [("all layers", metric, near_CL.mean(1), "ours"), ("even attention", metric, np.array(even), "floor"),
               ("all layers", "attention to the prefix, of all, %", prefix_CL.mean(1), "ours")]
    figures += [(f"layer {i + 1}", metric, near_CL[:, i], "ours") for i in range(near_CL.shape[1])]
    took = time.monotonic() - began
    return [Result(TABLE, item, metric, *bootstrap_interval(100 * values, names, seed), len(names), "clips", role, seconds=took)
            for item, metric, values, role in figures], files


def prefix_attention(model: Transformer, stage: Stage, z_T: np.ndarray, codes_TQ: np.ndarray,
                     device: str = "cpu") -> np.ndarray:
    """share_LNS of the attention with which each coarse code of a clip is predicted; what is missing to 1 lies on BOS, SEP and
    the codes before. Raises ValueError for codes that are not the stage's."""
    prompt, targets = stage.prompt(z_T), stage.targets(codes_TQ)  # BOS z... SEP, which predicts the first code
    ids_T = torch.from_numpy(np.concatenate([prompt, targets])[:-1]).to(device)
    return np.stack([share_TT[len(prompt) - 1:, 1:len(prompt) - 1].cpu().numpy() for share_TT, _ in attention_maps(model, ids_T)])


def spans_of(stage: Stage, z_T: np.ndarray) -> np.ndarray:
    """spans_S2: from when to when, in seconds, each token of the prefix is spoken."""
    starts = np.flatnonzero(run_starts(z_T)) if stage.dedupe else np.arange(len(z_T))
    return np.stack([starts, np.append(starts[1:], len(z_T))], 1) / SEMANTIC_HZ


def near_prefix(stage: Stage, z_T: np.ndarray, targets: int) -> np.ndarray:
    """near_NS: whether a token is spoken within NEAR_S of the middle of the frame whose code is predicted."""
    spans_S2 = spans_of(stage, z_T)
    middle_N1 = (np.arange(targets)[:, None] // stage.slots + 0.5) / (RATIO * SEMANTIC_HZ)
    return (spans_S2[:, 0] < middle_N1 + NEAR_S) & (spans_S2[:, 1] > middle_N1 - NEAR_S)


def attention_suite(ask: SuiteContext) -> list[Result]:
    """Where stage 2 looks among the semantic tokens."""

    lm, clips = load_audiolm(ask), ladder_clips(ask)
    rows, pictures = attention_results(lm, clips, ask.folder, ask.config.run.seed, ask.out.progress)
    store.put_json(store.join(ask.folder, "sounds.json"), [
        {"group": "Stage 2's attention over the semantic tokens", "title": name.rsplit("/", 1)[-1].removesuffix(".png"),
         "file": name, "prompt_s": None} for name in pictures])
    return rows
