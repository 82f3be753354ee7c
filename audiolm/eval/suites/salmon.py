"""SALMon (2409.07437): does a system prefer a recording whose speaker, gender, background, room or sentiment stays, or whose
background or sentiment fits its words, to one where it does not?

A set is SALMon's folder of wavs, SET/PART/sample_I_0.wav (right) and sample_I_1.wav (wrong).  A pair scores 1 where the right
recording has the higher log-likelihood and 0.5 on ties; a part's accuracy is the mean over its pairs.  Three log-likelihoods:
stage 1's of the semantic tokens, as in the suite `likelihood`; the acoustic stages' of the codes, given the semantic tokens;
and the whole system's, their sum with stage 1's run lengths.  Each is a mean per token, as in SALMon's published baselines,
or a sum.  Baseline: the shorter recording.
Legend: F recordings, T frames at 50 Hz; tokens_TC: a column of semantic ids, each twice, then one of codes a level.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from audiolm import store
from audiolm.dag.run_index import missing_of
from audiolm.data.tokens import RATIO, tokenizer_dtype
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.results import Progress, Result, no_progress, not_measured
from audiolm.eval.suites.base import SuiteContext
from audiolm.eval.suites.zerospeech import HOW, by_sequence, encode_recordings, wins_of
from audiolm.lm.loss import inputs_of, prepare
from audiolm.lm.model import Model, load_lm
from audiolm.lm.pack_rows import pack_rows
from audiolm.lm.parallel import whole_level_sums
from audiolm.lm.stages import Packed, Stage
from audiolm.models.lm.heads import NO_TARGET
from audiolm.tokenizers.acoustic import load_codec
from audiolm.tokenizers.base import Codec, Tokenizer
from audiolm.tokenizers.semantic import load_semantic

# SALMon's eight parts. Other folders of a set are measured too.
PARTS = ("sentiment_consistency", "speaker_consistency", "gender_consistency", "bg_domain_consistency", "bg_all_consistency",
         "rir_consistency", "sentiment_alignment", "bg_alignment")
TABLE, STAGE_1, ACOUSTIC, WHOLE = "SALMon", "stage 1", "acoustic stages", "whole system"
ROWS = 8  # of a forward pass
Files = dict[str, list[str]]  # of each part: right, wrong, right, ...
Stages = Mapping[str, tuple[Model, Stage]]  # by the stage's name


def read_set(place: str) -> Files:
    """Paths of a set's recordings by part, its pairs by number. Raises ValueError for a folder without parts, for wavs of other
    names and for numbers that have not two recordings."""
    numbered: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(store.files(place)):
        part, _, name = path.partition("/")
        if "/" in name or not name.endswith(".wav"):
            continue
        if len(fields := name.removesuffix(".wav").split("_")) < 2 or not fields[1].isdigit():
            raise ValueError(f"{store.join(place, path)}: SALMon's wavs are called sample_I_0.wav and sample_I_1.wav; rename "
                             "it, or keep it elsewhere")
        numbered[part][int(fields[1])].append(store.join(place, path))
    found = {}
    for part, pairs in numbered.items():
        for number, paths in pairs.items():
            if len(paths) != 2:
                raise ValueError(f"{', '.join(paths)}: the pair {number} of {part} needs a right and a wrong recording, "
                                 f"sample_{number}_0.wav and sample_{number}_1.wav")
        found[part] = [path for _, paths in sorted(pairs.items()) for path in paths]
    if not found:
        raise ValueError(f"{place} holds no folder with sample_0_0.wav and sample_0_1.wav: name the folder that holds "
                         f"{PARTS[1]} and the like, of SALMon's wavs or as `evaluate.py salmon --make` writes them")
    return {part: found[part] for part in (*PARTS, *found) if part in found}


def measure_salmon(sets: Mapping[str, str], steps: Mapping[str, str], seed: int = 0, device: str = "cpu",
                   progress: Progress = no_progress) -> list[Result]:
    """Rows of each part of each set, {name: folder}.

    `steps`: the folders of kmeans, semantic_tokens, lm_semantic and, for the whole system, codec and its acoustic stages.
    Raises as `read_set`; ValueError where stages and tokenizers do not belong together.
    """
    files = {name: read_set(place) for name, place in sets.items()}  # errors before any computing
    missing = missing_of(("codec", "lm_coarse"), steps)
    tokenizer = load_semantic(steps["kmeans"], device, tokenizer_dtype(steps["semantic_tokens"]))
    codec = None if missing else load_codec(steps["codec"], device)
    names = ("lm_semantic", *(() if missing else ("lm_coarse", "lm_fine", "lm_parallel")))
    stages = {stage.name: (model, stage) for model, stage in (load_lm(steps[n], device) for n in names if n in steps)}
    check_stages(stages, tokenizer, codec)
    rows = []
    for name, parts in files.items():
        for part, paths in parts.items():
            began = time.monotonic()
            tokens, samples_F = encode_both(paths, tokenizer, codec, progress)
            rows += part_rows(f"{name}, {part} %", likelihoods(stages, tokens, device), samples_F, seed,
                              began, too_long(stages, tokens))
    if missing:
        rows.append(not_measured(TABLE, WHOLE, "accuracy %", f"the run has not finished {', '.join(missing)} yet"))
    return rows


def check_stages(stages: Stages, tokenizer: Tokenizer, codec: Codec | None) -> None:
    """Raises ValueError for stages that are missing, or that other tokenizers' tokens belong to."""
    _, stage = stages.get("semantic", (None, None))
    if stage is None or stage.k != tokenizer.spec.vocab:
        raise ValueError(f"SALMon needs the semantic stage of the tokenizer's {tokenizer.spec.vocab} tokens, got "
                         f"{'another stage' if stage is None else stage.k}: take lm_semantic and kmeans of one run")
    if codec is None:
        return
    acoustic = [stage for _, stage in stages.values() if stage.needs_acoustic]
    levels, vocab = max(s.levels[1] for s in acoustic), {s.vocab for s in acoustic}
    if levels != codec.spec.n_q or vocab != {codec.spec.vocab}:
        raise ValueError(f"the acoustic stages predict {levels} levels of {', '.join(map(str, vocab))} codes, the codec has "
                         f"{codec.spec.n_q} of {codec.spec.vocab}: take the codec and all stages of one run, lm_fine too")


