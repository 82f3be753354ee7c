"""Table IV of the paper (2209.03143): does stage 1 prefer the right word or sentence of a spoken pair to the wrong one?

A recording's score is the log-likelihood of its semantic tokens (deduplicated where the stage is) after BOS, without EOS: its
sum, and its mean per token.  A pair scores 1 for the right one and 0.5 on ties, averaged over voices, then over pairs, as in
ZeroSpeech 2021.  Baselines: Kneser-Ney bigrams of the run's train tokens, phone trigrams where the set has them, and the
shorter recording.  Legend: F recordings, P pairs of one voice, z_T semantic ids.
"""

from __future__ import annotations

import csv
import io
import posixpath
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from audiolm import store
from audiolm.config.corpus import ClipFilter
from audiolm.data.audio import SAMPLE_RATE_HZ, decode, resample
from audiolm.data.containers.layout import ENDINGS
from audiolm.data.tokens import tokenizer_dtype
from audiolm.eval.metrics import likelihood, ngram
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.results import Progress, Result, no_progress, not_measured
from audiolm.eval.suites.base import SuiteContext
from audiolm.lm.batches import TokenBatches
from audiolm.lm.loss import inputs_of, prepare
from audiolm.lm.model import load_lm
from audiolm.lm.pack_rows import pack_rows
from audiolm.lm.stages import Stage
from audiolm.tokenizers.encode import READERS, encode_batch, plan_batches
from audiolm.tokenizers.semantic import load_semantic

# Upper bounds of a word's frequency; ZeroSpeech's script counts 5 in the band 6-20.
BANDS = {"oov": 0, "1-5": 5, "6-20": 20, "21-100": 100, ">100": float("inf")}
WORDS = ("is_word", "frequency", "frequency_band")  # columns that only words have
SENTENCES = ("subtype", "transcription")


@dataclass(frozen=True)
class Pair:
    """A right and a wrong recording (paths) of one voice; pairs of several voices share an id. Only words have a `band`."""

    id: str
    voice: str
    right: str
    wrong: str
    band: str | None

    @property
    def known(self) -> bool:
        """True for a word in the vocabulary."""
        return self.band not in (None, "oov")


@dataclass(frozen=True)
class ProbeSet:
    """`kind`: words, sentences or stories; `official`: has ZeroSpeech's columns. `trigrams`: by pair id, by how much phone
    trigrams favour the right word, from the column d3 of a pairs.csv beside the gold."""

    kind: str
    official: bool
    pairs: tuple[Pair, ...]
    trigrams: Mapping[str, float]


def read_probes(place: str) -> ProbeSet:
    """The pairs of a gold.csv, or of the one in a folder. Raises FileNotFoundError; ValueError for rows without a partner."""
    gold = place if place.endswith(".csv") else store.join(place, "gold.csv")
    rows, folder = _table(gold), posixpath.dirname(gold)
    columns = rows[0].keys() if rows else ()
    right = next((c for c in ("correct", "is_word") if c in columns), None)
    name = next((c for c in ("pair_id", "id") if c in columns), None)
    if "filename" not in columns or not right or not name:
        raise ValueError(f"{gold}: columns {', '.join(columns) or 'none'}; filename, correct (or is_word) and pair_id (or id) "
                         "are needed, as in ZeroSpeech 2021's gold.csv")
    ending = {posixpath.splitext(n)[0]: n for n in store.names(folder) if n.lower().endswith(ENDINGS)}
    groups: dict[tuple[str, str], tuple[list, list]] = defaultdict(lambda: ([], []))
    for row in rows:
        within = [row[c] for c in ("type", "subtype") if name == "id" and c in columns]
        groups["/".join([*within, row[name]]), row.get("voice", "")][row[right].strip() in ("1", "1.0")].append(row)
    pairs = []
    for (pair, voice), (wrong, good) in groups.items():
        if len(wrong) != len(good):
            raise ValueError(f"{gold}: pair {pair!r} of voice {voice!r} has {len(good)} right and {len(wrong)} wrong "
                             "recordings; each right one needs a wrong one")
        pairs += [Pair(pair, voice, *(_path(gold, folder, ending, r["filename"]) for r in (a, b)), band_of(a))
                  for a, b in zip(good, wrong, strict=True)]
    kinds = (("words", WORDS), ("sentences", SENTENCES))
    kind = next((kind for kind, names in kinds if any(c in columns for c in names)), "stories")
    beside = store.join(folder, "pairs.csv")
    trigrams = {r["pair_id"]: float(r["d3"]) for r in _table(beside) if r.get("d3")} if store.exists(beside) else {}
    return ProbeSet(kind, "frequency" in columns or "transcription" in columns, tuple(pairs), trigrams)


def band_of(row: Mapping[str, str]) -> str | None:
    """The frequency band of a right word; None where the gold has none."""
    if row.get("frequency", "").lower() in ("", "nan"):
        return row.get("frequency_band") or None
    count = float(row["frequency"])
    return next(band for band, most in BANDS.items() if count <= most)


def _table(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(store.get(path).decode("utf-8-sig"))))


def _path(gold: str, folder: str, ending: Mapping[str, str], filename: str) -> str:
    if filename.lower().endswith(ENDINGS):
        return store.join(folder, filename)
    if filename not in ending:
        raise ValueError(f"{gold} names {filename!r}, and {folder} has no such audio ({', '.join(ENDINGS)}): put it there")
    return store.join(folder, ending[filename])


