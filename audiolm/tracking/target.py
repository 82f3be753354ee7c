"""Targets of an evaluation: a run, a checkpoint of one stage within its run's system, a checkpoint of a codec or masked model,
or a registered system.

A run is named by its name, index or MLflow id, the others by models:/NAME/VERSION or models:/NAME@ALIAS.  The run's index
names the folders of the other steps and the config (seed, held-out clips, corpus) of the evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from audiolm import store
from audiolm.config.pipeline import Pipeline
from audiolm.dag.ancestry import ancestors, misfits
from audiolm.dag.outputs import build_id
from audiolm.dag.run_index import left_out, no_step, paths_of, steps_of
from audiolm.tracking.lookup import check_named, connect, default_tracking, find_run, system_of, version_of
from audiolm.tracking.registry import alone, can_be_evaluated
from audiolm.train.commits import path_of

NO_CORPUS = "not published"  # the place of a published system's corpus, for the suites that need none


@dataclass(frozen=True)
class Target:
    """A system to evaluate."""

    title: str  # on the report
    slug: str  # in folders' names
    steps: Mapping[str, str]  # folder of each step
    config: Pipeline
    left_out: Mapping[str, str] = field(default_factory=dict)  # steps that were built, and why they are not among them
    checkpoint_of: str | None = None  # codec or masked_model, where it is one's checkpoint and no system


def resolve(text: str, folder: str, tracking: str | None = None) -> Target:
    """`folder`: the user's store, where a run's name is looked up, and the default MLflow. Raises ValueError for what cannot
    be evaluated, and for paths outside it that MLflow names."""
    if not text.startswith("models:/"):
        index = find_run(text, folder, tracking)
        name = index.rsplit("/", 1)[-1].removesuffix(".json")
        return Target(f"run {name}", name, _models(index), config_of(index), left_out(index))
    client, uri = connect(default_tracking(folder, tracking))
    version = version_of(client, text)
    title, slug = f"{version.name}, version {version.version}", f"{version.name}-{version.version}"
    if problem := refusal(version.tags, folder, uri):
        raise ValueError(f"{text}: {problem}")
    if "audiolm.system" in version.tags:
        system = system_of(version, uri)
        check_named({"system.json, index": system["index"], **{f"system.json, {n}": p for n, p in system["steps"].items()}},
                    folder, uri)
        return Target(title, slug, _with_system(system), config_of(system["index"]))
    tags, kind = version.tags, alone(version.tags["audiolm.step"])
    steps = _checkpoint(text, kind, tags) if kind else _with_checkpoint(text, tags)
    return Target(f"{title} ({tags['audiolm.step']} at step {tags['step']})", slug, steps, config_of(tags["audiolm.index"]),
                  checkpoint_of=kind)


def one_kind(targets: Sequence[Target]) -> str | None:
    """What the targets are checkpoints of, None for systems. Raises ValueError where they cannot be compared."""
    kinds = {t.checkpoint_of for t in targets}
    if len(kinds) > 1:
        raise ValueError(f"{' and '.join(t.title for t in targets)}: compare two of one kind, codecs, masked models or systems")
    return kinds.pop()


def _with_system(system: Mapping[str, Any]) -> dict[str, str]:
    """A registered system's steps, and those of its run's index, which may name newer builds, that belong to it."""
    own = system["steps"]
    others = {name: path for name, path in _models(system["index"]).items() if name not in own}
    return own | {name: path for name, path in others.items() if not misfits({**own, name: path})}


def _checkpoint(text: str, kind: str, tags: Mapping[str, str]) -> dict[str, str]:
    """The manifest that a codec or masked model was trained on, and the export of its checkpoint, which is made in the store.

    Raises ValueError where either is gone."""
    from audiolm.train.checkpoint_exports import export_checkpoint

    build, uri, index = tags["audiolm.build"], tags["uri"], tags["audiolm.index"]
    commit = store.get_json(path_of(build, int(tags["step"])))
    if commit is None or not store.exists(uri):
        raise _gone(text, uri)
    _check_kin(text, build, index)
    if "manifest" not in (named := paths_of(index)):
        raise ValueError(f"{text}: {no_step(index, ['manifest'])}")
    folder = store.join(config_of(index).store, "evaluations", "checkpoints", *build.split("/")[-3:], uri.rsplit("/", 1)[-1])
    return {"manifest": named["manifest"], kind: export_checkpoint(kind, build, commit, folder)}


def _with_checkpoint(text: str, tags: Mapping[str, str]) -> dict[str, str]:
    """The run's steps with a checkpoint in place of its stage. Raises ValueError where they do not belong together."""
    step, index, uri = tags["audiolm.step"], tags["audiolm.index"], tags["uri"]
    if not store.exists(store.join(uri, "export")):
        raise _gone(text, uri)
    _check_kin(text, tags["audiolm.build"], index)
    return {**_models(index), step: uri}


def _gone(text: str, uri: str) -> ValueError:
    return ValueError(f"{text}: its weights are not at {uri} (any more, or not for this machine): give another version, or run "
                      "where the store is seen")


def _check_kin(text: str, build: str, index: str) -> None:
    """Raises ValueError where a run's index, which names its newest builds, has others than a checkpoint was trained on."""
    named = paths_of(index)
    for name, made_of in ancestors(build):
        # tokens of another tokenizer would mean nothing to the checkpoint
        if name in named and build_id(named[name]) != made_of:
            raise ValueError(f"{text}: it was trained on {name} {made_of}, and {index} now names {named[name]}: evaluate a "
                             "version that was made since, or a system's version (models:/RUN/N)")


def _models(index: str) -> dict[str, str]:
    """A run's steps without those whose outputs come from its own checkpoints."""
    return {name: path for name, path in steps_of(index).items() if name not in ("samples", "evaluate", "report")}


def refusal(tags: Mapping[str, str], folder: str, tracking: str) -> str | None:
    """The reason why a version with these tags cannot be evaluated; None where it can. `folder`: the user's store."""
    if "audiolm.system" in tags:
        return None
    if not {"uri", "audiolm.step", "audiolm.index"} <= tags.keys():
        return "it is no checkpoint of this project (no tags uri, audiolm.step, audiolm.index)"
    if "pruned" in tags:
        return ("it was pruned: its weights are gone from the store. Evaluate a later version or the alias best; "
                "train.keep says how many stay")
    if not can_be_evaluated(tags):
        return (f"a checkpoint of {tags['audiolm.step']} holds a training's state and no export: those of the language models, "
                "the codec and the masked model can be evaluated; give a run or a system's version instead")
    try:
        check_named({f"tag {n}": tags[n] for n in ("uri", "audiolm.index", "audiolm.build") if n in tags}, folder, tracking)
    except ValueError as e:
        return str(e)
    return None


def config_of(index: str) -> Pipeline:
    """The config of a run. Raises ValueError where its index has none."""
    found: Any = store.get_json(index) or {}
    if "config" not in found:
        raise ValueError(f"{index} holds no config: start the run's own command once more, it "
                         "only writes the index anew")
    for source in found["config"]["corpus"]["sources"]:
        if not source.get("root") and not source.get("uri"):
            source["uri" if source["kind"] == "manifest" else "root"] = NO_CORPUS
    return Pipeline.model_validate(found["config"])
