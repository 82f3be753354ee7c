"""AudioLM (Borsos et al., 2209.03143) as a distributed workflow: raw audio in, generated audio out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from audiolm.generate.audiolm import AudioLM
    from audiolm.generate.params import SamplingParams
    from audiolm.tokenizers.base import Codec

__version__ = "0.1.0"


def load(run: str, device: str = "auto", sampling: Mapping[str, SamplingParams] | None = None, *,
         store: str = "./outputs", tracking: str | None = None) -> AudioLM:
    """Loads a trained run's system, ready to generate.

    `run` is the run's index (STORE/runs/NAME.json), its name in `store`, its MLflow run id, looked up at `tracking` (such a
    run lies in `store` too), or a published system's name. `sampling` has the sampling parameters by stage (default: those of
    the run's config). Raises ValueError for a run that is not finished.
    """
    from audiolm.data.parallel import pick_device
    from audiolm.generate.load import load_system, sampling_of, system_steps
    from audiolm.tracking.lookup import find_run

    index = find_run(run, store, tracking)
    steps = system_steps(index)
    return load_system(tuple(steps.items()), pick_device(device), tuple((sampling or sampling_of(index)).items()))


def load_codec(name_or_path: str, device: str = "auto") -> Codec:
    """Loads a codec, ready to encode and decode.

    `name_or_path` is a published codec's name (`audiolm.pretrained.names()`), a run's index (OUTPUTS/runs/NAME.json), a codec
    build's folder, or the folder of an EnCodec, DAC or Mimi model. Raises ValueError with the fix where there is no codec.
    """
    from audiolm.data.parallel import pick_device
    from audiolm.tokenizers.codec_lookup import open_codec

    return open_codec(name_or_path, pick_device(device))
