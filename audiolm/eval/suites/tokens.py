"""The paper's Table I for any trained pair: acoustic and semantic tokens by what they tell and how they sound.

ABX (within and across speaker, % with 95 % intervals) is of the sums of the vectors that the tokens stand for: the
quantizer's at 50 Hz, the centroids at 25 Hz.  ViSQOL, PESQ, STOI and mel distance are of the sound that is decoded from
the same tokens alone.  wav_T: mono float32 at 16 kHz; codes_TQ as in tokenizers.base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from audiolm.eval.codec_quality import COARSE_BITS_PER_S, bits_per_s, decode, encode, quality_notes
from audiolm.eval.metrics import abx
from audiolm.eval.metrics.audio_quality import Scorers, measure
from audiolm.eval.metrics.stats import text_table
from audiolm.eval.results import Result, not_measured
from audiolm.tokenizers.acoustic import AcousticTokenizer
from audiolm.tokenizers.base import SAMPLE_RATE, Codec, Tokenizer
from audiolm.tokenizers.residual import ResidualTokenizer
from audiolm.tokenizers.vocoder import SemanticCodec

if TYPE_CHECKING:
    from audiolm.eval.suites.base import SuiteContext

Say = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """One kind of token: what makes them, which numbers of levels are measured, the vectors they stand for, what decodes them
    (None: nothing; of more levels than it has: nothing either)."""

    name: str
    tokenizer: Tokenizer
    levels: Sequence[int]
    vectors: Callable[[torch.Tensor], torch.Tensor] | None  # codes_TQ, any prefix of the levels -> (T, D)
    codec: Codec | None


def acoustic_side(codec: Codec) -> Side:
    """The codec at 2 kb/s, the coarse levels, and at all. An imported codec's vectors are not at hand."""
    coarse = round(COARSE_BITS_PER_S / bits_per_s(codec, 1))
    levels = sorted({min(max(coarse, 1), codec.spec.n_q), codec.spec.n_q})
    ours = isinstance(codec, AcousticTokenizer)

    def vectors(codes_TQ: torch.Tensor) -> torch.Tensor:
        return codec.model.quantizer.decode(codes_TQ[None].to(codec.device))[0].T.float().cpu()

    return Side("acoustic", codec, levels, vectors if ours else None, codec)


def semantic_side(tokenizer: ResidualTokenizer, vocoder: SemanticCodec | None) -> Side:
    """The tokens alone, and with all residual levels."""
    return Side("semantic", tokenizer, sorted({1, tokenizer.spec.n_q}), tokenizer.vectors_of, vocoder)


def table1(sides: Sequence[Side], items: abx.Items, read: Callable[[str], np.ndarray], wavs: Sequence[np.ndarray],
           have: Scorers, seed: int = 0, say: Say = lambda text: None) -> dict[str, Any]:
    """"rows": tokens, levels, bits_per_s, within, interval_within, across, interval_across, by_speaker_*, visqol, pesq, stoi,
    si_sdr_db, mel, scored (None where there is none); "items", "clips", "seconds", "visqol", "absent" and "remarks".

    `read` gives wav_T of an item's file; `wavs` are what is decoded; `say` hears of progress.
    Raises ValueError as eval.metrics.abx does, and where there is nothing to measure.
    """
    if not sides or not len(wavs):
        raise ValueError("Table I needs tokens of one kind at least, and clips to decode")
    rows, remarks = [], []
    for side in sides:
        codes = {} if side.vectors is None else _codes_of(side, items, read, say)
        made = encode(side.tokenizer, wavs)
        if side.vectors is None:
            remarks.append(f"ABX of {side.name} tokens is left out: the vectors of an imported codec are not at hand.")
        if side.codec is None:
            remarks.append(f"No sound of {side.name} tokens: no decoder was given (--vocoder).")
        for levels in side.levels:
            row = {"tokens": side.name, "levels": levels, "bits_per_s": bits_per_s(side.tokenizer, levels)}
            if side.vectors is not None:
                say(f"{side.name}, levels 1 to {levels}: ABX")
                row |= _abx(side, levels, codes, items, seed)
            if side.codec is not None and levels <= side.codec.spec.n_q:
                say(f"{side.name}, levels 1 to {levels}: sound of {len(wavs)} clips")
                sounds = (decode(side.codec, c[:, :levels], len(w)) for c, w in zip(made, wavs, strict=True))
                row |= measure(wavs, sounds, have.by_name)
            elif side.codec is not None:
                remarks.append(f"No sound of {levels} levels of {side.name} tokens: the decoder has {side.codec.spec.n_q}.")
            rows.append({**dict.fromkeys(key for key, _, _ in HEADS), "interval_within": None, "interval_across": None,
                         "scored": {}, **row})
    return {"rows": rows, "items": len(items.file), "clips": len(wavs), "seconds": sum(map(len, wavs)) / SAMPLE_RATE,
            "visqol": have.visqol, "absent": dict(have.absent), "remarks": remarks}


