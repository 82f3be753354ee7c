"""The paper's tables and what stands beside them, as suites of `eval.suites`: choose items, make the sounds, judge them.

Sounds are made once for all suites, as tasks, in `sounds/` beside the suites' folders; the items of each are frozen in its
folder.  Counts and places are the config's section `tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from audiolm import store
from audiolm.data.audio import wav_bytes
from audiolm.data.manifest import roots
from audiolm.data.shards import fan_out
from audiolm.eval import detector as told
from audiolm.eval import generated, items, speakers, wer
from audiolm.eval.fad import fad_rows
from audiolm.eval.figures import Row, not_measured
from audiolm.lm.draw import draws_of
from audiolm.lm.system import NEEDED
from audiolm.tokenizers.base import SAMPLE_RATE

if TYPE_CHECKING:
    from audiolm.eval.suites import Ask
    from audiolm.lm.generation import AudioLM

PAPER_ABX = {"semantic": (6.7, 7.6, 1.1), "acoustic": (22.4, 28.7, 3.3), "acoustic, all": (17.8, 26.6, 3.9)}  # Table I
PLAYED = 2  # clips of each mode that can be heard
LEAST_S = 2.0  # of a clip that is continued


def table_i(ask: Ask) -> list[Row]:
    """ABX and quality of semantic and acoustic tokens, where the config names a triphone list (semantic.abx)."""
    wanted = ask.config.semantic.abx
    if wanted is None:
        return [not_measured("I", "semantic and acoustic tokens", "ABX error %", "no triphones: name a ZeroSpeech item file, "
                             "semantic.abx={items: FILE, audio: [FOLDER]}")]
    from audiolm.eval import abx
    from audiolm.eval.abx_set import audio_paths, wav_of
    from audiolm.eval.codec import scorers
    from audiolm.eval.table1 import acoustic_side, semantic_side, table1
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
            rows.append(Row("I", item, f"ABX {mode} %", line[mode], low, high, found["items"], "triphones", paper=reference))
        if line["visqol"] is not None:
            rows.append(Row("I", item, "ViSQOL", line["visqol"], n=found["clips"], paper=paper[2]))
    return rows


def table_ii(ask: Ask) -> list[Row]:
    """CER and WER of held-out utterances, of the codec, and of what is said from their semantic tokens."""
    cfg = ask.config
    made = _made(ask, "utterances", lambda: items.with_text(ask.steps["manifest"], cfg.tables.utterances, cfg.run.seed,
                                                            most_s=_most_s(ask)), wer.PLAN)
    _play(ask, made)
    return wer.table2(made, cfg.tables.asr, ask.device, cfg.run.seed, ask.out.progress)


def table_iii(ask: Ask) -> list[Row]:
    """Whether a continuation keeps its prompt's voice."""
    cfg, t = ask.config, ask.config.tables
    most_s = _most_s(ask)
    learn, test = items.of_speakers(ask.steps["manifest"], t.learned, t.judged, cfg.run.seed, min(items.LEAST_S, most_s))
    made = _made(ask, "judged", lambda: test, speakers.PLAN)
    _play(ask, made)
    known = _made(ask, "learned", lambda: learn, speakers.LEARN)
    return speakers.table3(known, made, _beside(ask, "nets"), replace(speakers.SETTINGS, steps=t.net_steps), ask.device,
                           cfg.run.seed, ask.out.progress)


def detector(ask: Ask) -> list[Row]:
    """Whether continuations are told from real speech by a network that looks for it."""
    cfg = ask.config
    made = _made(ask, "continued", lambda: _continued(ask), told.PLAN)
    rows, path = told.detector(made, _beside(ask, "nets"), replace(told.SETTINGS, steps=cfg.tables.net_steps), ask.device,
                            cfg.run.seed, ask.out.progress)
    if path:
        store.put_json(store.join(ask.folder, told.TRAINED), {"net": path.rsplit("/", 1)[-1]})
    return rows


def fad(ask: Ask) -> list[Row]:
    """Fréchet audio distance of sounds to held-out clips, the codec's beside them."""
    made = _made(ask, "continued", lambda: _continued(ask), {**told.PLAN, "acoustic": 1})
    by = {mode: [m for m in made if m.wanted.mode == mode] for mode in ("original", "resynthesis", "acoustic", "continuation")}
    # what follows the prompts, of every other clip against the others: no sound is compared with its own original
    held_out = [m.after_T for m in by["original"][::2]]
    return fad_rows(held_out, {generated.ITEMS[mode]: [m.after_T for m in by[mode][1::2]] for mode in
                               ("resynthesis", "acoustic", "continuation")}, ask.config.run.seed)


def likelihood(ask: Ask) -> list[Row]:
    """sWUGGY- and sBLIMP-style pairs, where the config names some (tables.probes)."""
    cfg = ask.config
    if not cfg.tables.probes:
        return [not_measured("IV", "stage 1", f"{name} %", "no pairs: name folders with a gold.csv, tables.probes="
                             f"{{{name}: FOLDER}}", paper) for name, paper in (("sWUGGY", 71.5), ("sBLIMP", 64.7))]
    from audiolm.eval.probes import measure_probes

    return measure_probes(cfg.tables.probes, ask.steps, cfg.lm.semantic.where, cfg.run.seed, ask.device, ask.out.progress)


