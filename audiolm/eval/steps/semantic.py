"""The step `semantic_figures`: statistics of the semantic tokens, examples of their sound, phones by token, and ABX.

Writes semantic.json and semantic/ (a wav of each example token, PNGs) to `{out.path}/ui/`, which the tracker shows.
Statistics come from the token store, examples from held-out clips (train clips where there are none).  Phones by token and ABX
come from the item file's speakers, held out (no model was trained on them) apart from seen.  Times in seconds, ABX errors in %.
Legend: P phones, K tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from audiolm import store
from audiolm.config.external import SemanticMetricsConfig
from audiolm.data.audio import wav_bytes
from audiolm.data.clips import Clip, read_clip, read_clips
from audiolm.data.parallel import cluster_device, parallel_map
from audiolm.data.sources import roots
from audiolm.data.tokens import TokenStore
from audiolm.eval.metrics import abx
from audiolm.eval.metrics import token_statistics as ts
from audiolm.eval.test_sets import audio_paths, groups_of, wav_of
from audiolm.render import plots
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP
from audiolm.tokenizers.semantic import load_semantic

KINDS = ("centroids", "semantic", "mfcc")  # of abx.KINDS; the last is the floor
OCCURRENCES = 6  # of a token, in its example
# Of an example's excerpts: audio on both sides of the token, silence between two, fades at their ends. A token of 40 ms alone
# is too short to recognise, so neighbours are played too.
CONTEXT_S, GAP_S, FADE_S = 0.12, 0.15, 0.01
LONGEST_S = 1.0  # of a run: silence is not played for long

Groups = dict[str, tuple[str, ...]]  # speakers


def measure_semantic(config: dict[str, Any], inputs: dict[str, Any], out: Any) -> dict[str, Any]:
    """Step function. config: figures (SemanticMetricsConfig), corpus, cluster, seed; inputs: manifest, kmeans, semantic_tokens.
    Returns the main figures, flat: statistics of train clips, the rest of held-out speakers.

    Raises ValueError for an item's file without audio and for speakers without items."""
    began, cluster, want = time.monotonic(), config["cluster"], config["figures"]
    paths = {name: artifact.path for name, artifact in inputs.items()}
    device = cluster_device(cluster, out.inline)
    groups, files, remarks = item_files(want, paths["manifest"])
    aligned = "held_out" if groups.get("held_out") else "seen"  # the group whose phones are counted
    tasks: dict[str, tuple] = {}
    for kind in KINDS if groups else ():
        tasks[kind] = (abx_part, kind, want.items, groups, files, paths["kmeans"], config["seed"], device)
    if groups and want.phones:
        tasks["phones"] = (phones_part, want.items, want.phones, groups[aligned], files, paths["kmeans"], out.path, device)
    tasks["tokens"] = (tokens_part, want, roots(config["corpus"]), paths, out.path, config["seed"])
    results = parallel_map(_part, list(tasks.values()), out=out, cluster=cluster, unit="parts", gpu=device == "cuda")
    tables = dict(zip(tasks, results, strict=True))
    table = {**tables["tokens"], "remarks": remarks, "absent": {}, "phones": tables.get("phones"), "abx": None}
    if groups:
        table["abx"] = {g: {"speakers": list(groups[g]), "rows": abx_rows({k: tables[k][g] for k in KINDS}, config["seed"])}
                        for g in groups}
        table["absent"] |= {g: why for g, why in (
            ("held_out", "every speaker of the item file is trained on, or test"),
            ("seen", "no speaker of the item file is trained on")) if g not in groups}
    else:
        table["absent"]["abx"] = "no item file: give semantic.abx.items and semantic.abx.audio"
    if table["phones"] is None:
        table["absent"]["phones"] = "no alignment: give semantic.abx.phones, with semantic.abx.items and semantic.abx.audio"
    else:
        for example in table["examples"]:
            example["phone"], example["phone_share"] = table["phones"]["phone_of"].get(str(example["token"]), (None, None))
    out.check()
    store.put_json(store.join(out.path, "ui", "semantic.json"), table)
    return {**flat_facts(table), "seconds": round(time.monotonic() - began, 3)}


