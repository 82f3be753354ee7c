"""Codec quality on held-out speech, by number of levels and beside shipped codecs: quality against bit rate.

Metrics are those of `eval.metrics.audio_quality`; the reference point of the mel distance is a clip's own mean spectrum.
Codes in use and perplexity come per level.  wav_T: mono float32 at 16 kHz.
A metric whose library is missing is None everywhere, and the table gives the reason once, in "absent".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from audiolm.data.audio import resample
from audiolm.eval.codec_wer import NO_WER, Spoken, WordErrors, wer_note, word_errors
from audiolm.eval.metrics.audio_quality import (
    METRICS,
    Scorers,
    mean_or_none,
    mean_spectrum_distance,
    measure,
    mel_distance,
    scorers,
)
from audiolm.eval.models.baseline_codecs import Baseline
from audiolm.models.entropy import perplexity
from audiolm.tokenizers.base import SAMPLE_RATE, Codec, Tokenizer

COARSE_BITS_PER_S = 2000  # of the paper's coarse levels: 4 x 10 bits x 50 Hz (III-B)


def default_levels(codec: Codec) -> list[int]:
    """1, the coarse levels (2 kb/s), half of the levels, all."""
    n_q = codec.spec.n_q
    coarse = round(COARSE_BITS_PER_S / bits_per_s(codec, 1))
    return sorted({1, min(max(coarse, 1), n_q), max(n_q // 2, 1), n_q})


def codec_figures(codec: Codec, wavs: list[np.ndarray], levels: Sequence[int] | None = None,
                  have: Scorers | None = None) -> dict[str, Any]:
    """Figures of the codec, a row per number of levels, as JSON.

    "levels": rows of n_q, bits_per_s, mel, gain in mel over one level fewer, "scored" and "failed" as in `measure`; the
    slow metrics only where n_q is in `levels` (None: `default_levels`).
    "levels_that_do_not_help" (gain <= 0), "codebooks" (rows of level, used, perplexity), "mean_spectrum_mel",
    "absent", "visqol" (version and mapper), "clips" and "seconds".
    Raises ValueError without wavs and for levels that the codec lacks.
    """
    if not wavs:
        raise ValueError("codec_figures got no clips: give held-out audio")
    n_q, have = codec.spec.n_q, have or scorers()
    levels = default_levels(codec) if levels is None else levels
    if unknown := [q for q in levels if not 1 <= q <= n_q]:
        raise ValueError(f"levels {unknown} do not exist: this codec has 1 to {n_q}")
    # Clips are encoded once: a prefix of the levels is what a smaller codec would give.
    codes = encode(codec, wavs)
    rows: list[dict[str, Any]] = []
    for q in range(1, n_q + 1):
        # the mel distance at every number of levels, the slow metrics at the chosen ones
        by_name = have.by_name if q in levels else {"mel": mel_distance}
        row = measure(wavs, (decode(codec, c[:, :q], len(w)) for c, w in zip(codes, wavs, strict=True)), by_name)
        mels = [r["mel"] for r in (*rows[-1:], row)]  # of one level fewer, where there is one, and of q levels
        gain = None if len(mels) < 2 or None in mels else mels[0] - mels[1]
        rows.append({"n_q": q, "bits_per_s": bits_per_s(codec, q), **row, "gain": gain})
    return {"levels": rows, "levels_that_do_not_help": [r["n_q"] for r in rows if r["gain"] is not None and r["gain"] <= 0],
            "codebooks": codebook_use(torch.cat(codes), codec.spec.vocab),
            "mean_spectrum_mel": mean_or_none([mean_spectrum_distance(w) for w in wavs]),
            "absent": dict(have.absent), "visqol": have.visqol, "clips": len(wavs), "seconds": _seconds(wavs)}


def compare(codec: Codec | None, wavs: list[np.ndarray], baselines: Sequence[Baseline] = (),
            levels: Sequence[int] | None = None, with_visqol: bool = True, spoken: Spoken | None = None) -> dict[str, Any]:
    """One table of the original against itself, the baselines and the codec at some numbers of levels (None: no codec).

    "rows": codec, n_q (ours alone), kbps, pesq, visqol, stoi, si_sdr (dB), mel, scored, wer (%) and wer_interval of the
    clips of `spoken`; "levels": the same of ours at every number of levels, with gain; "usage": level, used (codes), share,
    perplexity; "wer": clips, words, reference and asr, None where there is no WER.  The rest is as in `codec_figures`,
    "absent" with the baselines'.  Raises ValueError without wavs.
    """
    if not wavs:
        raise ValueError("compare got no clips: give audio of at least a second")
    have, words = scorers(with_visqol), word_errors(spoken)
    absent = dict(have.absent)
    if isinstance(words, str):
        absent["wer"], words = words, None
    # The original against itself gives the top of each scale.
    rows = [{"codec": "identity", "n_q": None, "kbps": None, **_reported(measure(wavs, wavs, have.by_name)),
             **(words.original() if words else NO_WER)}]
    for baseline in baselines:
        if baseline.round_trip is None:
            absent[baseline.codec] = baseline.absent
            continue
        decoded, bits = zip(*map(baseline.round_trip, wavs), strict=True)
        rows.append({"codec": baseline.codec, "n_q": None, "kbps": sum(bits) / _seconds(wavs) / 1000,
                     **_reported(measure(wavs, decoded, have.by_name)),
                     **(words.of(baseline.round_trip(wav)[0] for wav in words.wavs) if words else NO_WER)})
    table = {"absent": absent, "visqol": have.visqol, "wer": words and words.about, "clips": len(wavs),
             "seconds": _seconds(wavs)}
    if codec is None:
        return {"rows": rows, **table}
    levels = default_levels(codec) if levels is None else levels
    figures = codec_figures(codec, wavs, levels, have)
    wer = _wer_by_levels(codec, words, levels)
    ours = [{"n_q": r["n_q"], "kbps": r["bits_per_s"] / 1000, **_reported(r), **wer.get(r["n_q"], NO_WER), "gain": r["gain"]}
            for r in figures["levels"]]
    rows += [{"codec": "this codec", **{k: v for k, v in r.items() if k != "gain"}} for r in ours if r["n_q"] in levels]
    usage = [{"level": r["level"], "used": round(r["used"] * codec.spec.vocab), "share": r["used"],
              "perplexity": r["perplexity"]} for r in figures["codebooks"]]
    return {"rows": rows, "levels": ours, "usage": usage, "mean_spectrum_mel": figures["mean_spectrum_mel"],
            "levels_that_do_not_help": figures["levels_that_do_not_help"], "family": codec.spec.name, **table}


def _wer_by_levels(codec: Codec, words: WordErrors | None, levels: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The WER of the codec at each number of levels; its clips are encoded once."""
    if words is None:
        return {}
    codes = encode(codec, words.wavs)
    return {q: words.of(decode(codec, c[:, :q], len(w)) for c, w in zip(codes, words.wavs, strict=True)) for q in levels}