def attention(ask: Ask) -> list[Row]:
    """Where stage 2 looks among the semantic tokens."""
    from audiolm.eval.listening import listening

    lm, clips = _system(ask), _ladder_clips(ask)
    rows, pictures = listening(lm, clips, ask.folder, ask.config.run.seed, ask.out.progress)
    store.put_json(store.join(ask.folder, "sounds.json"), [
        {"group": "Stage 2's attention over the semantic tokens", "title": name.rsplit("/", 1)[-1].removesuffix(".png"),
         "file": name, "prompt_s": None} for name in pictures])
    return rows


def temperatures(ask: Ask) -> list[Row]:
    """How the sound changes with the temperature."""
    from audiolm.eval.temperatures import sweep

    cfg = ask.config
    rows, rungs = sweep(_system(ask), _ladder_clips(ask), cfg.samples.prompt_s, ask.folder, cfg.run.seed,
                        cfg.tables.temperatures, ask.out.progress)
    store.put_json(store.join(ask.folder, "sounds.json"), [
        {"group": r["rung"], "title": f["clip"], "file": f["file"], "prompt_s": None} for r in rungs for f in r["files"]])
    return rows


def dnsmos(ask: Ask) -> list[Row]:
    """A network's marks for the sound."""
    from audiolm.eval import dnsmos as marks

    made = _made(ask, "continued", lambda: _continued(ask), marks.PLAN)
    return marks.dnsmos_rows(made, ask.config.run.seed, ask.out.progress)


def text(ask: Ask) -> list[Row]:
    """Whether what continuations say is likely and does not repeat itself."""
    from audiolm.eval.gen_text import PLAN, text_rows

    t = ask.config.tables
    made = _made(ask, "continued", lambda: _continued(ask), PLAN)
    return text_rows(made, t.text_model, t.asr, ask.device, ask.config.run.seed, ask.out.progress)


def notes(ask: Ask) -> list[Row]:
    """Piano: what is played, in figures."""
    from audiolm.eval.notes import PLAN, note_rows

    return note_rows(_made(ask, "continued", lambda: _continued(ask), PLAN), ask.config.run.seed, ask.out.progress)


SUITES: dict[str, Callable[[Any], list[Row]]] = {
    "abx": table_i, "wer": table_ii, "speakers": table_iii, "detector": detector, "likelihood": likelihood,
    "attention": attention, "temperatures": temperatures, "fad": fad, "dnsmos": dnsmos, "text": text, "notes": notes}
OPTIONAL = ("dnsmos", "text", "notes")  # slow, or for some corpora: run where they are named
NEEDS = {**dict.fromkeys(SUITES, NEEDED), "abx": ("kmeans", "codec"),
         "likelihood": ("kmeans", "semantic_tokens", "lm_semantic")}


def _most_s(ask: Ask) -> float:
    return min(items.MOST_S, generated.longest_s(ask.steps))


def _continued(ask: Ask) -> list:
    cfg, most_s = ask.config, _most_s(ask)
    least_s = min(cfg.samples.prompt_s + LEAST_S, most_s)
    return items.to_continue(ask.steps["manifest"], cfg.tables.continued, cfg.run.seed, least_s)


def _made(ask: Ask, name: str, choose: Callable[[], Sequence], modes: Mapping[str, int]) -> list[generated.Made]:
    """The sounds of some modes of the clips, which `name` keeps by id."""
    cfg, folder = ask.config, _beside(ask, "sounds")
    chosen = items.frozen(store.join(ask.folder, f"{name}.json"), ask.steps["manifest"], choose)
    clips = items.read(chosen, roots(cfg.corpus), _most_s(ask))
    if "lm_fine" not in ask.steps:  # all levels are coarse: nothing stands between codec and coarse stage
        modes = {mode: n for mode, n in modes.items() if mode not in ("levels", "fine")}
    wanted, draws = generated.plan(clips, modes, cfg.samples.prompt_s), draws_of(cfg.samples)
    how = (folder, cfg.run.seed, ask.device, draws)
    tasks = generated.missing(ask.steps, clips, wanted, folder, cfg.run.seed, draws)
    if tasks:
        fan_out(generated.make_batch, [(dict(ask.steps), *task, *how) for task in tasks], out=ask.out, cluster=cfg.cluster,
                unit="batches of sounds", gpu=ask.device == "cuda")
    return generated.make(ask.steps, clips, wanted, *how)


def _play(ask: Ask, made: Sequence[generated.Made]) -> None:
    """Leaves some clips' sounds to listen to."""
    heard = list(dict.fromkeys(m.wanted.clip for m in made))[:PLAYED]
    entries = []
    for m in made:
        if m.wanted.clip in heard:
            mode, file = m.wanted.mode, f"wav/{len(entries)}.wav"
            store.put(store.join(ask.folder, file), wav_bytes(np.asarray(m.wav_T)))
            prompt_s = m.wanted.prompt / SAMPLE_RATE if mode == "continuation" else None
            entries.append({"group": generated.ITEMS[mode], "title": f"{m.wanted.clip} {m.wanted.number + 1}", "file": file,
                            "prompt_s": prompt_s})
    store.put_json(store.join(ask.folder, "sounds.json"), entries)


def _beside(ask: Ask, name: str) -> str:
    return store.join(ask.folder.rsplit("/", 1)[0], name)


def _system(ask: Ask) -> AudioLM:
    from audiolm.lm.system import load

    return load(ask.steps, ask.device, draws=draws_of(ask.config.samples))


def _ladder_clips(ask: Ask) -> list:
    from audiolm.eval.ladder import held_out

    cfg = ask.config
    where = cfg.lm.fine.where if "lm_fine" in ask.steps else cfg.lm.coarse.where
    return held_out(ask.steps["manifest"], roots(cfg.corpus), cfg.evaluate.clips, min(cfg.evaluate.clip_s, _most_s(ask)), where)