def encode_both(files: Sequence[str], tokenizer: Tokenizer, codec: Codec | None = None,
                progress: Progress = no_progress) -> tuple[list[np.ndarray], np.ndarray]:
    """(tokens_TC of each file, samples_F at 16 kHz); without a codec there are no columns of codes."""
    codes, samples_F = encode_recordings(files, [side for side in (tokenizer, codec) if side], progress)
    return [torch.cat([z_TQ[:, :1].repeat_interleave(RATIO, 0), *codes_TQ], 1).numpy()
            for z_TQ, *codes_TQ in codes], samples_F


def likelihoods(stages: Stages, tokens: Sequence[np.ndarray], device: str = "cpu") -> dict[str, np.ndarray]:
    """scores_F2, log-likelihoods in nats and numbers of tokens, of each scorer. Equal tokens have equal scores."""
    model, stage = stages["semantic"]
    z = [tokens_TC[::RATIO, 0] for tokens_TC in tokens]
    ids = z if stage.lengths else [stage.targets(z_T) for z_T in z]  # as the stage reads them
    semantic_F3 = by_sequence(ids, lambda some: packed_scores(
        model, stage, [[stage.pack(row, None, False)] for row in some], device))
    scores = {STAGE_1: semantic_F3[:, ::2]}
    if len(stages) > 1:
        acoustic_F3 = sum(by_sequence(tokens, lambda some, of=of: acoustic_scores(*of, some, device))
                          for name, of in stages.items() if name != "semantic")
        scores[ACOUSTIC] = acoustic_F3[:, ::2]
        whole_F3 = acoustic_F3 + semantic_F3 * stages.get("coarse", stages.get("parallel"))[1].conditioned
        scores[WHOLE] = np.stack([whole_F3[:, :2].sum(1), whole_F3[:, 2]], 1)
    return scores


def acoustic_scores(model: Model, stage: Stage, tokens: Sequence[np.ndarray], device: str = "cpu") -> np.ndarray:
    """`packed_scores` of the codes of recordings under one acoustic stage, given its prefix.

    The fine stage reads pieces of its own crop, as in generation; the parallel decoder predicts each level as a whole, given
    those below.
    """
    pairs = [(tokens_TC[::RATIO, 0], tokens_TC[:, 1:1 + len(stage.columns)]) for tokens_TC in tokens]
    if stage.name == "parallel":
        sums = [whole_level_sums(model, stage, [pair], device).sum(1).tolist() for pair in pairs]
        return np.array([(-nats, 0.0, number) for nats, number in sums])
    step = stage.crop_frames if stage.name == "fine" else max(len(z_T) for z_T, _ in pairs)
    return packed_scores(model, stage, [
        [stage.pack(z_T[at:at + step], codes_TQ[RATIO * at:RATIO * (at + step)], False, drop=not stage.conditioned)
         for at in range(0, len(z_T), step)] for z_T, codes_TQ in pairs], device)


