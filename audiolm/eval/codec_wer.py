"""Word error rate of resynthesised speech: the share of words that a recogniser loses after a codec (paper, Table II).

The reference of a clip is its text; where clips have none, what the recogniser hears in the original.  Errors are summed over
clips, the interval comes from a bootstrap over clips.  wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.models import asr as recognisers

NO_WER = {"wer": None, "wer_interval": None}
NO_WORDS = "the recogniser hears no words in the originals"


@dataclass(frozen=True)
class Spoken:
    """Clips whose words count; `texts` None: transcripts of the originals are the references; `asr` as in `asr.recogniser`."""

    wavs: Sequence[np.ndarray]
    texts: Sequence[str] | None = None
    asr: str | None = None
    device: str = "cpu"


class WordErrors:
    """A recogniser, and the clips that have a reference of at least one word.

    Raises ImportError where the recogniser's packages are missing, ValueError where no reference has a word.
    """

    def __init__(self, spoken: Spoken):
        self._recognise = recognisers.recogniser(spoken.asr, spoken.device)
        heard = self._transcripts(spoken.wavs)  # the original is transcribed once, as every version of a clip
        texts = heard if spoken.texts is None else list(map(recognisers.normalise, spoken.texts))
        kept = [i for i, text in enumerate(texts) if text]
        if not kept:
            raise ValueError(NO_WORDS)
        self.wavs = [spoken.wavs[i] for i in kept]
        self._texts, self._heard = [texts[i] for i in kept], [heard[i] for i in kept]
        self.about = {"clips": len(kept), "words": sum(len(text.split()) for text in self._texts),
                      "reference": "transcripts" if spoken.texts is None else "texts",
                      "asr": spoken.asr or f"Whisper {recognisers.DEFAULT}"}

    def original(self) -> dict[str, Any]:
        """The WER of the originals, the lowest to expect: 0 where their transcripts are the references."""
        return self._rate(self._heard)

    def of(self, mades: Iterable[np.ndarray]) -> dict[str, Any]:
        """Returns "wer" in percent and "wer_interval" (low, high) of a version of `wavs`, in their order."""
        return self._rate(self._transcripts(mades))

    def _transcripts(self, wavs: Iterable[np.ndarray]) -> list[str]:
        return [recognisers.normalise(self._recognise(wav_T)) for wav_T in wavs]

    def _rate(self, transcripts: Sequence[str]) -> dict[str, Any]:
        counts = [recognisers.errors(text, said)[:2] for text, said in zip(self._texts, transcripts, strict=True)]
        rates = [100 * errors / words for errors, words in counts]
        value, low, high = bootstrap_interval(rates, range(len(rates)), weights=[words for _, words in counts])
        return {"wer": value, "wer_interval": [low, high]}


def word_errors(spoken: Spoken | None) -> WordErrors | str:
    """WordErrors, or the reason why no WER can be measured."""
    if spoken is None:
        return "switched off (evaluate.wer)"
    if why := recognisers.missing_dependency(spoken.asr):
        return why
    try:
        return WordErrors(spoken)
    except ValueError as e:
        return str(e)


def wer_note(about: dict[str, Any]) -> str:
    """The line below a table: recogniser, utterances and what the errors are counted against."""
    against = "their texts" if about["reference"] == "texts" else \
        "what it hears in the original, whose own WER is 0 for that reason"
    return f"WER: {about['clips']} utterances, {about['words']} words, by {about['asr']}, against {against}."
