"""The step `codec_figures`: the trained codec on held-out clips, beside Opus and Lyra, before any language model is trained.

Leaves `{out.path}/codec.json`: the table of eval.codec_quality.compare and "players": [{"clip", "files": [{"label", "file"}]}].
A wav and a spectrogram of each player go to `ui/codec/`, which the tracker shows.  Held-out means test, or dev where there is
none; clips are those that the codec may learn from (codec.where).
"""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np

from audiolm import store
from audiolm.config.codec import CodecMetricsConfig
from audiolm.data.audio import wav_bytes
from audiolm.data.parallel import cluster_device, parallel_map
from audiolm.data.sources import roots
from audiolm.eval import codec_gates, test_sets
from audiolm.eval.codec_quality import compare, default_levels, reconstructions
from audiolm.eval.codec_wer import Spoken
from audiolm.eval.ladder import held_out
from audiolm.eval.models.baseline_codecs import baselines, opus
from audiolm.render import plots
from audiolm.tokenizers.acoustic import load_codec

PLAYERS = 2  # clips with players at several numbers of levels


def measure_codec(config: dict[str, Any], inputs: dict[str, Any], out: Any) -> dict[str, Any]:
    """Step function. config: figures (CodecMetricsConfig), corpus, cluster; inputs: manifest, codec. Returns the main
    figures, flat, with those of the gates. Raises ValueError where nothing is held out, GateFailed (codec_gates)."""
    began, cluster, file = time.monotonic(), config["cluster"], store.join(out.path, "codec.json")
    # A build that a gate stopped has its table: the rerun, forced or not, only checks it again.
    if (table := store.get_json(file)) is None:
        device = cluster_device(cluster, out.inline)
        paths = {name: artifact.path for name, artifact in inputs.items()}
        item = (config["figures"], roots(config["corpus"]), paths, out.path, device)
        table, = parallel_map(codec_part, [item], out=out, cluster=cluster, unit="tables", gpu=device == "cuda")
        store.put_json(file, table)
    gates = codec_gates.check_codec(table, config["figures"].gates, out)
    return {**flat_facts(table), **gates, "seconds": round(time.monotonic() - began, 3)}


def codec_part(want: CodecMetricsConfig, source_roots: dict[str, str], paths: dict[str, str], folder: str,
               device: str) -> dict[str, Any]:
    """One task: the table at 1, Q', half and all levels, and the players' files."""
    codec = load_codec(paths["codec"], device)
    clips = held_out(paths["manifest"], source_roots, want.clips, want.clip_s, want.where)
    levels = sorted({*default_levels(codec), min(want.coarse_levels, codec.spec.n_q)})
    wavs = [wav for _, wav in clips]
    spoken = spoken_clips(want, source_roots, paths["manifest"], wavs, device) if want.wer else None
    table = {**compare(codec, wavs, baselines(want.lyra), levels, want.visqol, spoken), "players": []}
    for clip, wav in clips[:PLAYERS]:
        files = []
        for label, wav_T in reconstructions(codec, wav, levels, opus()[:1]):
            name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{clip.id}-{len(files)}-{label}")
            store.put(store.join(folder, f"ui/codec/{name}.wav"), wav_bytes(wav_T))
            store.put(store.join(folder, f"ui/codec/{name}.png"), plots.spectrogram(wav_T, label))
            files.append({"label": label, "file": f"ui/codec/{name}.wav"})
        table["players"].append({"clip": clip.id, "files": files})
    return table


def spoken_clips(want: CodecMetricsConfig, source_roots: dict[str, str], manifest: str, wavs: list[np.ndarray],
                 device: str) -> Spoken:
    """Whole held-out utterances with a text, as Table II's; where there is none, the first of `wavs` without references.

    The clips of the other metrics are cut, so their texts hold words that are not in the audio.
    """
    try:
        clips = test_sets.with_text(manifest, want.wer, where=want.where)
    except ValueError:
        return Spoken(wavs[:want.wer], None, want.asr, device)
    return Spoken([wav for _, wav in test_sets.read(clips, source_roots)], [clip.text for clip in clips], want.asr, device)


def flat_facts(table: dict[str, Any]) -> dict[str, float]:
    """The figures with all levels, the distance of the mean spectrum, and the number of levels that do not help."""
    names = {name: name for name in ("pesq", "stoi", "si_sdr", "mel", "wer")}
    if table["visqol"]:  # a name for each mapper, so that no chart mixes the two
        names["visqol"] = "visqol_lattice" if "lattice" in table["visqol"] else "visqol_exponential"
    best = table["levels"][-1]
    facts = {name: best[k] for k, name in names.items() if best.get(k) is not None}
    facts |= {"mean_spectrum_mel": table["mean_spectrum_mel"], "levels_that_do_not_help": len(table["levels_that_do_not_help"])}
    return {k: round(float(v), 6) for k, v in facts.items()}
