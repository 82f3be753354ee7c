"""Networks in transformers' format that score speech, by path: listeners' marks and speaker embeddings.

A MOS predictor is a `...ForSequenceClassification` model with one label, such as wav2vec 2.0, HuBERT or WavLM fine-tuned on
marks; its output is the mark, on the scale that it was trained on.  UTMOS (2204.02152) itself is no such model: its checkpoint
needs code of its own.  A speaker embedding is a `...ForXVector` model's, such as WavLM-SV.
A folder or URI holds config.json, model.safetensors and preprocessor_config.json; no pickle, no code of a model and no network
is used.  One wav at a time, so that a score does not depend on the others.  wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from audiolm import store
from audiolm.eval.models.asr import PRETRAINED
from audiolm.tokenizers import hf
from audiolm.tokenizers.base import SAMPLE_RATE

MOS, SPEAKER = "tables.mos_model", "tables.speaker_model"  # the config fields, which errors name
SHORTEST_S = 1.0  # shorter audio is repeated: x-vectors need 0.4 s of it
UNUSED = ("masked_spec_embed",)  # of training's masks


def missing_dependency() -> str | None:
    """The missing package, with the fix; None where models can be read."""
    return None if importlib.util.find_spec("transformers") else f"transformers not installed: {PRETRAINED}"


def mos_predictor(uri: str, device: str = "cpu") -> Callable[[np.ndarray], float]:
    """wav_T -> mark. Raises ImportError without transformers, ValueError where `uri` holds no model with one label."""
    run, config = _load(MOS, uri, "AutoModelForAudioClassification", "...ForSequenceClassification", device)
    if config.num_labels != 1:
        raise ValueError(f"{MOS}: {uri} has {config.num_labels} labels, a MOS predictor has one, whose score is the mark: give "
                         "a model that was trained with num_labels=1")
    return lambda wav_T: float(run(wav_T).logits[0, 0])


def voice_embedder(uri: str, device: str = "cpu") -> Callable[[np.ndarray], np.ndarray]:
    """wav_T -> unit vector. Raises ImportError without transformers, ValueError where `uri` holds no x-vector model."""
    import torch

    run, _ = _load(SPEAKER, uri, "AutoModelForAudioXVector", "...ForXVector", device)
    return lambda wav_T: torch.nn.functional.normalize(run(wav_T).embeddings[0], dim=0).cpu().numpy()


def _load(field: str, uri: str, auto: str, kind: str, device: str) -> tuple[Callable[[np.ndarray], Any], Any]:
    """(function of a wav that gives the model's output, the model's config)."""
    if why := missing_dependency():
        raise ImportError(why)
    import torch
    import transformers

    offline = {"local_files_only": True, "trust_remote_code": False}
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = store.local_copy(uri, folder)
            extract = transformers.AutoFeatureExtractor.from_pretrained(path, **offline)
            with hf.quiet_loading():
                model, report = getattr(transformers, auto).from_pretrained(
                    path, use_safetensors=True, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
                    **offline)
    except Exception as e:  # transformers raises many kinds for what is one fault: the files
        raise ValueError(f"{field}: {uri} holds no {kind} model of transformers ({e}): give a folder with config.json, "
                         "model.safetensors and preprocessor_config.json") from e
    # transformers draws the tensors that do not fit at random, such as the head of a model without one
    if wrong := hf.misfits(report, 0, UNUSED):
        raise ValueError(f"{field}: {uri} is no {type(model).__name__}; tensors {' and '.join(wrong)}: give a {kind} model, "
                         "saved with save_pretrained(folder)")
    if extract.sampling_rate != SAMPLE_RATE:
        raise ValueError(f"{field}: {uri} takes sound at {extract.sampling_rate} Hz: give a model for {SAMPLE_RATE} Hz")
    model.to(device).eval()

    @torch.inference_mode()
    def run(wav_T: np.ndarray) -> Any:
        if not len(wav_T):
            raise ValueError(f"{field}: a sound without samples has no score: give clips that last longer than their prompt")
        wav_T = np.resize(np.asarray(wav_T, np.float32), max(len(wav_T), round(SHORTEST_S * SAMPLE_RATE)))
        return model(**extract(wav_T, sampling_rate=SAMPLE_RATE, return_tensors="pt").to(device))

    return run, model.config
