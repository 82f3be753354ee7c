"""What several tests of training share."""

from __future__ import annotations

import pytest

from audiolm.data import parallel


@pytest.fixture(scope="module")
def one_thread():
    """Layers as small as the tests' only wait for each other on several threads."""
    with parallel.one_thread():
        yield
