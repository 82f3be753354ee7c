"""Codecs by name: a published model, the codec of a run, a build, or a folder in transformers' format."""

from __future__ import annotations

from typing import Any

from audiolm import pretrained, store
from audiolm.dag.run_index import OUTPUTS, index_path, steps_of

DEFAULT_RUN = index_path(OUTPUTS, "quickstart")


def default_codec() -> str:
    """The quickstart's run index below ./outputs; where there is none, the published codec, if this package has it."""
    if not store.exists(DEFAULT_RUN) and pretrained.DEFAULT_CODEC in pretrained.names():
        return pretrained.DEFAULT_CODEC
    return DEFAULT_RUN


def codec_folder(place: str | None) -> str:
    """The folder of a published codec's name, of the codec in a run's index (runs/NAME.json), or `place` itself.

    None: that of `default_codec`. Raises ValueError with the fix for an index that is missing or has no codec.
    """
    path = pretrained.resolve(place or default_codec())
    if path.endswith(".json"):
        if not store.exists(path):
            raise ValueError(f"--codec: there is no run index {path}; train a codec with `python workflows/full_pipeline.py`, "
                             "or name a run (OUTPUTS/runs/NAME.json), a codec build or an imported codec's folder with --codec")
        steps = steps_of(path)
        if "codec" not in steps:
            raise ValueError(f"--codec: {path} names no finished step `codec`; run its workflow with --only manifest,codec")
        path = steps["codec"]
    return path


def open_codec(place: str | None, device: str = "cpu") -> Any:
    """The codec of a published name, a run's index, a build or a folder in transformers' format.

    None: that of `default_codec`. Raises ValueError with the fix where there is none.
    """
    path = codec_folder(place)
    if store.exists(store.join(path, "export", "config.json")):
        from audiolm.tokenizers.acoustic import load_codec

        codec = load_codec(path, device)
    elif store.exists(store.join(path, "config.json")):
        from audiolm.tokenizers.hf_codec import load_pretrained_codec

        codec = load_pretrained_codec(path, device)
    else:
        raise ValueError(f"--codec: {path} holds no codec (no export/config.json of a build and no config.json of an "
                         "imported one); give a codec build's folder, a run's index runs/NAME.json or a published codec's name "
                         f"({', '.join(pretrained.names()) or 'there is none here'})")
    if codec.spec.vocab > 1 << 16:
        raise ValueError(f"--codec: {path} has {codec.spec.vocab} codes a level; codes files hold 16 bits, so at most 65536")
    return codec
