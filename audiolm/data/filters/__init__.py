"""Filters of the manifest: what a file must reach to be used. They are optional, and each decodes the file once more."""

from __future__ import annotations

from audiolm.config.corpus import CorpusConfig
from audiolm.data.containers.raw import Unusable

FIELDS = ("min_band_hz", "min_speech", "min_dnsmos")  # of corpus, in the order of their cost


def floors(corpus: CorpusConfig) -> dict[str, float]:
    """The filters that are on."""
    return {name: floor for name in FIELDS if (floor := getattr(corpus, name))}


def check(path: str, seconds: float, floors: dict[str, float]) -> None:
    """Raises Unusable with what a file has and what the first filter that it does not pass asks for."""
    for field, floor in floors.items():
        value, reason, what = _measured(field, path, seconds)
        if value < floor:
            raise Unusable(reason, f"{what}, corpus.{field} is {floor:g}")


def _measured(field: str, path: str, seconds: float) -> tuple[float, str, str]:
    """(value, reason, the value in words)."""
    if field == "min_band_hz":
        from audiolm.data.filters.band import band_hz

        return (hz := band_hz(path)), "narrow band", f"its sound ends at {hz:.0f} Hz"
    if field == "min_speech":
        from audiolm.data.filters.speech import speech_share

        return (share := speech_share(path)), "little speech", f"{share:.2f} of it is speech"
    from audiolm.data.filters.quality import dnsmos

    return (mark := dnsmos(path, seconds)), "low quality", f"its DNSMOS is {mark:.2f}"
