"""Places: whether one lies below another, by path or URI."""

from __future__ import annotations

import os
import posixpath
from urllib.parse import unquote

from audiolm import store


def is_within(folder: str, path: str, follow_links: bool = True) -> bool:
    """True where `path` is `folder` or lies below it, `..` resolved; on a local disk symlinks too, with `follow_links`.

    False for a path that chains more filesystems (`::`) than the folder.
    """
    if path.count("::") > folder.count("::"):
        return False
    (kind, base), (other, place) = _plain(folder, follow_links), _plain(path, follow_links)
    return kind == other and f"{place}/".startswith(base if base == "/" else f"{base}/")


def _plain(path: str, follow_links: bool) -> tuple[str, str]:
    """(protocol, path without `..`)."""
    if store.is_local(path):
        resolve = os.path.realpath if follow_links else os.path.normpath
        return "file", resolve(store.absolute(path))
    protocol, _, rest = path.partition("://")
    return protocol, posixpath.normpath(unquote(rest))  # a web server reads %2e as a dot
