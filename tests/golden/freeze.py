"""Golden runs: the losses of every training objective, and tokens, samples and figures of a tiny pipeline, bit for bit.

    python tests/golden/freeze.py                   compares with the files beside this one; exit status 1 on a difference
    python tests/golden/freeze.py --only codec,lm_fine
    python tests/golden/freeze.py --write           records anew, which is right only where the change was meant

Last bits depend on the processor and on the versions of torch and numpy, which each file names.  On another machine
losses are compared with a relative tolerance and the rest is skipped; to compare all of it there, record in a checkout
of a commit that is known to be right (`--write --files FOLDER`) and compare with that (`--files FOLDER`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # the code of this checkout, whatever is installed

from audiolm.config.load import load_config  # noqa: E402
from audiolm.dag.execute import run_step  # noqa: E402
from audiolm.dag.step import Artifact  # noqa: E402
from tests.worlds import token_corpus  # noqa: E402
from workflows.full_pipeline import graph  # noqa: E402

TINY = str(HERE / "tiny.yaml")
RTOL = 1e-4  # of losses, on another machine
NOTHING = "nothing compared"
SHOWN = 12  # differences of a golden that are printed
CLOCKS = ("step_s", "units_per_s", "seconds")  # numbers that time alone decides
W2VBERT = ["semantic.iterations=[]", "semantic.model.objective=w2vbert",
           "semantic.model.w2vbert={codes: 24, code_dim: 16, negatives: 20, gumbel: [2.0, 0.5, 0.98]}"]
BALANCED = ["codec.balance=true", "codec.weights={reconstruction: 1, waveform: 1, feature: 1, adversarial: 0.3}"]
PAPER = ["codec.losses=soundstream", "codec.quantizer=factorised", "codec.code_dim=4",
         "codec.weights={reconstruction: 1, feature: 100}"]
SPECTRAL = ["codec.family=spectral", "codec.quantize_from=0", "codec.weights={commitment: 0.1}", "codec.quantizer_dropout=0.5",
            "codec.spectral={n_mels: 20, width: 16, enc_layers: 1, dec_layers: 1, iterations: 4}"]
PARALLEL = ["lm.acoustic=parallel", "lm.dedupe=false", "lm.condition_dropout=0.1",
            "lm.parallel={crop_s: 2.0, dim: 32, layers: 2, heads: 2, ff: 64, gates: warn, train: {steps: 20, batch: 4, "
            "lr: 5.0e-3, warmup_steps: 5, decay_steps: 5, eval_every: 10, save_every: 10, log_every: 1, engine: torch}}"]
HEARING = [*SPECTRAL, "lm.dedupe=false", "lm.decoder={crop_s: 1.0, width: 16, layers: 1, train: {steps: 20, batch: 4, "
           "lr: 5.0e-3, warmup_steps: 5, decay_steps: 5, eval_every: 10, save_every: 10, log_every: 1, engine: torch}}"]
FSQ = [*SPECTRAL, "codec.quantizer=fsq", "codec.spectral.fsq=[4, 4]"]
BY_FRAME = ["lm.lengths=true", "lm.conditioning=aligned", "lm.condition_dropout=0.1", "lm.coarse.kind=frame",
            "lm.coarse.depth={dim: 16, layers: 2, ff: 32}"]
SHIPPED = ("scratch", "small", "speech", "piano", "paper")
FRAMES = {"train": [300, 250, 160, 100, 60, 17, 9, 5], "dev": [180, 90, 33, 12]}  # of the planted clips, at 25 Hz


# --- what is run

def build(name: str, folder: str, overrides: list[str] = (), planted: dict[str, Artifact] | None = None) -> Artifact:
    """A step of the tiny pipeline, after the steps it needs; `planted` artifacts stand in for some of them."""
    cfg = load_config(TINY, [*overrides, f"store={folder}"])
    return _finished(next(s for s in graph(cfg) if s.name == name), folder, planted or {})


def _finished(step, folder: str, planted: dict[str, Artifact]) -> Artifact:
    inputs = {s.name: planted.get(s.name) or _finished(s, folder, planted) for s in step.inputs}
    return run_step(step, folder, inputs, inline=True)  # at once where the folder has it


def planted_tokens(folder: str) -> dict[str, Artifact]:
    """A manifest and token stores of a known law, so that no tokenizer's bits reach the language models."""
    corpus = token_corpus.make(f"{folder}/planted", FRAMES, runs=True)
    healthy = {"frames": 10_000}  # the facts that the gates ask for
    for q in range(token_corpus.N_Q):
        healthy |= {f"used.q{q:02d}": token_corpus.VOCAB, f"entropy_bits.q{q:02d}": math.log2(token_corpus.VOCAB)}
    return {name: Artifact(path, f"{name}.0001", healthy) for name, path in corpus.paths.items()}


