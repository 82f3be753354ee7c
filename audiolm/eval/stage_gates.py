"""Gates of a language-model stage: checks that stop its step where the stage would be worthless.

Before training: a tokenizer whose codes collapsed.  After it, on held-out rows: a loss that does not beat unigrams, or a prefix
that is not used.  {build}/gates.json keeps each verdict, {name: {ok, text, look, forced, figures}}.  The weights are exported
before the stage is checked, so nothing is trained again.  A rerun stops at once; `--force STEP` overrides only the failures
that gates.json already lists.  `lm.STAGE.gates: warn` turns failures into notes.  Losses in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from audiolm.data.parallel import cluster_device, parallel_map
from audiolm.data.tokens import level_name, spec_of
from audiolm.eval.metrics.likelihood import measure_stage
from audiolm.store import get_json, join, put_json

# On speech, healthy levels had 0.79 to 0.99 of their bits; a collapsed one used 13 of 1,024 codes, at most 0.37 of its bits.
BITS_SHARE = 0.5  # of the entropy of equally frequent codes, so a perplexity below the vocabulary's square root
USED_SHARE = 0.1  # of the codes, or of the frames where there are fewer
# With many rows the smallest gain is significant, with few rows none is: a prefix that is used passes both bounds.
GAIN_SHARE = 0.005  # of the loss
GAIN_ERRORS = 2.0  # standard errors over rows

Verdict = dict[str, Any]


class GateFailed(RuntimeError):
    """A stage failed a gate; the text names the reason, where to look, and how to go on all the same."""


def check_inputs(config: Mapping[str, Any], inputs: Mapping[str, Any], out: Any) -> None:
    """Checks the token stores that a stage is going to read, by their steps' facts. Raises GateFailed."""
    verdicts = {}
    for which, step in (("semantic", "kmeans"), ("acoustic", "codec")):
        if tokens := inputs.get(f"{which}_tokens"):
            spec = spec_of(tokens.path)
            coarse = which == "acoustic" and config["stage"] == "lm_coarse"
            levels = config["layout"]["coarse_levels"] if coarse else spec["n_q"]
            verdicts[f"{which}_tokens"] = tokens_verdict(which, step, tokens.facts, spec["vocab"], levels)
    _pass(config, out, verdicts, "nothing was trained yet")


