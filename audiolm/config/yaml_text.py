"""YAML as this project reads it: all unquoted scalars stay text, which the config's own types read.

So nothing is guessed: `no` is a name where a name is wanted and False where a switch is, speaker `007` keeps its zeros, 1e-3 is
a number, a date is no date.  null, ~ and an empty value are None.  A key that stands twice in a mapping is an error.
"""

from __future__ import annotations

from typing import Any

import yaml

NULLS = ("", "~", "null", "Null", "NULL")


class Plain(str):
    """An unquoted scalar; in messages it looks as it was written."""

    def __repr__(self) -> str:
        return str(self)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {first: [r for r in rules if r[0].endswith((":null", ":merge"))]
                               for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> str:
    return node.value if node.style else Plain(node.value)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                problem = f"the key {key.value!r} stands there twice: keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
    loader.flatten_mapping(node)
    found = loader.construct_mapping(node, deep=True)
    if wrong := [key for key in found if not isinstance(key, str)]:
        raise yaml.MarkedYAMLError(problem=f"the key {wrong[0]} is no text", problem_mark=node.start_mark)
    return found


_Loader.add_constructor("tag:yaml.org,2002:str", _scalar)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse(text: str | bytes) -> Any:
    """The value of a YAML text. Raises ValueError with the place and the reason, for more than one document too."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        fix = "; indent by spaces" if "'\\t'" in (e.problem or "") else ""
        raise ValueError(f"{place}{', '.join(filter(None, (e.context, e.problem)))}{fix}") from e
    except yaml.YAMLError as e:  # of its reader: bytes that are no UTF-8, characters that no text holds
        raise ValueError(f"{' '.join(str(e).split())}; save it as text in UTF-8") from e
    except (RecursionError, ValueError, TypeError) as e:  # an anchor that holds itself; an explicit tag's value
        raise ValueError(str(e) or type(e).__name__) from e
