"""The end-to-end run is shared by this folder's tests."""

from tests.worlds.whole_run import checkout, head, job  # noqa: F401