def _reported(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name.removesuffix("_db"): row[name] for name in METRICS}, "scored": row["scored"]}


# (field, title, digits)
HEADS = (("codec", "codec", 0), ("n_q", "levels", 0), ("kbps", "kb/s", 2), ("pesq", "PESQ", 2), ("visqol", "ViSQOL", 2),
         ("stoi", "STOI", 3), ("si_sdr", "SI-SDR dB", 1), ("mel", "mel distance", 3), ("wer", "WER %", 1))


def notes(table: Mapping[str, Any]) -> list[str]:
    """Remarks below the table: clips, WER's reference, ViSQOL's mapper, absent metrics, levels that do not help."""
    labels = {name: head for name, head, _ in HEADS}
    lines = [f"{table['clips']} clips, {table['seconds']:.1f} s; identity is the original against itself; rates count "
             "the packets' bits."]
    if table.get("wer"):
        lines.append(wer_note(table["wer"]))
    lines += quality_notes(table, labels)
    if table.get("family") == "spectral":
        lines.append("This codec finds its phases anew, so SI-SDR says nothing of it.")
    if useless := table.get("levels_that_do_not_help"):
        lines.append(f"Levels that do not lower the mel distance: {', '.join(map(str, useless))}.")
    return lines


def quality_notes(table: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    """ViSQOL's mapper, absent metrics, and metrics without a value on some clips; `labels`: column titles."""
    lines = []
    if table.get("visqol"):
        lines.append(f"ViSQOL: {table['visqol']}; scores of another mapper cannot be set beside these.")
    lines += [f"No {labels.get(name, name)}: {why}." for name, why in table["absent"].items()]
    for name in ("pesq", "visqol", "stoi"):  # the others have a value on every clip
        fewest = min((row["scored"][name] for row in table["rows"] if name in row["scored"]), default=table["clips"])
        if fewest < table["clips"]:
            lines.append(f"{labels[name]} has a value on as few as {fewest} of {table['clips']} clips (too short, or no "
                         "speech found).")
    return lines


def reconstructions(codec: Codec, wav_T: np.ndarray, levels: Sequence[int],
                    baselines: Sequence[Baseline] = ()) -> list[tuple[str, np.ndarray]]:
    """(label, wav_T) of the original, of each number of levels and of the baselines at hand, to compare by ear."""
    codes_TQ, = encode(codec, [wav_T])
    ours = [(f"{q} level{'s' * (q > 1)}, {bits_per_s(codec, q) / 1000:.3g} kb/s",
             decode(codec, codes_TQ[:, :q], len(wav_T))) for q in levels]
    theirs = [(f"{b.codec}, {b.kbps:g} kb/s", b.round_trip(wav_T)[0]) for b in baselines if b.round_trip]
    return [("original", wav_T), *ours, *theirs]


def _seconds(wavs: Sequence[np.ndarray]) -> float:
    return sum(map(len, wavs)) / SAMPLE_RATE


def encode(codec: Codec, wavs: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """codes_TQ of each wav_T at 16 kHz; a codec of another rate gets it resampled."""
    return [codec.encode(torch.from_numpy(np.ascontiguousarray(w, np.float32))[None], torch.tensor([len(w)]))[0]
            for w in (resample(wav_T, SAMPLE_RATE, codec.spec.sample_rate) for wav_T in wavs)]


def decode(codec: Codec, codes_TQ: torch.Tensor, samples: int) -> np.ndarray:
    """wav_T at 16 kHz of so many samples; zeros where the codec's own end comes earlier."""
    wav_T = resample(codec.decode(codes_TQ[None])[0].numpy(), codec.spec.sample_rate, SAMPLE_RATE)[:samples]
    return np.pad(wav_T, (0, samples - len(wav_T)))


def bits_per_s(tokenizer: Tokenizer, levels: int) -> float:
    return levels * tokenizer.spec.rate_hz * math.log2(tokenizer.spec.vocab)


def codebook_use(codes_TQ: torch.Tensor, vocab: int) -> list[dict[str, float]]:
    """A row per level: level (from 1), used (share of its codes that occur) and perplexity of their use."""
    hits_QN = torch.stack([torch.bincount(code_T, minlength=vocab) for code_T in codes_TQ.T]).double()
    return [{"level": q, "used": used, "perplexity": value} for q, (used, value) in enumerate(
        zip((hits_QN > 0).double().mean(1).tolist(), perplexity(hits_QN).tolist(), strict=True), 1)]