@torch.no_grad()
def packed_scores(model: Model, stage: Stage, recordings: Sequence[Iterable[Packed]], device: str = "cpu") -> np.ndarray:
    """scores_F3 of recordings in one or several packed pieces: log-likelihoods in nats of the ids and of their run lengths,
    and the number of ids."""
    owner_R, packed = zip(*[(f, piece) for f, pieces in enumerate(recordings) for piece in pieces], strict=True)
    scores_R3, order = np.zeros((len(packed), 3)), sorted(range(len(packed)), key=lambda i: len(packed[i].ids))
    for some in (order[i:i + ROWS] for i in range(0, len(order), ROWS)):
        batch = prepare(stage, pack_rows(stage, [[packed[i]] for i in some]))
        nats_SN = model(*inputs_of({name: x.to(device) for name, x in batch.items()})).double().cpu().numpy()
        row_SN, known_SN = (batch["index_SN"] // batch["ids_BT"].shape[1]).numpy(), (batch["label_SN"] != NO_TARGET).numpy()
        ids, runs = slice(stage.slots), slice(stage.slots, None)
        for column, (part, values_SN) in enumerate(((ids, -nats_SN), (runs, -nats_SN), (ids, np.ones_like(nats_SN)))):
            known = known_SN[part]
            scores_R3[some, column] = np.bincount(row_SN[part][known], values_SN[part][known], len(some))
    scores_F3 = np.zeros((len(recordings), 3))
    np.add.at(scores_F3, np.array(owner_R), scores_R3)
    return scores_F3


def too_long(stages: Stages, tokens: Sequence[np.ndarray]) -> str:
    """The note that recordings exceed the crops that a stage was trained on; the fine stage reads pieces."""
    notes = []
    for _, stage in stages.values():
        long = sum(len(tokens_TC) > RATIO * stage.crop_frames for tokens_TC in tokens)
        if long and stage.name != "fine":
            notes.append(f"{long} of {len(tokens)} recordings exceed the {stage.crop_s:g} s that the {stage.name} stage was "
                         "trained on")
    return "; ".join(notes)


def part_rows(metric: str, scores: Mapping[str, np.ndarray], samples_F: np.ndarray, seed: int, began: float,
              note: str = "") -> list[Result]:
    """Rows of a part, from scores_F2 by scorer of its recordings (right, wrong, right, ...) and their samples."""
    wins = {}
    for scorer, scores_F2 in scores.items():
        wins[f"{scorer}, {HOW['mean']}"] = wins_of(scores_F2[:, 0] / scores_F2[:, 1])
        wins[f"{scorer}, {HOW['sum']}"] = wins_of(scores_F2[:, 0])
    wins["the shorter"] = wins_of(-samples_F)
    seconds, pairs = time.monotonic() - began, len(samples_F) // 2
    rows = []
    for item, wins_P in wins.items():
        ours, ties = item != "the shorter", int((wins_P == 0.5).sum())
        notes = filter(None, (f"{ties} ties" if ties else "", note if ours else ""))
        rows.append(Result(TABLE, item, metric, *bootstrap_interval(100 * wins_P, range(pairs), seed), pairs, "pairs",
                           "ours" if ours else "baseline", seconds=seconds, note="; ".join(notes)))
    return [*rows, Result(TABLE, "chance", metric, 50.0, n=pairs, of="pairs", role="floor")]


def salmon_suite(context: SuiteContext) -> list[Result]:
    """Accuracy on sets of SALMon's layout, where the config names some (tables.salmon)."""
    if not context.config.tables.salmon:
        return [not_measured(TABLE, STAGE_1, "accuracy %", "no pairs: name folders of SALMon's layout, tables.salmon="
                             "{NAME: FOLDER}; `evaluate.py salmon FOLDER --make SPEECH` makes a small set")]
    return measure_salmon(context.config.tables.salmon, context.steps, context.seed, context.device, context.progress)