def _part(task, *arguments: Any) -> Any:
    return task(*arguments)


def item_files(want: SemanticMetricsConfig, manifest: str) -> tuple[Groups, dict[str, str], list[str]]:
    """(the groups that have speakers, file id -> path of their audio, remarks); all empty without items."""
    if want.items is None:
        return {}, {}, []
    items = abx.read_items(want.items)
    groups, remarks = groups_of(items, want.speakers, manifest, want.where)
    return groups, audio_paths(want.audio, {f for g in groups.values() for f in items.of(g).file.tolist()}), remarks


def abx_part(kind: str, items_path: str, groups: Groups, files: Mapping[str, str], kmeans: str, seed: int,
             device: str) -> dict[str, dict[str, abx.Scores]]:
    """One task: {group: {mode: scores}} of one kind of features; across takes two speakers."""
    items = abx.read_items(items_path)
    extract, rate_hz = abx.extractor(kind, None if kind == "mfcc" else load_semantic(kmeans, device))
    return {group: abx.scores(lambda file: extract(wav_of(files[file])), items.of(speakers), rate_hz,
                              abx.Protocol(seed, modes=abx.MODES if len(speakers) > 1 else abx.MODES[:1]))
            for group, speakers in groups.items()}


def abx_rows(scores: Mapping[str, Mapping[str, abx.Scores]], seed: int) -> list[dict[str, Any]]:
    """A row a kind: abx.summary of each mode, and `difference_{mode}` to MFCC with its interval ([mean, lo, hi] points,
    None where the two have not the same speakers)."""
    rows, floor = [], scores["mfcc"]
    for kind, by_mode in scores.items():
        row: dict[str, Any] = {"features": kind}
        for mode, s in by_mode.items():
            row |= abx.summary(mode, s, seed)
            if kind != "mfcc":
                same = s.speakers == floor[mode].speakers
                row[f"difference_{mode}"] = list(abx.difference(s, floor[mode], seed)) if same else None
        rows.append(row)
    return rows


def phones_part(items_path: str, alignment: str, speakers: Sequence[str], files: Mapping[str, str], kmeans: str, folder: str,
                device: str) -> dict[str, Any]:
    """One task: counts of frames by phone and token on the speakers' files, as figures and a picture."""
    tokenizer = load_semantic(kmeans, device)
    wanted = sorted(set(abx.read_items(items_path).of(speakers).file.tolist()))
    spoken = read_phones(alignment, wanted)
    if not spoken:
        raise ValueError(f"semantic.abx.phones {alignment} names none of the {len(wanted)} files of speakers "
                         f"{', '.join(speakers)}: give the alignment that belongs to {items_path}")
    names = sorted({p for _, _, phones in spoken.values() for p in phones})
    frames_PK = np.zeros((len(names), tokenizer.spec.vocab), np.int64)
    for file, (onset, offset, phones) in spoken.items():
        wav_T = wav_of(files[file])
        z_T = tokenizer.encode(torch.from_numpy(wav_T)[None], torch.tensor([len(wav_T)]))[0][:, 0].numpy()
        at_T, inside_T = frame_phones(onset, offset, len(z_T))
        number = np.array([names.index(p) for p in phones])
        np.add.at(frames_PK, (number[at_T[inside_T]], z_T[inside_T]), 1)
    return phone_table(frames_PK, names, list(speakers), folder)


