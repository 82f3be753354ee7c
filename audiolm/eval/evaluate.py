"""The step `evaluate`: codec figures, losses beside baselines, use of the conditioning, token statistics, the ladder.

Parts run side by side as tasks, each from the artifacts' paths.  `{out.path}/evaluate.json` holds the tables (levels
count from 1, losses in nats per token, mel distances in nats, rates in kb/s), `{out.path}/wav/` the ladder's sound,
`{out.path}/ui/codec/` the codec's beside the original and Opus, which the tracker shows as well.
Held-out means: dev for the stages' losses, test (dev where there is none) for codec and ladder.
"""

from __future__ import annotations

import re
import time
from typing import Any

from audiolm import store
from audiolm.config import LM
from audiolm.data.audio import wav_bytes
from audiolm.data.batches import TokenBatches
from audiolm.data.manifest import roots
from audiolm.data.shards import device_of, fan_out
from audiolm.eval import likelihood
from audiolm.eval.baseline_codecs import baselines, opus
from audiolm.eval.codec import compare, default_levels, reconstructions
from audiolm.eval.ladder import held_out, ladder, seconds_within
from audiolm.lm import generation
from audiolm.lm.model import load_lm
from audiolm.tokenizers.acoustic import load_codec

STAGES = ("lm_semantic", "lm_coarse", "lm_fine")
CODEC_PLAYERS = 2  # clips to be heard at several numbers of levels


def run_evaluate(config: dict[str, Any], inputs: dict[str, Any], out: Any) -> dict[str, Any]:
    """Step function. config: evaluate, samples, lm (its `where`s; without it all clips), corpus, cluster, seed; inputs:
    manifest, kmeans, codec, both token stores and the stages' artifacts (lm_fine where there is one). Writes
    evaluate.json; returns its main figures, flat.

    Raises ValueError where nothing is held out.
    """
    began = time.monotonic()
    paths = {name: artifact.path for name, artifact in inputs.items()}
    cluster = config["cluster"]
    settings = {"lm": LM(), **{k: v for k, v in config.items() if k != "cluster"}}
    stages = [s for s in STAGES if s in paths]
    parts = ["ladder", "codec", *stages[::-1], "tokens"]  # the longest first
    device = device_of(cluster, out.inline)
    items = [(part, settings, paths, out.path, device) for part in parts]
    results = fan_out(evaluate_part, items, out=out, cluster=cluster, unit="parts", gpu=device == "cuda")
    found = dict(zip(parts, results, strict=True))
    table = {"codec": found["codec"], "stages": {s: found[s]["figures"] for s in stages}, "tokens": found["tokens"],
             "ladder": found["ladder"],
             "conditioning": {s: found[s]["conditioning"] for s in stages if found[s]["conditioning"]}}
    store.put_json(store.join(out.path, "evaluate.json"), table)
    return {**flat_facts(table), "seconds": round(time.monotonic() - began, 3)}


def evaluate_part(part: str, config: dict[str, Any], paths: dict[str, str], folder: str, device: str) -> Any:
    """One task: a part's table, as plain JSON values."""
    if part == "tokens":
        return likelihood.token_statistics(paths["semantic_tokens"])
    if part in STAGES:
        return stage_part(part, config, paths, device)
    lm, evaluate, source_roots = config["lm"], config["evaluate"], roots(config["corpus"])
    where = lm.fine.where if "lm_fine" in paths else lm.coarse.where
    if part == "codec":
        clips = held_out(paths["manifest"], source_roots, evaluate.clips, evaluate.clip_s, where)
        return codec_part(load_codec(paths["codec"], device), clips, lm.coarse_levels, evaluate.lyra, folder)
    samples = config["samples"]
    temperatures = {"semantic": samples.temperature_semantic, "coarse": samples.temperature_coarse,
                    "fine": samples.temperature_fine}
    system = generation.load(paths, device, temperatures=temperatures)
    clips = held_out(paths["manifest"], source_roots, evaluate.clips, seconds_within(system, evaluate.clip_s), where)
    return ladder(system, clips, samples.prompt_s, config["seed"], folder)


def stage_part(name: str, config: dict[str, Any], paths: dict[str, str], device: str) -> dict[str, Any]:
    """Figures of one stage, and its conditioning where it has a prefix and two held-out rows."""
    model, stage = load_lm(paths[name], device)
    shape, n = getattr(config["lm"], stage.name), config["evaluate"].rows
    train, dev = (TokenBatches(paths["manifest"], paths["semantic_tokens"], paths["acoustic_tokens"], stage, split,
                               shape.where, 1, config["seed"]) for split in ("train", "dev"))
    figures = likelihood.stage_figures(model, stage, train, dev, n, device)
    crops, used = dev.fixed(n), None
    if stage.name != "semantic" and len(crops) > 1:
        used = likelihood.conditioning(model, stage, dev, crops, config["seed"], device)
    return {"figures": figures, "conditioning": used}


def codec_part(codec: Any, clips: list, coarse_levels: int, lyra: str | None, folder: str) -> dict[str, Any]:
    """`compare` on the (clip, wav_T) at 1, Q', half and all levels, with "players": [{"clip", "files": [{"label",
    "file"}]}] of the first clips, their wavs under {folder}/ui/codec/."""
    levels = sorted({*default_levels(codec), min(coarse_levels, codec.spec.n_q)})
    table = {**compare(codec, [wav for _, wav in clips], baselines(lyra), levels), "players": []}
    for clip, wav in clips[:CODEC_PLAYERS]:
        files = []
        for label, made in reconstructions(codec, wav, levels, opus()[:1]):
            name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{clip.id}-{len(files)}-{label}")
            file = f"ui/codec/{name}.wav"
            store.put(store.join(folder, file), wav_bytes(made))
            files.append({"label": label, "file": file})
        table["players"].append({"clip": clip.id, "files": files})
    return table


def flat_facts(table: dict[str, Any]) -> dict[str, float]:
    """The main figures by dotted name."""
    codec = table["codec"]
    names = {name: name for name in ("pesq", "stoi", "si_sdr", "mel")}
    if codec["visqol"]:  # a name of its own for each mapper, so that no chart draws the two as one
        names["visqol"] = "visqol_lattice" if "lattice" in codec["visqol"] else "visqol_exponential"
    best = codec["levels"][-1]
    facts = {f"codec.{name}": best[k] for k, name in names.items() if best[k] is not None}
    facts["codec.mean_spectrum_mel"] = codec["mean_spectrum_mel"]
    facts["codec.levels_that_do_not_help"] = len(codec["levels_that_do_not_help"])
    for name, figures in table["stages"].items():
        facts |= {f"{name}.{k}": figures[k] for k in ("loss", "unigram", "bigram")}
    for name, used in table["conditioning"].items():
        facts |= {f"{name}.conditioning.{k}": v for k, v in used.items()}
    facts |= {f"tokens.{k}": v for k, v in table["tokens"].items()}
    facts |= {f"ladder.{row['rung'].replace(', ', ' ').replace(' ', '_')}.mel": row["mel"] for row in table["ladder"]}
    return {k: round(float(v), 6) for k, v in facts.items()}