BATCH_S = 60.0  # padded audio of a batch
AT_ONCE = 1024  # recordings in memory
TOKENS = 8192  # of a forward pass, with the padding
# Accuracy in %; the sum for sentences (67.5) is the paper's figure without length normalisation.
PAPER = {("words", "all", "mean"): 71.5, ("words", "in-vocab", "mean"): 83.7, ("sentences", "all", "mean"): 64.7,
         ("sentences", "all", "sum"): 67.5}
HOW = {"mean": "per token", "sum": "sum"}


def measure_probes(sets: Mapping[str, str], steps: Mapping[str, str], where: ClipFilter | None = None, seed: int = 0,
                   device: str = "cpu", progress: Progress = no_progress) -> list[Result]:
    """Rows of Table IV for each set, {name: folder of a gold.csv}.

    `steps`: the folders of kmeans, lm_semantic (or one of its checkpoints), and manifest and semantic_tokens, whose train
    tokens the bigram counts; `where`: lm.semantic.where.
    Raises as `read_probes`; ValueError where the stage is not the semantic one, or of another tokenizer.
    """
    tokenizer = load_semantic(steps["kmeans"], device, tokenizer_dtype(steps["semantic_tokens"]))
    model, stage = load_lm(steps["lm_semantic"], device)
    if stage.name != "semantic" or stage.k != tokenizer.spec.vocab:
        raise ValueError(f"probes need the semantic stage of the tokenizer's {tokenizer.spec.vocab} tokens, got the "
                         f"{stage.name} stage of {stage.k}: take lm_semantic and kmeans of one run")
    bigram = bigram_of(TokenBatches(steps["manifest"], steps["semantic_tokens"], None, stage, "train", where, 1, seed))
    probe_sets, rows = {name: read_probes(place) for name, place in sets.items()}, []  # errors before any computing
    for name, probes in probe_sets.items():
        began = time.monotonic()
        files = [path for p in probes.pairs for path in (p.right, p.wrong)]
        z, samples = encode_files(files, tokenizer, progress)
        ids = z if stage.lengths else [stage.targets(z_T) for z_T in z]  # as the stage reads them
        long = sum(len(z_T) > stage.crop_frames for z_T in z)
        note = f"{long} of {len(z)} recordings exceed the {stage.crop_s:g} s the stage was trained on" if long else ""
        scores = {"stage 1": by_sequence(ids, lambda some: log_likelihoods(model, stage, some, device)),
                  "Kneser-Ney bigram": by_sequence(ids, lambda some: bigram_scores(bigram, stage, some))}
        tokens = [len(stage.targets(row)) for row in ids]
        rows += rows_of(name, probes, scores, tokens, samples, seed, time.monotonic() - began, note)
    return rows


def encode_files(files: Sequence[str], tokenizer,
                 progress: Progress = no_progress) -> tuple[list[np.ndarray], np.ndarray]:
    """(z_T of each file, samples_F at 16 kHz); batches of like lengths."""
    codes: list[np.ndarray] = [np.empty(0, np.int64)] * len(files)
    samples = np.zeros(len(files), np.int64)
    with ThreadPoolExecutor(READERS) as pool:  # decoding lets other threads run
        for first in range(0, len(files), AT_ONCE):
            wavs = list(pool.map(lambda path: resample(*decode(path), SAMPLE_RATE_HZ), files[first:first + AT_ONCE]))
            samples[first:first + len(wavs)] = [len(w) for w in wavs]
            done = first
            for batch in plan_batches([len(w) for w in wavs], BATCH_S):
                for i, codes_TQ in zip(batch, encode_batch([wavs[i] for i in batch], tokenizer), strict=True):
                    codes[first + i] = codes_TQ[:, 0].numpy()
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
    numbers of tokens and of samples."""
    pairs, parts, wins = probes.pairs, parts_of(probes.pairs), {}
    for scorer, sums_F in sums.items():
        wins |= {(scorer, "mean"): wins_of(sums_F / tokens), (scorer, "sum"): wins_of(sums_F)}
    wins["the shorter", ""] = wins_of(-samples_F)
    if all(p.id in probes.trigrams for p in pairs) and probes.trigrams:
        wins["phone trigrams", ""] = wins_of(np.array([x for p in pairs for x in (probes.trigrams[p.id], 0.0)]))
    rows = []
    for (scorer, how), wins_P in wins.items():
        ours, item = scorer == "stage 1", f"{scorer}, {HOW[how]}" if how else scorer
        for part, at in parts.items():
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


def wins_of(scores_F: np.ndarray) -> np.ndarray:
    """wins_P of scores (right, wrong, right, ...): 1 where the right one scores higher, 0.5 on ties."""
    right_P, wrong_P = scores_F[::2], scores_F[1::2]
    return (right_P > wrong_P) + 0.5 * (right_P == wrong_P)


def _by_pair(values_P: np.ndarray, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(means over voices, ids), one for each pair."""
    names, of = np.unique(np.asarray(ids), return_inverse=True)
    return np.bincount(of, values_P) / np.bincount(of), names


def zerospeech_suite(context: SuiteContext) -> list[Result]:
    """sWUGGY- and sBLIMP-style pairs, where the config names some (tables.probes)."""
    cfg = context.config
    if not cfg.tables.probes:
        return [not_measured("IV", "stage 1", f"{name} %", "no pairs: name folders with a gold.csv, tables.probes="
                             f"{{{name}: FOLDER}}", paper) for name, paper in (("sWUGGY", 71.5), ("sBLIMP", 64.7))]
    return measure_probes(cfg.tables.probes, context.steps, cfg.lm.semantic.where, context.seed, context.device,
                          context.progress)