def read_phones(path: str, files: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """{file: (onset_s, offset_s, phones)} in order of time, from lines `file onset offset phone ...`, of some files."""
    wanted, by_file = set(files), {}
    for number, line in enumerate(store.get(path).decode().splitlines(), 1):
        row = line.split()
        if not row or row[0].startswith("#") or row[0] not in wanted:
            continue
        try:
            by_file.setdefault(row[0], []).append((float(row[1]), float(row[2]), row[3]))
        except (IndexError, ValueError):
            raise ValueError(f"{path}: line {number} is {line!r}; expected `file onset offset phone`, times in "
                             "seconds") from None
    return {f: (np.array([r[0] for r in rows]), np.array([r[1] for r in rows]), [r[2] for r in rows])
            for f in sorted(by_file) for rows in [sorted(by_file[f])]}


def frame_phones(onset_s: np.ndarray, offset_s: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """(at_T, inside_T): the last phone that begins before each frame's centre, and true where the centre is within it."""
    centre_T = (np.arange(frames) + 0.5) * SEMANTIC_HOP / SAMPLE_RATE
    at_T = np.searchsorted(onset_s, centre_T, side="right") - 1
    return at_T, (at_T >= 0) & (centre_T < offset_s[at_T])


def phone_table(frames_PK: np.ndarray, names: Sequence[str], speakers: list[str], folder: str) -> dict[str, Any]:
    """ts.phone_figures, each token's likeliest phone and its share, and the picture of P(phone | token)."""
    total_K = frames_PK.sum(0)
    phones, tokens = ts.diagonal(frames_PK)
    share_PK = frames_PK[np.ix_(phones, tokens)] / total_K[tokens]
    best = {str(k): [names[frames_PK[:, k].argmax()], float(frames_PK[:, k].max() / total_K[k])] for k in tokens.tolist()}
    picture = "ui/semantic/phone-by-token.png"
    store.put(store.join(folder, picture), plots.shares(share_PK, [names[p] for p in phones], "P(phone | token)",
                                                        f"{len(tokens)} tokens, by likeliest phone"))
    return {**ts.phone_figures(frames_PK), "frames": int(total_K.sum()), "speakers": speakers, "tokens": len(tokens),
            "phones": [names[p] for p in phones], "phone_of": best, "picture": picture}


def tokens_part(want: SemanticMetricsConfig, source_roots: dict[str, str], paths: Mapping[str, str], folder: str,
                seed: int) -> dict[str, Any]:
    """One task: statistics of train and held-out clips, their drift, and the examples."""
    tokens = TokenStore(paths["semantic_tokens"])
    rate_hz = tokens.spec["sample_rate"] / tokens.spec["hop"]
    rejected = {i for file in tokens.files for i in file["rejected"]}
    clips = {c.id: c for c in read_clips(paths["manifest"], where=want.where) if c.id not in rejected}
    group_of = {i: "train" if c.split == "train" else "held_out" for i, c in clips.items()}
    uses = ts.tally(tokens, group_of, ("train", "held_out"))
    statistics = {g: ts.statistics(u, rate_hz) for g, u in uses.items()}
    present = {g: u for g, u in uses.items() if statistics[g]}
    if not present:
        raise ValueError(f"{tokens.path} has no clip of the manifest that semantic.where ({want.where.source}) takes")
    drift = ts.drift_bits(*(u.frames_K for u in present.values())) if len(present) == 2 else None
    shares = {g: u.frames_K / u.frames_K.sum() for g, u in present.items()}
    lengths = {g: u.lengths_L / u.lengths_L.sum() for g, u in present.items()}
    store.put(store.join(folder, "ui/semantic/use.png"), plots.ranked(shares, "Use of tokens, from the most used"))
    store.put(store.join(folder, "ui/semantic/runs.png"), plots.lengths(lengths, "Runs by their length", "frames of 40 ms"))
    source = "held_out" if "held_out" in present else "train"
    examples = _examples(tokens, present[source], {i: c for i, c in clips.items() if group_of[i] == source}, source_roots,
                         want.examples, folder, seed)
    return {"rate_hz": rate_hz, "vocab": tokens.spec["vocab"], "statistics": statistics, "drift_bits": drift,
            "pictures": {"use": "ui/semantic/use.png", "runs": "ui/semantic/runs.png"}, "examples": examples,
            "examples_from": source}


def _examples(tokens: TokenStore, use: ts.Use, clips: Mapping[str, Clip], source_roots: dict[str, str], n: int, folder: str,
              seed: int) -> list[dict[str, Any]]:
    """The n most used tokens, each with a wav of its occurrences; a clip is read once."""
    order = np.lexsort((np.arange(len(use.frames_K)), -use.frames_K))
    chosen = [k for k in order[:n].tolist() if use.frames_K[k]]
    occurrences = ts.occurrences(tokens, chosen, {i: c.speaker for i, c in clips.items()}, OCCURRENCES, seed)
    # Clip by clip: each is decoded once, however many examples it has.
    pieces: dict[ts.Occurrence, np.ndarray] = {}
    for name in sorted({o.clip for v in occurrences.values() for o in v}):
        wav_T = read_clip(clips[name], source_roots)
        pieces |= {o: excerpt(wav_T, o.start, o.length) for v in occurrences.values() for o in v if o.clip == name}
    total, examples = use.frames_K.sum(), []
    for token in chosen:
        file = f"ui/semantic/token-{token:04d}.wav"
        store.put(store.join(folder, file), wav_bytes(joined([pieces[o] for o in occurrences[token]])))
        examples.append({"token": token, "share": float(use.frames_K[token] / total), "file": file, "phone": None,
                         "phone_share": None, "occurrences": [
                             {"clip": o.clip, "speaker": clips[o.clip].speaker, "start_s": o.start * SEMANTIC_HOP / SAMPLE_RATE,
                              "seconds": o.length * SEMANTIC_HOP / SAMPLE_RATE} for o in occurrences[token]]})
    return examples


def excerpt(wav_T: np.ndarray, start: int, length: int) -> np.ndarray:
    """A run's audio, at most LONGEST_S of it, with up to CONTEXT_S on both sides; its ends are faded."""
    margin, at = round(CONTEXT_S * SAMPLE_RATE), start * SEMANTIC_HOP
    n = min(length * SEMANTIC_HOP, round(LONGEST_S * SAMPLE_RATE))
    piece_T = wav_T[max(0, at - margin):at + n + margin].copy()
    fade = min(round(FADE_S * SAMPLE_RATE), len(piece_T) // 2)
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    piece_T[:fade] *= ramp
    piece_T[len(piece_T) - fade:] *= ramp[::-1]
    return piece_T


def joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """The pieces with GAP_S of silence between them."""
    gap = np.zeros(round(GAP_S * SAMPLE_RATE), np.float32)
    return np.concatenate([x for i, piece in enumerate(pieces) for x in ((gap, piece) if i else (piece,))])


def flat_facts(table: Mapping[str, Any]) -> dict[str, float]:
    """Statistics of train clips (held-out ones where there are no others), PNMI and ABX, by name.

    ABX on held-out speakers: `abx_within` of the centroids, `abx_features_within`, `abx_mfcc_within`; on seen ones
    `abx_seen_within`; each across as well."""
    statistics = table["statistics"]["train"] or table["statistics"]["held_out"]
    facts = {k: statistics[k] for k in ("rate", "rate_dedup", "bits_per_s", "bits_per_s_dedup", "entropy_bits", "perplexity",
                                        "used", "dedup_ratio", "mean_run")}
    if table["drift_bits"] is not None:
        facts["drift_bits"] = table["drift_bits"]
    if table["phones"]:
        facts |= {k: table["phones"][k] for k in ("pnmi", "phone_purity", "cluster_purity")}
    for group, held in (("held_out", ""), ("test", "test_"), ("seen", "seen_")):
        for row in ((table["abx"] or {}).get(group) or {}).get("rows", ()):
            kind = {"centroids": "", "semantic": "features_"}.get(row["features"], row["features"] + "_")
            facts |= {f"abx_{held}{kind}{mode}": row[mode] for mode in abx.MODES if mode in row}
    return {k: round(float(v), 6) for k, v in facts.items()}