def training(step: str, *overrides: str) -> Callable[[str], dict]:
    """A golden: the losses of a training step's 20 updates, and the last one's other metrics with its validation."""
    def run(folder: str) -> dict:
        # a decoder needs a codec that the tokens are of
        planted = planted_tokens(folder) if step.startswith("lm_") and step != "lm_decoder" else {}
        metrics = _metrics(build(step, folder, list(overrides), planted).folder)
        losses = [metrics[n]["loss"] for n in sorted(metrics)]
        return {"machine": machine(), "about": [round(x, 4) for x in losses], "losses": [x.hex() for x in losses],
                "last": _figures(metrics[len(losses)])}
    return run


def _metrics(path: str) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for file in sorted(Path(path).glob("metrics-*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            found.setdefault(row["step"], {}).update(row["metrics"])
    return found


def pipeline(folder: str) -> dict:
    """A golden: tokens of both kinds, validation losses of the stages and samples of the whole tiny pipeline."""
    samples = Path(build("samples", folder).path)
    stages = {name: build(name, folder).facts["val.loss"] for name in ("lm_semantic", "lm_coarse", "lm_fine")}
    return {"machine": machine(), "validation": {name: loss.hex() for name, loss in stages.items()},
            "tokens": {name: _tokens(build(name, folder).path) for name in ("semantic_tokens", "acoustic_tokens")},
            "samples": {e["file"]: _sample(samples, e) for e in json.loads((samples / "samples.json").read_text())}}


def _tokens(path: str) -> dict:
    """Every column of a token store: a digest, and of the levels also the codes in use and the first ones."""
    tables = [pq.read_table(file) for file in sorted(Path(path).glob("shard-*.parquet"))]
    found = {"shards": len(tables)}
    for column in tables[0].column_names:
        rows = [row for table in tables for row in table[column].to_pylist()]
        found[column] = {"rows": len(rows), "sha256": _sha256(json.dumps(rows).encode())}
        if isinstance(rows[0], list):
            found[column] |= {"used": len({code for row in rows for code in row}), "first": rows[0][:12]}
    return found


def _sample(folder: Path, entry: dict) -> dict:
    pcm_T, rate = soundfile.read(folder / entry["file"], dtype="int16")
    rms = float(np.sqrt(np.mean(np.square(pcm_T / 2**15))))
    return {"rate": rate, "samples": len(pcm_T), "rms": round(rms, 5), "peak": entry["peak"], "clip": entry["clip"],
            "sha256": _sha256(pcm_T.tobytes())}


def evaluation(folder: str) -> dict:
    """A golden: the numbers that the steps which measure the tiny system leave."""
    steps = ("codec_figures", "semantic_figures", "evaluate", "tables")
    return {"machine": machine(), "figures": {name: _figures(build(name, folder).facts) for name in steps}}


def _figures(facts: dict) -> dict[str, str]:
    numbers = {k: v for k, v in facts.items() if isinstance(v, (int, float)) and k not in CLOCKS}
    return {k: float(numbers[k]).hex() for k in sorted(numbers)}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fingerprints(folder: str = "") -> dict:
    """A golden: the recipes of every step of the shipped configs and of the tiny ones. No machine changes them."""
    configs = {name: load_config(str(ROOT / "workflows" / f"{name}.yaml")) for name in SHIPPED}
    configs |= {"tiny": load_config(TINY), "tiny w2vbert": load_config(TINY, W2VBERT)}
    return {name: {key: value for s in graph(cfg) for key, value in _recipe(s)} for name, cfg in configs.items()}


def _recipe(step) -> Iterator[tuple[str, str]]:
    yield step.name, step.fingerprint
    if step.trains:
        yield f"{step.name} trunk", step.trunk


GOLDENS: dict[str, Callable[[str], dict]] = {
    "fingerprints": fingerprints, "lm_semantic": training("lm_semantic"), "lm_coarse": training("lm_coarse"),
    "lm_coarse_frame": training("lm_coarse", *BY_FRAME), "lm_fine": training("lm_fine"),
    "lm_parallel": training("lm_parallel", *PARALLEL), "lm_decoder": training("lm_decoder", *HEARING),
    "masked": training("masked_model"), "masked_2": training("masked_model_2"),
    "w2vbert": training("masked_model", *W2VBERT), "codec": training("codec"),
    "codec_balanced": training("codec", *BALANCED), "codec_paper": training("codec", *PAPER),
    "codec_spectral": training("codec", *SPECTRAL), "codec_fsq": training("codec", *FSQ),
    "vocoder": training("semantic_vocoder"), "pipeline": pipeline,
    "evaluation": evaluation}


# --- how it is compared

def machine() -> dict[str, str]:
    """What the last bits depend on."""
    info, cpu = Path("/proc/cpuinfo"), {}
    if info.exists():
        cpu = dict(map(str.strip, line.split(":", 1)) for line in info.read_text().splitlines() if ":" in line)
    return {"torch": torch.__version__, "numpy": np.__version__, "capability": torch.backends.cpu.get_cpu_capability(),
            "cpu": ", ".join(cpu.get(key, platform.machine()) for key in ("model name", "cpu family", "model"))}


def compare(name: str, found: dict, files: Path = HERE) -> tuple[list[str], str]:
    """(differences from the file of that name, a note where not everything could be compared)."""
    if not (file := files / f"{name}.json").exists():
        return [f"{name}: there is no {file}; record it with --write --only {name}"], ""
    expected = json.loads(file.read_text())
    here, there = found.get("machine"), expected.get("machine")
    if here == there:
        return list(_differences(name, expected, found)), ""
    changed = ", ".join(f"{k} {there.get(k)} -> {here[k]}" for k in here if here[k] != there.get(k))
    note = f"another machine ({changed}): " + (f"losses compared with rtol {RTOL:g}, the rest skipped" if "losses" in expected
                                               else NOTHING)
    return list(_differences(f"{name}.losses", expected.get("losses"), found.get("losses"), RTOL)), note


def _differences(where: str, old, new, rtol: float = 0.0) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from _differences(f"{where}.{key}", old.get(key, "absent"), new.get(key, "absent"), rtol)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{where}[{i}]", a, b, rtol)
    elif old != new:
        hexadecimal = all(isinstance(x, str) and "0x" in x for x in (old, new))
        a, b = map(float.fromhex, (old, new)) if hexadecimal else (old, new)
        if not hexadecimal:
            yield f"{where}: {a} -> {b}"
        elif not math.isclose(a, b, rel_tol=rtol):
            yield f"{where}: {a!r} -> {b!r}, relative {abs(a - b) / max(abs(a), abs(b)):.1e}"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--write", action="store_true", help="record what is computed now")
    p.add_argument("--only", metavar="NAME,...", default=",".join(GOLDENS), help="of " + ", ".join(GOLDENS))
    p.add_argument("--files", metavar="FOLDER", type=Path, default=HERE, help="where the golden files are")
    args = p.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - set(GOLDENS):
        p.error(f"--only: no golden named {', '.join(sorted(unknown))}; there are {', '.join(GOLDENS)}")
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:  # one for all: a step that two goldens share runs once
        for name in names:
            began = time.monotonic()
            found = GOLDENS[name](folder)
            if args.write:
                args.files.mkdir(parents=True, exist_ok=True)
                (args.files / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
            differences, note = compare(name, found, args.files)
            failed += bool(differences)
            how = verdict(differences, note, args.write)
            print(f"{name:16}{how:9}{time.monotonic() - began:5.1f} s  {note}".rstrip(), flush=True)
            for line in differences[:SHOWN] + ([f"and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else []):
                print(f"    {line}")
    return 1 if failed else 0


def verdict(differences: list[str], note: str, written: bool) -> str:
    if written or differences:
        return "written" if written else "DIFFERS"
    return "skipped" if NOTHING in note else "close" if note else "equal"


if __name__ == "__main__":
    sys.exit(main())
