"""The sections of the measurements: codec, stages and ladder at the end of a run, and the paper's tables."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from audiolm.config.base import Config, Later, PathField, Runtime


class EvaluateConfig(Config):
    """Measurements of codec and stages on held-out clips."""

    clips: int = Field(8, ge=1, description="held-out clips for codec figures and the ladder")
    clip_s: float = Field(8.0, gt=0, description="seconds of each such clip")
    rows: int = Field(64, ge=1, description="held-out crops a stage's losses are measured on")
    visqol: bool = Field(True, description="score codecs by ViSQOL too: 2 s a clip, codec and number of levels")
    wer: int = Field(8, ge=0, description="held-out utterances whose words a recogniser (tables.asr) must find again after the "
                                          "codec: 1 s for each, codec and number of levels; 0: none, as for music")
    lyra: Runtime[PathField | None] = Field(
        None, description="folder or URI of Lyra v2's .tflite models, to set it beside the codec")


class TablesConfig(Config):
    """The paper's tables, measured at the end of a run (step `tables`) and by workflows/evaluate.py."""

    suites: tuple[str, ...] = Field(("abx", "wer", "speakers", "detector", "likelihood", "attention", "temperatures", "fad"),
                                    description="of the step; empty: none")
    sounds: int = Field(20, ge=1, description="clips whose sound Table I scores")
    utterances: int = Field(100, ge=1, description="with a text, of 4 to 10 s, for Table II")
    asr: PathField | None = Field(None, description="folder or URI of a transformers speech recogniser; None: Whisper tiny.en")
    n_speaker_train: int = Field(6, ge=1, description="utterances of each speaker that train Table III's classifier")
    n_speaker_test: int = Field(2, ge=1, description="and other ones that it is tested on")
    net_steps: int = Field(600, ge=1, description="of the classifiers of Table III and of the detector")
    n_continuations: int = Field(100, ge=2, description="clips to continue, for detector, FAD, DNSMOS, text and notes")
    text_model: PathField | None = Field(None, description="folder or URI of a transformers causal model, for the suite text")
    mos_model: Annotated[PathField | None, Later(None)] = Field(
        None, description="folder or URI of a transformers ...ForSequenceClassification model of one label, for the suite mos")
    speaker_model: Annotated[PathField | None, Later(None)] = Field(
        None, description="folder or URI of a transformers ...ForXVector model, for speakers and voice; None: Resemblyzer")
    probes: dict[str, Runtime[PathField]] = Field(
        {}, description="{name: folder}: sWUGGY, sBLIMP and their like with a gold.csv, or StoryCloze's wavs")
    salmon: Annotated[dict[str, Runtime[PathField]], Later({})] = Field(
        {}, description="{name: folder of SALMon's layout, PART/sample_I_0.wav and _1.wav}, for the suite salmon")
    temperatures: tuple[float, ...] = (0.4, 0.6, 0.8, 1.0)