def _codes_of(side: Side, items: abx.Items, read: Callable[[str], np.ndarray], say: Say) -> dict[str, torch.Tensor]:
    """codes_TQ of each of the items' files: encoded once for all numbers of levels."""
    names, codes = sorted(set(items.file.tolist())), {}
    for i, name in enumerate(names):
        if i % max(1, len(names) // 10) == 0:
            say(f"{side.name}: tokens of file {i + 1} of {len(names)}")
        codes[name], = encode(side.tokenizer, [read(name)])
    return codes


def _abx(side: Side, levels: int, codes: Mapping[str, torch.Tensor], items: abx.Items, seed: int) -> dict[str, Any]:
    def features(file: str) -> np.ndarray:
        return side.vectors(codes[file][:, :levels]).numpy()

    return abx.abx(features, items, side.tokenizer.spec.rate_hz, abx.Protocol(seed))


HEADS = (("tokens", "tokens", 0), ("levels", "levels", 0), ("bits_per_s", "b/s", 0), ("within", "ABX within %", 2),
         ("across", "ABX across %", 2), ("visqol", "ViSQOL", 2), ("pesq", "PESQ", 2), ("stoi", "STOI", 3),
         ("mel", "mel distance", 3))  # (field, title, digits)


def format_table(table: Mapping[str, Any]) -> str:
    """The rows of `table1` as aligned text, with what a reader has to know below."""
    lines = [[head for _, head, _ in HEADS]] + [[_cell(row, *head) for head in HEADS] for row in table["rows"]]
    return text_table(lines, notes(table))


def _cell(row: Mapping[str, Any], name: str, _: str, digits: int) -> str:
    value = row[name]
    if value is None:
        return "-"
    if name in abx.MODES:
        lo, hi = row[f"interval_{name}"]
        return f"{value:.2f} [{lo:.2f}, {hi:.2f}]"
    return value if isinstance(value, str) else f"{value:.{digits}f}"


def notes(table: Mapping[str, Any]) -> list[str]:
    labels = {name: head for name, head, _ in HEADS}
    lines = [f"ABX on {table['items']} triphones, with 95 % intervals over speakers; sound on clips: {table['clips']}, "
             f"{table['seconds']:.1f} s."]
    return [*lines, *quality_notes(table, labels), *table["remarks"]]


PAPER_ABX = {"semantic": (6.7, 7.6, 1.1), "acoustic": (22.4, 28.7, 3.3), "acoustic, all": (17.8, 26.6, 3.9)}  # Table I


def tokens_suite(ask: SuiteContext) -> list[Result]:
    """ABX and quality of semantic and acoustic tokens, where the config names a triphone list (semantic.abx)."""
    wanted = ask.config.semantic.abx
    if wanted is None:
        return [not_measured("I", "semantic and acoustic tokens", "ABX error %", "no triphones: name a ZeroSpeech item file, "
                             "semantic.abx={items: FILE, audio: [FOLDER]}")]
    from audiolm.eval.metrics import abx
    from audiolm.eval.metrics.audio_quality import scorers
    from audiolm.eval.test_sets import audio_paths, wav_of
    from audiolm.tokenizers.acoustic import load_codec
    from audiolm.tokenizers.residual import load_residual
    from audiolm.tokenizers.vocoder import load_vocoder

    listed = abx.read_items(wanted.items)
    listed = listed.of(wanted.speakers) if wanted.speakers else listed
    by_name = audio_paths(tuple(wanted.audio), set(listed.file.tolist()), "semantic.abx.audio")
    tokenizer = load_residual(ask.steps["kmeans"], ask.steps.get("residual"), ask.device)
    there = ask.steps.get("semantic_vocoder")
    sides = [semantic_side(tokenizer, load_vocoder(there, tokenizer, ask.device) if there else None),
             acoustic_side(load_codec(ask.steps["codec"], ask.device))]
    places = list(by_name.values())
    n = min(ask.config.tables.sounds, len(places))
    wavs = [wav_of(places[i * len(places) // n])[:round(ask.config.evaluate.clip_s * SAMPLE_RATE)] for i in range(n)]
    found, rows = table1(sides, listed, lambda name: wav_of(by_name[name]), wavs, scorers(), ask.config.run.seed), []
    for line in found["rows"]:
        whole = line["tokens"] == "acoustic" and line["bits_per_s"] > 3000
        paper = PAPER_ABX["acoustic, all" if whole else line["tokens"]] if line["levels"] == 1 or not \
            line["tokens"].startswith("semantic") else (None,) * 3
        item = f"{line['tokens']}, {line['levels']} levels, {line['bits_per_s']:.0f} b/s"
        for mode, reference in zip(("within", "across"), paper, strict=False):
            low, high = line[f"interval_{mode}"] or (None, None)
            rows.append(Result("I", item, f"ABX {mode} %", line[mode], low, high, found["items"], "triphones", paper=reference))
        if line["visqol"] is not None:
            rows.append(Result("I", item, "ViSQOL", line["visqol"], n=found["clips"], paper=paper[2]))
    return rows
