"""The codec's table (eval/codec_table.py) on held-out clips of its run: as many as `evaluate` says, with players of two."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from audiolm import store
from audiolm.data.audio import wav_bytes
from audiolm.data.clips import read_clip
from audiolm.data.sources import roots
from audiolm.eval import codec_scores, codec_table
from audiolm.eval.codec_scores import Scoring, System, TableClip
from audiolm.eval.ladder import choose_held_out
from audiolm.eval.results import Result
from audiolm.eval.suites.base import SuiteContext, save_sounds

PLAYED = 2  # clips with players
Entry = tuple[str, str, str, None]  # as save_sounds takes them


def codec_suite(context: SuiteContext) -> list[Result]:
    """Quality, pitch, words and voice at 1, 2 kb/s, half and all levels, beside Opus, the original and noise."""
    cfg = context.config
    folders, parts = roots(cfg.corpus), store.join(context.folder, "parts")
    chosen = choose_held_out(context.steps["manifest"], cfg.evaluate.clips, cfg.evaluate.clip_s, cfg.codec.where)
    by_speaker = len({clip.speaker for clip, _ in chosen}) > 1
    clips = [TableClip(clip.id, clip.speaker if by_speaker else clip.id, f"{clip.id} {samples} {[p.hash for p in clip.parts]}",
                       partial(read_clip, clip, folders, 0, samples)) for clip, samples in chosen]
    codec = codec_scores.codec_system(context.steps["codec"], name="codec")
    systems, absent = codec_scores.systems_beside([codec], cfg.evaluate.lyra)
    unwanted = {name for name, wanted in (("visqol", cfg.evaluate.visqol), ("wer", cfg.evaluate.wer)) if not wanted}
    scoring = Scoring(tuple(m for m in codec_scores.METRICS if m not in unwanted), cfg.tables.asr, context.device,
                      cfg.tables.speaker_model)
    table = codec_table.measure(clips, systems, absent, scoring, parts, context.out, cfg.cluster)
    played = [s for s in systems if s.kind in ("original", "codec")]
    work = [(clip, played, context.folder, f"wav/{i}", context.device) for i, clip in enumerate(clips[:PLAYED])]
    save_sounds(context, [entry for entries in context.map(write_versions, work, "players") for entry in entries])
    return codec_table.results(table)


def write_versions(clip: TableClip, systems: Sequence[System], folder: str, at: str, device: str) -> list[Entry]:
    """One task: a wav of each version of a clip, below `folder`."""
    wav_T, entries = clip.read(), []
    for system in systems:
        for levels, made_T, _ in codec_scores.versions(system, clip, wav_T, device):
            title = system.name if levels is None else f"{levels} level{'s' * (levels > 1)}"
            file = f"{at}-{len(entries)}.wav"
            store.put(store.join(folder, file), wav_bytes(made_T))
            entries.append((clip.name, title, file, None))
    return entries
