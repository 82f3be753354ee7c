"""The corpus section: sources of audio, splits and shards, and the filter of clips that other sections use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from audiolm.config.base import Config, Later, PathField, Runtime
from audiolm.places import protocols


class _Source(Config):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")


class FolderSource(_Source):
    """Audio files under any fsspec URI. `speaker` says which part of the path names the speaker."""

    kind: Literal["folder"]
    root: Runtime[PathField]
    glob: str = "**/*"
    speaker: Literal["none", "parent", "grandparent"] = Field("none", description="none: every file is its own speaker")
    split: Literal["train", "dev", "test"] | None = Field(None, description="put all of it there; None splits by speaker")


class LibriSpeechSource(_Source):
    """SUBSET/SPEAKER/CHAPTER/*.flac with optional *.trans.txt (LibriSpeech), or Libri-Light's SPEAKER/BOOK/*.flac."""

    kind: Literal["librispeech"]
    root: Runtime[PathField]
    splits: dict[str, Literal["train", "dev", "test"]] | None = Field(
        None, description="subset folder -> split; None: train*/dev*/test* by name, else split by speaker")


Columns = dict[Literal["uri", "audio", "start", "duration", "speaker", "source", "split", "text"], str]


class ManifestSource(_Source):
    """The user's own table: uri, and where present start, duration (seconds), speaker, source, split, text.

    It is Parquet, a folder of Parquet, CSV or JSON lines.  Parquet with sounds in a column `audio` (Hugging Face's Audio
    feature) needs no uri."""

    kind: Literal["manifest"]
    uri: Runtime[PathField]
    root: Runtime[PathField | None] = Field(None, description="the folder that all uris lie below, and that relative ones are "
                                            "relative to; None = the table's")
    columns: Annotated[Columns, Later({})] = Field({}, description="names of the table's columns where they are others, "
                                                   "such as {speaker: speaker_id}")


class WebDatasetSource(_Source):
    """Tars of samples, NAME.flac beside NAME.json and NAME.txt; each is read in order, once, and by ranges afterwards.

    The JSON may give speaker, source, split and text, NAME.txt the text."""

    kind: Literal["webdataset"]
    root: Runtime[PathField]
    glob: str = "**/*.tar"
    speaker: Literal["none", "parent", "grandparent"] = Field("none", description="of NAME, where the JSON has none")
    split: Literal["train", "dev", "test"] | None = Field(None, description="put all of it there; None splits by speaker")
    columns: Columns = Field({}, description="names of the JSON's fields where they are others, such as {speaker: spk_id}")


class SharSource(_Source):
    """A Lhotse Shar folder: cuts.*.jsonl.gz with the supervisions, and the audio of one of its fields as tars."""

    kind: Literal["shar"]
    root: Runtime[PathField]
    field: str = Field("recording", pattern=r"^[A-Za-z0-9_]+$", description="the field whose tars hold the audio")
    split: Literal["train", "dev", "test"] | None = Field(None, description="put all of it there; None splits by speaker")


class MaestroSource(_Source):
    """MAESTRO's folder: maestro-v3.0.0.csv and YEAR/*.wav. Its splits are by piece, and the piece stands for the speaker."""

    kind: Literal["maestro"]
    root: Runtime[PathField]


Source = Annotated[FolderSource | LibriSpeechSource | ManifestSource | WebDatasetSource | SharSource | MaestroSource,
                   Field(discriminator="kind")]


class CorpusConfig(Config):
    name: str
    revision: int = Field(1, ge=1, description="raise it when files were added or changed on purpose")
    sources: tuple[Source, ...] = Field(min_length=1)
    sample_rate: int = 16_000  # paper III-B
    min_s: float = Field(0.5, gt=0)
    max_s: float = Field(60.0, gt=0, description="longer audio is cut")
    join_s: float = Field(30.0, ge=0, description="consecutive utterances of a chapter are joined up to this; 0 = off")
    dev: float = Field(0.05, ge=0, lt=0.5, description="share of hours, by speaker, where the corpus has no splits")
    test: float = Field(0.05, ge=0, lt=0.5)
    hold_out: Annotated[dict[Literal["dev", "test"], tuple[str, ...]], Later({})] = Field(
        {}, description="speakers by name that are dev or test whatever else the corpus says")
    shard_s: float = Field(3600.0, gt=0, description="audio seconds in a shard, at most")
    max_rejected: float = Field(0.05, ge=0, le=1, description="share of files that may be unusable")
    silence_db: float = Field(-70.0, description="a clip whose peak lies below this (dBFS) is silent")
    min_band_hz: Annotated[float, Later(0.0)] = Field(
        0.0, ge=0, le=8000, description="reject files whose sound ends below it, as MP3 of 24 kb/s; 7000 suits codecs; 0 = off")
    min_speech: Annotated[float, Later(0.0)] = Field(
        0.0, ge=0, le=1, description="reject files of which a smaller share is speech, by Silero's detector; 0 = off")
    min_dnsmos: Annotated[float, Later(0.0)] = Field(
        0.0, ge=0, le=5, description="reject files with a lower DNSMOS (1 to 5), of at most four windows of 9 s; 0 = off")
    changed: Runtime[Literal["stop", "ignore"]] = Field("stop", description="what to do when the files changed")
    protocols: Runtime[tuple[str, ...]] = Field(("local", "s3", "gs", "hf"), description="of fsspec, by which sources are read")

    @model_validator(mode="after")
    def _check(self):
        for source in self.sources:
            for place in filter(None, (getattr(source, "root", None), getattr(source, "uri", None))):
                if unknown := protocols(place) - set(self.protocols):
                    raise ValueError(f"source {source.name!r} lies at {place!r}, and protocols are {list(self.protocols)}: "
                                     f"move it, or add {sorted(unknown)} to corpus.protocols")
        names = [s.name for s in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources must have different names, got {names}")
        if self.min_s >= self.max_s:
            raise ValueError(f"min_s ({self.min_s}) must be below max_s ({self.max_s})")
        dev, test = ({name.casefold().strip() for name in self.hold_out.get(split, ())} for split in ("dev", "test"))
        if both := dev & test:
            raise ValueError(f"hold_out names {sorted(both)} as dev and as test: keep each speaker in one")
        return self


class ClipFilter(Config):
    """The filter of the clips that a step reads; None lets all through."""

    source: tuple[str, ...] | None = Field(None, description="names of corpus sources")
