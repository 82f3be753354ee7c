"""The folder where torch.compile keeps what it compiled, for later runs on the same kind of machine.

torch looks entries up by its own version, the GPU and the code, and takes no notice of a torn or foreign one.  An entry that
fits is unpickled and run, so the folder is one of the user's own and never part of a store, which others may write to.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # torch's variable; Triton's kernels lie below it too


def keep_compiled() -> None:
    """Has this process keep compiled code in ~/.cache/audiolm/inductor, unless TORCHINDUCTOR_CACHE_DIR names a folder.

    torch's own choice is the temporary folder, which a reboot or a new container empties.
    """
    if FOLDER in os.environ:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "audiolm", "inductor")
        folder.mkdir(0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none that can be written to: torch's choice stays
        return
    if os.access(folder, os.W_OK):
        os.environ[FOLDER] = str(folder)
