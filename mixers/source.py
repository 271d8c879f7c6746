"""What code says, as hashes: results of a layer or a training loop that is edited must not answer for older ones.

Comments, docstrings and blank lines say nothing, and hashes do not depend on the version of Python. Files that are as
they were released say nothing either: for them the release's own version of results stands.
"""

from __future__ import annotations

import ast
import base64
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import sys
from pathlib import Path

import mixers
from mixers.base import Mixer

# Code that this project's own files stand for, or that computes the same whatever the release.
_KNOWN = ("mixers", "torch", "abc", "builtins", "typing")
_TOP = Path(mixers.__file__).resolve().parent.parent
# Parts of this package that decide what is accepted and listed, not what a layer computes.
NEUTRAL = frozenset(
    {"mixers.cli", "mixers.contract", "mixers.declaration", "mixers.errors", "mixers.registry", "mixers.source"}
)


def foreign_code(cls: type[Mixer]) -> str:
    """A hash of the code that ``cls`` and its bases bring along from elsewhere; "" for a layer of this project.

    That of a plugin's file, or of all loaded modules of the class's package. What these import from other packages is
    not part of it.
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
        digest.update(_read(Path(path))[0].encode())
    return digest.hexdigest()[:16]


def mixer_code(cls: type[Mixer]) -> dict[str, str]:
    """File -> hash, of this project's files that ``cls`` and its bases are made of; see :func:`own_code`."""
    return own_code(frozenset(base.__module__ for base in cls.__mro__), NEUTRAL)


@functools.cache
def own_code(modules: frozenset[str], neutral: frozenset[str]) -> dict[str, str]:
    """File -> hash, of ``modules`` and all of this project that they import, wherever in their text.

    Left out are files as they were released, ``neutral`` modules, and what only these import.
    """
    if not _edited_files():
        return {}
    seen: dict[str, str] = {}
    waiting = sorted(modules)
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if path is None or name in seen or any(name == stop or name.startswith(f"{stop}.") for stop in neutral):
            continue
        seen[name], imported = _read(path)
        package = name.rpartition(".")[0]
        waiting += [*imported, *([package] if package else [])]
    shown = {_file_of(name): code for name, code in seen.items()}
    return {path.relative_to(_TOP).as_posix(): shown[path] for path in sorted(shown) if path in _edited_files()}


def code_of(text: str) -> str:
    """Python source without what says nothing: comments, docstrings, blank lines, blanks at the end of a line."""
    source = text.encode()
    starts = [0]
    for line in source.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)

    def span(node: ast.expr | ast.stmt) -> slice:
        return slice(starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)

    is_string = bytearray(len(source))
    blanked = bytearray(source)
    docstrings: set[ast.AST] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            docstrings.add(body[0].value)
            where = span(body[0])
            blanked[where] = bytes(byte if byte == 10 else 32 for byte in source[where])
        elif node not in docstrings and _is_string(node):
            where = span(node)
            is_string[where] = b"\1" * (where.stop - where.start)
    lines = []
    for start, end in itertools.pairwise(starts):
        comment = blanked.find(b"#", start, end - 1)
        while comment >= 0 and is_string[comment]:
            comment = blanked.find(b"#", comment + 1, end - 1)
        line = blanked[start : comment if comment >= 0 else end - 1]
        in_string = end <= len(source) and is_string[end - 1]  # it goes on beyond the line: its blanks are its own
        if in_string or line.strip():
            lines.append(bytes(line if in_string else line.rstrip()))
    return b"\n".join(lines).decode()


@functools.cache
def _read(path: Path) -> tuple[str, frozenset[str]]:
    """Hash of a file's code, and names of modules that it imports, perhaps of attributes of them.

    Read once per process, when the module has been imported: what runs, not what an editor has saved since.
    """
    text = path.read_text(encoding="utf-8")
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return hashlib.sha256(code_of(text).encode()).hexdigest()[:16], frozenset(names)


@functools.cache
def _file_of(module: str) -> Path | None:
    """The file of a module of this project, None for any other name."""
    if module.partition(".")[0] not in ("mixers", "experiments"):
        return None
    base = _TOP.joinpath(*module.split("."))
    return next((path for path in (base / "__init__.py", base.with_name(f"{base.name}.py")) if path.is_file()), None)


@functools.cache
def _edited_files() -> frozenset[Path]:
    """Files of this project that are not as an installation put them here: in a checkout, all of them."""
    found = {path for package in ("mixers", "experiments") for path in (_TOP / package).rglob("*.py")}
    try:
        installed = importlib.metadata.distribution("mixlab").files or []
    except importlib.metadata.PackageNotFoundError:
        return frozenset(found)
    for file in installed:
        path = Path(file.locate()).resolve()
        if path in found and file.hash is not None and file.hash.value == _record_hash(path):
            found.discard(path)
    return frozenset(found)


def _record_hash(path: Path) -> str:
    """As installers write it into RECORD."""
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()


def _has_file(module: str) -> bool:
    return getattr(sys.modules[module], "__file__", None) is not None


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)))


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
