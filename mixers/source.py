"""What a registered mixer's code says, as a hash: a layer that is edited must not answer with older results."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys

from mixers.base import Mixer

# Code that this project's own version stands for, or that computes the same whatever the release.
_KNOWN = ("mixers", "torch", "abc", "builtins", "typing")


def foreign_code(cls: type[Mixer]) -> str:
    """A hash of the code that ``cls`` and its bases bring along from elsewhere; "" for a layer of this project.

    Hashed are the syntax trees, without comments and docstrings, of a plugin's file, or of all loaded modules of the
    class's package. What these import from other packages is not.
    """
    modules = {base.__module__ for base in cls.__mro__}
    foreign = sorted(name for name in modules if name.partition(".")[0] not in _KNOWN)
    if not foreign:
        return ""
    packages = {name.partition(".")[0] + "." for name in foreign}
    loaded = {name for name in sys.modules if name.startswith(tuple(packages))}
    files = {inspect.getsourcefile(sys.modules[name]) for name in {*foreign, *loaded} if _has_file(name)}
    digest = hashlib.sha256()
    for path in sorted(file for file in files if file):
        digest.update(_tree_hash(path).encode())
    return digest.hexdigest()[:16]


def _has_file(module: str) -> bool:
    return getattr(sys.modules[module], "__file__", None) is not None


@functools.cache
def _tree_hash(path: str) -> str:
    """Read once per process, when the module has been imported: what runs, not what an editor has saved since."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            del body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
