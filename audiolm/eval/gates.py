"""Gates of a language-model stage: what would make it worthless stops its step and says what to look at.

Before training: a tokenizer whose codes collapsed.  After it, on held-out rows: a loss that does not beat unigrams, a
prefix that is not used.  {build}/gates.json keeps each verdict, {name: {ok, text, look, forced, figures}}, and the weights are
exported before the stage is judged: nothing is trained again.  A rerun stops at once; `--force STEP` overrides the failures
that stand there already, and those alone.  `lm.STAGE.gates: warn` makes notes of them.  Losses in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from audiolm.data.parallel import cluster_device, parallel_map
from audiolm.data.tokens import level_name, read_meta, shard_name
from audiolm.eval.metrics.likelihood import measure_stage
from audiolm.store import get_json, join, put_json

# Levels in use had 0.79 to 0.99 of their bits on speech (README's unigrams); one that collapsed used 13 of
# 1,024 codes, 0.37 of them at most.
BITS_SHARE = 0.5  # of the entropy of equally frequent codes, so a perplexity below the vocabulary's square root
USED_SHARE = 0.1  # of the codes, or of the frames where there are fewer
# With many rows the least difference is significant, with few rows none is: a used prefix passes both.
GAIN_SHARE = 0.005  # of the loss
GAIN_ERRORS = 2.0  # standard errors over rows

Verdict = dict[str, Any]


class GateFailed(RuntimeError):
    """A stage that is not worth going on with; the text says why, what to look at and how to go on all the same."""


def check_inputs(config: Mapping[str, Any], inputs: Mapping[str, Any], out: Any) -> None:
    """Judges the token stores that a stage is going to read, by their steps' facts. Raises GateFailed."""
    found = {}
    for which, step in (("semantic", "kmeans"), ("acoustic", "codec")):
        if tokens := inputs.get(f"{which}_tokens"):
            spec = read_meta(join(tokens.path, shard_name(0)))["spec"]
            levels = config["coarse_levels"] if which == "acoustic" and config["stage"] == "lm_coarse" else spec["n_q"]
            found[f"{which}_tokens"] = judge_tokens(which, step, tokens.facts, spec["vocab"], levels)
    _pass(config, out, found, "nothing was trained yet")


def check_stage(config: Mapping[str, Any], inputs: Mapping[str, Any], out: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Judges the stage that was trained into out.path, once, and returns its facts with the gates' figures and, as notes,
    the failures that were forced or are only to be told. Raises GateFailed."""
    found = {k: v for k, v in (get_json(_path(out)) or {}).items() if k in ("unigram", "conditioning")}
    if not found:
        name, shape, cluster = config["stage"], config["lm"], config["cluster"]
        device = cluster_device(cluster, out.inline)
        item = (name, {**{k: a.path for k, a in inputs.items()}, name: out.path}, shape.where, config["rows"], config["seed"],
                device, ("unigram",))
        measured = parallel_map(measure_stage, [item], out=out, cluster=cluster, unit="gates", gpu=device == "cuda")[0]
        found["unigram"] = judge_unigram(measured["figures"])
        if measured["conditioning"]:
            found["conditioning"] = judge_conditioning(name, measured["conditioning"])
        out.log(facts["steps"], _figures(found))
    known = _pass(config, out, found, "the trained weights are kept")
    failed = [f"GATE {v['text']}" for v in known.values() if not v["ok"]]
    return {**facts, **_figures(found), "gate/failed": len(failed), "notes": [*facts.get("notes", ()), *failed]}


def judge_tokens(which: str, step: str, facts: Mapping[str, Any], vocab: int, levels: int) -> Verdict:
    """Of the first `levels` levels of a token step's facts."""
    bad = [f"level {q + 1} uses {facts[f'used.{n}']} of {vocab} codes and {facts[f'entropy_bits.{n}']:.2f} of "
           f"{math.log2(vocab):.2f} bits" for q, n in enumerate(map(level_name, range(levels)))
           if collapsed(vocab, facts["frames"], facts[f"used.{n}"], facts[f"entropy_bits.{n}"])]
    return {"ok": not bad, "figures": {}, "text": f"the {which} tokenizer collapsed: {'; '.join(bad)}",
            "look": f"the step {step} (its loss, the use of its codes) and whether the audio is silent"}


def collapsed(vocab: int, frames: int, used: int, entropy_bits: float) -> bool:
    """True for a level that uses far fewer codes than it has, counting each or by their frequency."""
    possible = min(vocab, frames)
    return used < USED_SHARE * possible or entropy_bits < BITS_SHARE * math.log2(possible)


def judge_unigram(figures: Mapping[str, float]) -> Verdict:
    loss, unigram = figures["loss"], figures["unigram"]
    return {"ok": loss < unigram, "figures": {"unigram": unigram - loss},
            "text": f"the validation loss {loss:.3f} does not beat counting tokens (unigram {unigram:.3f})",
            "look": "the curves of loss and val.loss (where neither falls: train.lr, warmup_steps, steps; where loss falls "
                    "alone: more data, dropout, a smaller model)"}


def judge_conditioning(name: str, found: Mapping[str, float]) -> Verdict:
    """Of likelihood.conditioning's figures."""
    gain, needed = found["shuffled"] - found["true"], needed_gain(found)
    prefix = {"lm_coarse": "semantic tokens", "lm_fine": "coarse levels"}[name]
    return {"ok": gain > needed, "figures": {"conditioning": gain, "conditioning.needed": needed},
            "text": f"the prefix is not used: the loss is {found['true']:.3f} after a clip's own {prefix} and "
                    f"{found['shuffled']:.3f} after another's, {gain:.3f} more where {needed:.3f} is wanted",
            "look": f"train.steps (a prefix is learned late), whether the {prefix} say anything of these targets, and crop_s, "
                    "which sets how far apart they stand"}


def needed_gain(found: Mapping[str, float]) -> float:
    return max(GAIN_SHARE * found["true"], GAIN_ERRORS * found.get("se", 0.0))


def failures(path: str) -> list[str]:
    """What gates of a build failed, and why it was gone on with; for reports."""
    known = get_json(join(path, "gates.json")) or {}
    return [f"{v['text']} ({'forced' if v['forced'] else 'told only'})" for v in known.values() if not v["ok"]]


def _figures(found: Mapping[str, Verdict]) -> dict[str, float]:
    return {f"gate/{k}": x for v in found.values() for k, x in v["figures"].items()}


def _path(out: Any) -> str:
    return join(out.path, "gates.json")


def _pass(config: Mapping[str, Any], out: Any, found: Mapping[str, Verdict], state: str) -> dict[str, Verdict]:
    """Keeps the verdicts and returns all of the build. Raises GateFailed for a failure nobody has forced."""
    known = get_json(_path(out)) or {}
    for name, verdict in found.items():
        before = known.get(name, {"ok": True, "forced": False})
        known[name] = {**verdict, "forced": before["forced"] or (out.forced and not before["ok"])}
    put_json(_path(out), known)
    stopping = [f"{v['text']}. Look at {v['look']}" for k, v in sorted(known.items())
                if k in found and not (v["ok"] or v["forced"])]
    if stopping and config["lm"].gates == "stop":
        name = config["stage"]
        raise GateFailed(f"{'. And '.join(stopping)}. To go on all the same ({state}): --force {name}; to be told only: "
                         f"lm.{name.removeprefix('lm_')}.gates=warn")
    return known
