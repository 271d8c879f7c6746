"""Which layers flash-linear-attention exports, and their constructors: read from its files, importing none of them.

Importing the library needs triton, takes seconds, and warns without a GPU; a plan of a sweep needs none of that.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIRED = object()  # the default of an argument that has none
_WORD_STARTS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@dataclass(frozen=True)
class Argument:
    """One argument of a constructor: its name, its annotation as written ("" where there is none), its default."""

    name: str
    annotation: str
    default: Any


@dataclass(frozen=True)
class Source:
    """A layer: ``name`` (ours, without ``fla:``), its module below ``fla.layers``, its class."""

    name: str
    module: str
    class_name: str


def package_folder() -> Path | None:
    """The folder ``fla/layers`` of the installed library; None where it isn't installed."""
    spec = importlib.util.find_spec("fla")
    folders = [] if spec is None else [Path(place) / "layers" for place in spec.submodule_search_locations or ()]
    return next((folder for folder in folders if (folder / "__init__.py").is_file()), None)


@functools.cache
def sources(folder: Path) -> dict[str, Source]:
    """The exported layers by our name.

    A module that exports one layer gives it its name (``gated_deltanet``); one that exports several gives
    ``<module>_<class>`` in snake case, the module's name not repeated (``yoco_gated_retention``).
    """
    tree = ast.parse((folder / "__init__.py").read_text())
    found: dict[str, Source] = {}
    for statement in tree.body:
        if not (isinstance(statement, ast.ImportFrom) and statement.level == 1 and statement.module):
            continue
        classes = [alias.name for alias in statement.names]
        for class_name in classes:
            name = statement.module
            if len(classes) > 1:
                name += "_" + _snake(class_name).removeprefix(f"{name}_")
            found[name] = Source(name, statement.module, class_name)
    return dict(sorted(found.items()))


@functools.cache
def arguments(folder: Path, source: Source) -> tuple[Argument, ...]:
    """The arguments of the layer's constructor, without ``self`` and ``**kwargs``."""
    tree = ast.parse((folder / f"{source.module}.py").read_text())
    layer = next(part for part in tree.body if isinstance(part, ast.ClassDef) and part.name == source.class_name)
    init = next(part for part in layer.body if isinstance(part, ast.FunctionDef) and part.name == "__init__")
    given = init.args.posonlyargs + init.args.args
    defaults = [REQUIRED] * (len(given) - len(init.args.defaults)) + [value_of(node) for node in init.args.defaults]
    pairs = [*zip(given, defaults, strict=True)][1:]
    for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
        pairs.append((argument, REQUIRED if default is None else value_of(default)))
    return tuple(
        Argument(argument.arg, ast.unparse(argument.annotation) if argument.annotation else "", default)
        for argument, default in pairs
    )


def value_of(node: ast.expr) -> Any:
    """The value of a default: a literal, ``float("...")``, or a tuple of these."""
    if isinstance(node, ast.Tuple):
        return tuple(value_of(item) for item in node.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "float":
        return float(ast.literal_eval(node.args[0]))
    return ast.literal_eval(node)


def _snake(class_name: str) -> str:
    return _WORD_STARTS.sub("_", class_name).lower()
