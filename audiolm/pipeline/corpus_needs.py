"""What the steps of a run need of the corpus, looked at once the manifest is there and before anything trains.

So a split that a late step lacks is said at once, and not after hours.  The advice of an error works when it is followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from audiolm.config.base import ConfigError
from audiolm.config.corpus import ClipFilter
from audiolm.config.pipeline import Pipeline
from audiolm.dag.step import Step

if TYPE_CHECKING:
    import pyarrow as pa

LEAST_HELD_OUT_S = 0.08  # two frames, of a clip to measure on
MOST_PIECES = 4  # that the only recording is cut into, to hold some out


def check_config_needs(cfg: Pipeline, steps: Sequence[Step]) -> None:
    """Raises ConfigError where the samples would last longer than what a stage is trained on."""
    asked_s = cfg.samples.prompt_s + cfg.samples.seconds
    inputs = {u.name for s in steps if s.name == "samples" for u in s.inputs}
    for name in (n for n in ("semantic", "coarse") if f"lm_{n}" in inputs):
        if asked_s > (crop_s := getattr(cfg.lm, name).crop_s) + 1e-9:
            raise ConfigError(f"samples.prompt_s ({cfg.samples.prompt_s:g}) and samples.seconds ({cfg.samples.seconds:g}) are "
                              f"{asked_s:g} s together, and lm.{name} is trained on {crop_s:g} s: set samples.seconds="
                              f"{max(0.5, crop_s - cfg.samples.prompt_s):g} or less, or raise lm.{name}.crop_s")


def check_corpus_needs(cfg: Pipeline, steps: Sequence[Step], manifest: str) -> list[str]:
    """Remarks on what the steps will make do with. Raises ConfigError for what one of them cannot do without."""
    if not any(s.name != "manifest" for s in steps):
        return []
    clips = _totals(manifest)
    for step in steps:
        for field, where, *splits in _wanted(cfg, step):
            if not len(_of(clips, where, *splits)):
                of = f" of {', '.join(where.source)}" if where.source else ""
                raise ConfigError(f"{field}: the corpus has no {' or '.join(splits)} clip{of}, and {step.name} needs some: "
                                  f"{_advice(cfg, clips, field, where, splits)}")
        _check_clusters(cfg, step, clips)
        _check_abx(cfg, step, manifest)
    return list(_remarks(cfg, steps, clips))


def _wanted(cfg: Pipeline, step: Step) -> Iterator[tuple]:
    """(the config field of a filter, the filter, splits): of one of them the step needs a clip that passes."""
    name, reads = step.name, any(u.name == "manifest" for u in step.inputs)
    if name.startswith(("masked_model", "kmeans", "layers", "targets_", "residual")) and reads:
        found = "semantic.where", cfg.semantic.where
    elif name == "semantic_vocoder":
        found = "semantic.vocoder.where", cfg.semantic.vocoder.where
    elif name in ("codec", "codec_figures"):
        found = "codec.where", cfg.codec.where
    elif name.startswith("lm_"):
        found = f"lm.{name[3:]}.where", getattr(cfg.lm, name[3:]).where
    else:
        found = "corpus", ClipFilter()
    if step.trains or found[0] == "semantic.where":
        yield *found, "train"
    if step.trains:  # its best checkpoint is chosen on them
        yield *found, "dev"
    elif name in ("codec_figures", "samples", "evaluate"):
        yield *found, "test", "dev"


def _of(clips: pa.Table, where: ClipFilter, *splits: str) -> pa.Table:
    """The rows of some splits that pass a filter."""
    import pyarrow as pa
    import pyarrow.compute as pc

    clips = clips.filter(pc.is_in(clips["split"], value_set=pa.array(splits)))
    if where.source is None:
        return clips
    named = pa.array(where.source, pa.string())
    return clips.filter(pc.or_(pc.is_in(clips["source"], value_set=named), pc.is_in(clips["origin"], value_set=named)))


def _totals(manifest: str) -> pa.Table:
    """The manifest's clips by origin, source and split: `clips` (their number), `seconds` together, and the `longest` one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from audiolm.data.clip_groups import ClipGroups

    keys = ["origin", "source", "split"]

    def summed(table: pa.Table) -> pa.Table:
        found = table.group_by(keys).aggregate([("clips", "sum"), ("seconds", "sum"), ("longest", "max")])
        return found.rename_columns([name.removesuffix("_sum").removesuffix("_max") for name in found.column_names])

    groups = []
    for table, _ in ClipGroups(manifest).scan([*keys, "sample_rate", "frames"]):
        seconds = pc.divide(table["frames"].cast("float64"), table["sample_rate"].cast("float64"))
        ones = pa.repeat(1, len(table))
        groups.append(summed(pa.table([*(table[k] for k in keys), ones, seconds, seconds],
                                      [*keys, "clips", "seconds", "longest"])))
    return summed(pa.concat_tables(groups))


