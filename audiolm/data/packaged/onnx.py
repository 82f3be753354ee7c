"""ONNX networks that come inside packages. Only their weights are used, because the packages' own code needs librosa.
"""

from __future__ import annotations

import importlib.util
import posixpath
from typing import Any


def missing_dependency(package: str, install: str) -> str | None:
    """The packages that are not installed, with the fix; None where the network is at hand."""
    absent = [name.replace("_", "-") for name in (package, "onnxruntime") if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed: {install}" if absent else None


def session(package: str, file: str) -> Any:
    """An onnxruntime session of the package's file, on one thread, because more could sum in another order."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    folder = importlib.util.find_spec(package).submodule_search_locations[0]
    return onnxruntime.InferenceSession(posixpath.join(folder, file), options, providers=["CPUExecutionProvider"])
