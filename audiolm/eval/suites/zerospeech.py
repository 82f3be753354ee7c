"""Table IV of the paper (2209.03143): does stage 1 prefer the right word, sentence or story of a spoken pair to the wrong one?

A recording's score is the log-likelihood of its semantic tokens (deduplicated where the stage is) after BOS, without EOS.
ZeroSpeech 2021 leaves its normalisation free: the sum (as its LSTM baseline) and the mean per token (as the paper) are both
reported.  No silence is added to a recording.  Pairs are scored by ZeroSpeech's rules (`rows_of`), stories as others score
TWIST's (2305.13009): the mean per token, 0.5 on ties.  Baselines: Kneser-Ney bigrams of the run's train tokens, phone
trigrams where the set has them, and the shorter recording.  Legend: F recordings, P pairs of one voice, z_T semantic ids.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from audiolm import store
from audiolm.config.corpus import ClipFilter
from audiolm.data.audio import SAMPLE_RATE_HZ, decode, resample
from audiolm.data.tokens import tokenizer_dtype
from audiolm.eval.metrics import likelihood, ngram
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.results import Progress, Result, no_progress, not_measured
from audiolm.eval.suites.base import SuiteContext
from audiolm.eval.suites.probe_sets import BANDS, Pair, ProbeSet, read_probes
from audiolm.lm.batches import TokenBatches
from audiolm.lm.loss import inputs_of, prepare
from audiolm.lm.model import load_lm
from audiolm.lm.pack_rows import pack_rows
from audiolm.lm.stages import Stage
from audiolm.tokenizers.base import Tokenizer
from audiolm.tokenizers.encode import READERS, encode_batch, plan_batches
from audiolm.tokenizers.semantic import SemanticTokenizer, load_semantic

BATCH_S = 60.0  # padded audio of a batch
AT_ONCE = 1024  # recordings in memory
TOKENS = 8192  # of a forward pass, with the padding
# Accuracy in %; the sum for sentences (67.5) is the paper's figure without length normalisation.
PAPER = {("words", "all", "mean"): 71.5, ("words", "in-vocab", "mean"): 83.7, ("sentences", "all", "mean"): 64.7,
         ("sentences", "all", "sum"): 67.5}
HOW = {"mean": "per token", "sum": "sum"}
NAMES = {"sWUGGY": 71.5, "sBLIMP": 64.7, "sSC": None, "tSC": None}  # and the paper's values
TASKS = {"words": "lexical", "sentences": "syntactic"}  # ZeroSpeech's names


def measure_probes(sets: Mapping[str, str], steps: Mapping[str, str], where: ClipFilter | None = None, seed: int = 0,
                   device: str = "cpu", progress: Progress = no_progress) -> list[Result]:
    """Rows of Table IV for each set, {name: folder, or gold.csv}.

    `steps`: the folders of kmeans, semantic_tokens, lm_semantic (or one of its checkpoints), and manifest, whose train
    tokens the bigram counts; without a manifest, as of a published system, the bigram is a row without a value.
    `where`: lm.semantic.where.  Raises as `read_probes`; ValueError where the stage is not the semantic one, or of another
    tokenizer.
    """
    probe_sets, rows = {name: read_probes(place) for name, place in sets.items()}, []  # errors before any computing
    tokenizer, model, stage = _load(steps, device)
    bigram = None
    if "manifest" in steps:
        bigram = bigram_of(TokenBatches(steps["manifest"], steps["semantic_tokens"], None, stage, "train", where, 1, seed))
    for name, probes in probe_sets.items():
        began = time.monotonic()
        ids, samples = _read_ids(probes.files, tokenizer, stage, progress)
        long = int((samples > stage.crop_s * SAMPLE_RATE_HZ).sum())
        note = f"{long} of {len(ids)} recordings exceed the {stage.crop_s:g} s the stage was trained on" if long else ""
        scores = {"stage 1": by_sequence(ids, lambda some: log_likelihoods(model, stage, some, device))}
        if bigram:
            scores["Kneser-Ney bigram"] = by_sequence(ids, lambda some: bigram_scores(bigram, stage, some))
        rows += rows_of(name, probes, scores, _lengths(ids, stage), samples, seed, time.monotonic() - began, note)
        rows += [] if bigram else [not_measured("IV", "Kneser-Ney bigram", f"{name}, all %", "the system has no manifest, so "
                                                "no train tokens to count: evaluate the run that it was published from")]
    return rows


def write_submission(places: Sequence[str], steps: Mapping[str, str], folder: str, device: str = "cpu",
                     progress: Progress = no_progress) -> list[str]:
    """Writes stage 1's scores of sets (folders with a gold.csv) as ZeroSpeech's scorer reads them; returns the files.

    It leaves the normalisation free, so there are two submissions, `folder`/per-token and `folder`/sum.  Words in a folder
    dev have lexical/dev.txt in each, sentences syntactic/dev.txt.  Raises as `measure_probes`; ValueError for a set that is
    not ZeroSpeech's.
    """
    probe_sets = {place: read_probes(place) for place in places}
    for place, probes in probe_sets.items():
        if not probes.official or probes.kind not in TASKS:
            raise ValueError(f"{place} holds {probes.kind} that ZeroSpeech 2021 does not score: give folders of its gold.csv")
    (tokenizer, model, stage), paths = _load(steps, device), []
    for place, probes in probe_sets.items():
        ids, _ = _read_ids(probes.files, tokenizer, stage, progress)
        sums_F = by_sequence(ids, lambda some: log_likelihoods(model, stage, some, device))
        part = posixpath.basename(place.removesuffix("/gold.csv").rstrip("/"))
        for how, scores_F in (("per-token", sums_F / _lengths(ids, stage)), ("sum", sums_F)):
            paths.append(store.join(folder, how, TASKS[probes.kind], f"{part}.txt"))
            store.put(paths[-1], score_lines(probes.files, scores_F).encode())
    return paths


def score_lines(files: Sequence[str], scores_F: np.ndarray) -> str:
    """A line for each recording: its name without folder and ending, and its score with all digits, so that ties stay ties."""
    names = [posixpath.splitext(posixpath.basename(path))[0] for path in files]
    return "".join(f"{name} {float(score)!r}\n" for name, score in zip(names, scores_F, strict=True))


def _load(steps: Mapping[str, str], device: str) -> tuple[SemanticTokenizer, torch.nn.Module, Stage]:
    """The tokenizer and the semantic stage. Raises ValueError where they do not belong together."""
    tokenizer = load_semantic(steps["kmeans"], device, tokenizer_dtype(steps["semantic_tokens"]))
    model, stage = load_lm(steps["lm_semantic"], device)
    if stage.name != "semantic" or stage.k != tokenizer.spec.vocab:
        raise ValueError(f"probes need the semantic stage of the tokenizer's {tokenizer.spec.vocab} tokens, got the "
                         f"{stage.name} stage of {stage.k}: take lm_semantic and kmeans of one run")
    return tokenizer, model, stage


def _read_ids(files: Sequence[str], tokenizer: SemanticTokenizer, stage: Stage,
              progress: Progress) -> tuple[list[np.ndarray], np.ndarray]:
    """(semantic ids of each file as the stage reads them, samples_F at 16 kHz)."""
    z, samples_F = encode_files(files, tokenizer, progress)
    return z if stage.lengths else [stage.targets(z_T) for z_T in z], samples_F


def _lengths(ids: Sequence[np.ndarray], stage: Stage) -> np.ndarray:
    """tokens_F: how many tokens of each recording are scored."""
    return np.array([len(stage.targets(row)) for row in ids])


def encode_files(files: Sequence[str], tokenizer: SemanticTokenizer,
                 progress: Progress = no_progress) -> tuple[list[np.ndarray], np.ndarray]:
    """(z_T of each file, samples_F at 16 kHz)."""
    codes, samples_F = encode_recordings(files, (tokenizer,), progress)
    return [z_TQ[:, 0].numpy() for z_TQ, in codes], samples_F


def encode_recordings(files: Sequence[str], tokenizers: Sequence[Tokenizer],
                      progress: Progress = no_progress) -> tuple[list[tuple[torch.Tensor, ...]], np.ndarray]:
    """(of each file codes_TQ of each tokenizer, samples_F at 16 kHz); batches of like lengths."""
    codes: list[tuple[torch.Tensor, ...]] = [()] * len(files)
    samples = np.zeros(len(files), np.int64)
    with ThreadPoolExecutor(READERS) as pool:  # decoding lets other threads run
        for first in range(0, len(files), AT_ONCE):
            wavs = list(pool.map(lambda path: resample(*decode(path), SAMPLE_RATE_HZ), files[first:first + AT_ONCE]))
            samples[first:first + len(wavs)] = [len(w) for w in wavs]
            done = first
            for batch in plan_batches([len(w) for w in wavs], BATCH_S):
                encoded = [encode_batch([wavs[i] for i in batch], tokenizer) for tokenizer in tokenizers]
                for i, *own in zip(batch, *encoded, strict=True):
                    codes[first + i] = tuple(own)
                done += len(batch)
                progress(done, len(files), "recordings")
    return codes, samples


def by_sequence(ids: Sequence[np.ndarray], score: Callable[[list[np.ndarray]], np.ndarray]) -> np.ndarray:
    """scores_F. Equal token sequences are scored once, so that ties stay ties, however a batch rounds."""
    unique = {row.tobytes(): row for row in ids}
    scores = dict(zip(unique, score(list(unique.values())), strict=True))
    return np.array([scores[row.tobytes()] for row in ids])


@torch.no_grad()
def log_likelihoods(model: torch.nn.Module, stage: Stage, rows: Sequence[np.ndarray],
                    device: str | torch.device = "cpu") -> np.ndarray:
    """Log-likelihood in nats of each row of semantic ids under stage 1, after BOS and without EOS.

    Where the stage has run lengths it reads them, from undeduplicated rows, and they are not scored.
    """
    out, packed = np.zeros(len(rows)), [stage.pack(row, None, False) for row in rows]
    for batch in _batches([len(p.ids) for p in packed]):
        length = max(len(packed[i].ids) for i in batch)
        tensors = prepare(stage, pack_rows(stage, [[packed[i]] for i in batch], length))
        nats_N = model(*inputs_of({name: x.to(device) for name, x in tensors.items()}))[0].double().cpu()
        out[batch] = -np.bincount(tensors["index_SN"][0].numpy() // length, nats_N.numpy(), minlength=len(batch))
    return out


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of like lengths, at most TOKENS with their padding (at least one row)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def bigram_of(data: TokenBatches) -> ngram.KneserNey:
    """A Kneser-Ney bigram of the train clips, without their copies at other speeds."""
    stage = data.stage
    _, *places = likelihood.views(stage, list(likelihood.train_rows(data)), -1)["bigram"]
    return ngram.fit(*places, 2, stage.vocab_size, stage.k + 1)


def bigram_scores(model: ngram.KneserNey, stage: Stage, rows: Sequence[np.ndarray]) -> np.ndarray:
    """As `log_likelihoods`, by the bigram; a deduplicated id has no probability of repeating."""
    nats_N = model.nats(*ngram.sequence([np.append(stage.bos, r) for r in map(stage.targets, rows)]), stage.no_repeat)
    row_N = np.repeat(np.arange(len(rows)), [len(stage.targets(r)) for r in rows])
    return -np.bincount(row_N, nats_N, minlength=len(rows))


def rows_of(name: str, probes: ProbeSet, sums: Mapping[str, np.ndarray], tokens: Sequence[int], samples_F: np.ndarray,
            seed: int, seconds: float, note: str = "") -> list[Result]:
    """Rows of a set, from log-likelihoods sums_F of the recordings (right, wrong, right, ...) by scorer, and the recordings'
    numbers of tokens and of samples.

    ZeroSpeech's rules (lexical.py and syntactic.py of its packages zerospeech2021 and zerospeech-benchmarks): a right
    recording scores against the wrong one of its voice and id (sentences: of their type and subtype) as `wins_of`.  A pair
    is the mean over its voices, however many it has; a set, a band of frequencies, a length or a type is the mean over its
    pairs.  In-vocab are the pairs of a frequency above 0, each with one weight.  Its files round to four decimals.
    """
    pairs, parts, tables, wins = probes.pairs, parts_of(probes.pairs), tables_of(probes.pairs), {}
    for scorer, sums_F in sums.items():
        wins |= {(scorer, "mean"): wins_of(sums_F / tokens), (scorer, "sum"): wins_of(sums_F)}
    wins["the shorter", ""] = wins_of(-samples_F)
    if all(p.id in probes.trigrams for p in pairs) and probes.trigrams:
        wins["phone trigrams", ""] = wins_of(np.array([x for p in pairs for x in (probes.trigrams[p.id], 0.0)]))
    rows = []
    for (scorer, how), wins_P in wins.items():
        ours, item = scorer == "stage 1", f"{scorer}, {HOW[how]}" if how else scorer
        # tables by length and type are long: of stage 1 alone, as the paper scores
        for part, at in {**parts, **(tables if ours and how == "mean" else {})}.items():
            values, ids = _by_pair(100 * wins_P[at], [pairs[i].id for i in at])
            paper = PAPER.get((probes.kind, part, how)) if ours else None
            other = "other pairs than the paper's (ZeroSpeech 2021, dev)" if paper and not probes.official else ""
            rows.append(Result("IV", item, f"{name}, {part} %", *bootstrap_interval(values, ids, seed), len(ids), "pairs",
                               "ours" if ours else "baseline", paper, seconds,
                               "; ".join(filter(None, (other, note if ours else "")))))
    return [*rows, Result("IV", "chance", f"{name}, all %", 50.0, n=len({p.id for p in pairs}), of="pairs", role="floor")]


def parts_of(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """Indices of pairs by part: all, those in the vocabulary, and each band; parts without pairs are left out."""
    parts = {"all": list(range(len(pairs))), "in-vocab": [i for i, p in enumerate(pairs) if p.known]}
    for band in dict.fromkeys([*BANDS, *(p.band for p in pairs if p.band)]):
        parts[band] = [i for i, p in enumerate(pairs) if p.band == band]
    return {part: at for part, at in parts.items() if at}


def tables_of(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """Indices of pairs by the right word's length ("4 phones") and by the sentences' type ("type binding")."""
    lengths, types = sorted({p.length for p in pairs if p.length}), sorted({p.type for p in pairs if p.type})
    return {**{f"{n} phones": [i for i, p in enumerate(pairs) if p.length == n] for n in lengths},
            **{f"type {t}": [i for i, p in enumerate(pairs) if p.type == t] for t in types}}


def wins_of(scores_F: np.ndarray) -> np.ndarray:
    """wins_P of scores (right, wrong, right, ...): 1 where the right one scores higher, 0.5 on ties."""
    right_P, wrong_P = scores_F[::2], scores_F[1::2]
    return (right_P > wrong_P) + 0.5 * (right_P == wrong_P)


def _by_pair(values_P: np.ndarray, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(means over voices, ids), one for each pair."""
    names, of = np.unique(np.asarray(ids), return_inverse=True)
    return np.bincount(of, values_P) / np.bincount(of), names


def zerospeech_suite(context: SuiteContext) -> list[Result]:
    """sWUGGY, sBLIMP, spoken and topic StoryCloze and their like, where the config names some (tables.probes)."""
    cfg, sets, rows = context.config, {}, []
    if not cfg.tables.probes:
        why = "no pairs: name folders with a gold.csv, or in StoryCloze's layout, tables.probes={NAME: FOLDER}"
        return [not_measured("IV", "stage 1", f"{name} %", why, paper) for name, paper in NAMES.items()]
    for name, place in cfg.tables.probes.items():
        try:
            read_probes(place)
            sets[name] = place
        except (ValueError, FileNotFoundError) as e:  # the other sets are measured
            rows.append(not_measured("IV", "stage 1", f"{name} %", str(e)))
    if not sets:
        return rows
    return rows + measure_probes(sets, context.steps, cfg.lm.semantic.where, context.seed, context.device, context.progress)