def check_stage(config: Mapping[str, Any], inputs: Mapping[str, Any], out: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the stage that was trained into out.path, once. Raises GateFailed.

    Returns its facts with the gates' figures, and with the failures that were forced or only warn as notes."""
    verdicts = {k: v for k, v in (get_json(_path(out)) or {}).items() if k in ("unigram", "conditioning")}
    if not verdicts:
        name, shape, cluster = config["stage"], config["lm"], config["cluster"]
        device = cluster_device(cluster, out.inline)
        item = (name, {**{k: a.path for k, a in inputs.items()}, name: out.path}, shape.where, config["rows"], config["seed"],
                device, ("unigram",))
        measured = parallel_map(measure_stage, [item], out=out, cluster=cluster, unit="gates", gpu=device == "cuda")[0]
        verdicts["unigram"] = unigram_verdict(measured["figures"])
        if measured["conditioning"]:
            verdicts["conditioning"] = conditioning_verdict(name, measured["conditioning"])
        out.log(facts["steps"], _figures(verdicts))
    known = _pass(config, out, verdicts, "the trained weights are kept")
    failed = [f"GATE {v['text']}" for v in known.values() if not v["ok"]]
    return {**facts, **_figures(verdicts), "gate/failed": len(failed), "notes": [*facts.get("notes", ()), *failed]}


def tokens_verdict(which: str, step: str, facts: Mapping[str, Any], vocab: int, levels: int) -> Verdict:
    """The verdict on the first `levels` levels of a token step's facts."""
    bad = [f"level {q + 1} uses {facts[f'used.{n}']} of {vocab} codes and {facts[f'entropy_bits.{n}']:.2f} of "
           f"{math.log2(vocab):.2f} bits" for q, n in enumerate(map(level_name, range(levels)))
           if collapsed(vocab, facts["frames"], facts[f"used.{n}"], facts[f"entropy_bits.{n}"])]
    return {"ok": not bad, "figures": {}, "text": f"the {which} tokenizer collapsed: {'; '.join(bad)}",
            "look": f"the step {step} (its loss, the use of its codes) and whether the audio is silent"}


def collapsed(vocab: int, frames: int, used: int, entropy_bits: float) -> bool:
    """True for a level that uses far fewer codes than it has, counting each or by their frequency."""
    possible = min(vocab, frames)
    return used < USED_SHARE * possible or entropy_bits < BITS_SHARE * math.log2(possible)


def unigram_verdict(figures: Mapping[str, float]) -> Verdict:
    loss, unigram = figures["loss"], figures["unigram"]
    return {"ok": loss < unigram, "figures": {"unigram": unigram - loss},
            "text": f"the validation loss {loss:.3f} does not beat counting tokens (unigram {unigram:.3f})",
            "look": "the curves of loss and val.loss (where neither falls: train.lr, warmup_steps, steps; where loss falls "
                    "alone: more data, dropout, a smaller model)"}


def conditioning_verdict(name: str, losses: Mapping[str, float]) -> Verdict:
    """The verdict on the losses of metrics.likelihood.conditioning."""
    gain, needed = losses["shuffled"] - losses["true"], needed_gain(losses)
    prefix = {"lm_coarse": "semantic tokens", "lm_fine": "coarse levels", "lm_parallel": "semantic tokens"}[name]
    return {"ok": gain > needed, "figures": {"conditioning": gain, "conditioning.needed": needed},
            "text": f"the prefix is not used: the loss is {losses['true']:.3f} after a clip's own {prefix} and "
                    f"{losses['shuffled']:.3f} after another's, {gain:.3f} more where {needed:.3f} is wanted",
            "look": f"train.steps (a prefix is learned late), whether the {prefix} say anything of these targets, and crop_s, "
                    "which sets how far apart they stand"}


def needed_gain(losses: Mapping[str, float]) -> float:
    """The least rise of the loss, with another clip's prefix, of a stage that uses its own."""
    return max(GAIN_SHARE * losses["true"], GAIN_ERRORS * losses.get("se", 0.0))


def failures(path: str) -> list[str]:
    """The failed gates of a build, and why the run went on; for reports."""
    known = get_json(join(path, "gates.json")) or {}
    return [f"{v['text']} ({'forced' if v['forced'] else 'told only'})" for v in known.values() if not v["ok"]]


def _figures(verdicts: Mapping[str, Verdict]) -> dict[str, float]:
    return {f"gate/{k}": x for v in verdicts.values() for k, x in v["figures"].items()}


def _path(out: Any) -> str:
    return join(out.path, "gates.json")


def settle(out: Any, verdicts: Mapping[str, Verdict], state: str, gates: str, step: str, field: str) -> dict[str, Verdict]:
    """Writes the verdicts and returns all of the build. Raises GateFailed for a failure that is not forced.

    `gates`: stop or warn, the value of the config's `field`; `state`: what the failure leaves of the step's work.
    """
    known = get_json(_path(out)) or {}
    for name, verdict in verdicts.items():
        # --force counts for a failure that an earlier run has listed, not for a new one.
        before = known.get(name, {"ok": True, "forced": False})
        known[name] = {**verdict, "forced": before["forced"] or (out.forced and not before["ok"])}
    put_json(_path(out), known)
    stopping = [f"{v['text']}. Look at {v['look']}" for k, v in sorted(known.items())
                if k in verdicts and not (v["ok"] or v["forced"])]
    if stopping and gates == "stop":
        raise GateFailed(f"{'. And '.join(stopping)}. To go on all the same ({state}): --force {step}; to be told only: "
                         f"{field}=warn")
    return known


def _pass(config: Mapping[str, Any], out: Any, verdicts: Mapping[str, Verdict], state: str) -> dict[str, Verdict]:
    """`settle` of a language-model stage."""
    name = config["stage"]
    return settle(out, verdicts, state, config["lm"].gates, name, f"lm.{name.removeprefix('lm_')}.gates")