def _seconds(clips: pa.Table) -> float:
    return sum(clips["seconds"].to_pylist())


def _advice(cfg: Pipeline, clips: pa.Table, field: str, where: ClipFilter, splits: Sequence[str]) -> str:
    if others := sorted(set(_of(clips, ClipFilter(), *splits)["origin"].to_pylist())):
        return f"set {field}.source=[{', '.join(dict.fromkeys([*(where.source or ()), *others]))}]"
    if not cfg.corpus.dev:
        return "set corpus.dev=0.05, which holds speakers out"
    alone = sum(clips["clips"].to_pylist()) == 1
    if alone and (piece_s := int(10 * _seconds(clips) / MOST_PIECES) / 10) > 2 * cfg.corpus.min_s:
        return f"there is one recording; set corpus.max_s={piece_s:g}, which cuts it into pieces, or add another"
    return "there is one piece of audio from end to end; add recordings"


def _check_clusters(cfg: Pipeline, step: Step, clips: pa.Table) -> None:
    """Raises ConfigError for more clusters than the train clips have frames."""
    config = step.config.get("kmeans")
    if config is None or "start" in step.config:
        return
    from audiolm.lm.stages import SEMANTIC_HZ

    k = max(cfg.semantic.sweep.k, default=0) if config.k == "auto" else config.k
    frames = int(SEMANTIC_HZ * _seconds(_of(clips, cfg.semantic.where, "train")))
    if k > frames:
        field = "semantic.kmeans.k" if step.name == "kmeans" else f"k in semantic.iterations (of {step.name})"
        raise ConfigError(f"{field} is {k}, and the train clips have {frames} frames of 40 ms: set it to {frames // 4} or "
                          "less, or add audio")


def _check_abx(cfg: Pipeline, step: Step, manifest: str) -> None:
    """Raises ConfigError where ABX lacks audio of its items or, to choose a layer, speakers that are held out."""
    try:
        if step.name.startswith("layers"):
            from audiolm.eval.steps.layers import held_out_items

            held_out_items(cfg.semantic.abx, manifest, cfg.semantic.where)
        elif step.name == "semantic_figures":
            from audiolm.eval.steps.semantic import item_files

            item_files(step.config["figures"], manifest)
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _remarks(cfg: Pipeline, steps: Sequence[Step], clips: pa.Table) -> Iterator[str]:
    if not any(s.name == "samples" for s in steps):
        return
    prompts = _of(clips, ClipFilter(), "test")
    if not len(prompts):
        prompts = _of(clips, ClipFilter(), "dev")
        yield "no test clip: prompts and what else is measured on held-out audio are dev clips"
    longest_s = max(prompts["longest"].to_pylist())
    if longest_s < LEAST_HELD_OUT_S:
        raise ConfigError(f"corpus.min_s is {cfg.corpus.min_s}, and no held-out clip lasts {LEAST_HELD_OUT_S} s, which prompts "
                          f"and measurements need: set corpus.min_s={LEAST_HELD_OUT_S}")
    if longest_s < cfg.samples.prompt_s:
        yield (f"no held-out clip lasts samples.prompt_s ({cfg.samples.prompt_s:g} s): prompts are whole clips, of at most "
               f"{longest_s:.2g} s")
