"""Units: the usable stretches of audio that a scan found, before splits and shards are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from audiolm.data.inputs.found import Found


@dataclass(frozen=True)
class Unit:
    """A usable stretch of one file: piece `piece` of `pieces` of row `row` of the sorted listing; `channel` as in Part."""

    row: int
    found: Found
    sample_rate: int
    start: int
    frames: int
    piece: int
    pieces: int
    channel: int | None = None

    @property
    def seconds(self) -> float:
        return self.frames / self.sample_rate

    @property
    def speaker(self) -> str:
        """The speaker's name; an unnamed speaker is its file."""
        return self.found.speaker or self.found.key

    @property
    def group(self) -> tuple[str, str]:
        """The source whose hours are shared out."""
        return self.found.origin, self.found.source

    @property
    def chapter(self) -> tuple[str | None, ...]:
        """The chapter whose utterances may be joined, with all that makes it unique."""
        return (*self.group, self.found.speaker, self.found.chapter)
