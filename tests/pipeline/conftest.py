"""The end-to-end run is shared by this folder's tests."""

from tests.worlds.page_commands import desk  # noqa: F401
from tests.worlds.whole_run import checkout, job  # noqa: F401
