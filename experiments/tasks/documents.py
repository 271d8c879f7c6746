"""Documents of a text corpus, in a fixed order: (name, bytes) from files, folders, globs, JSON lines and gzip."""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from experiments.errors import UserError

# Of the standard library: installed packages are not part of it, and its tests are unlike other source text.
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
SUFFIX_JSONL = (".jsonl", ".jsonl.gz")


class Document(NamedTuple):
    """``name`` is relative to the corpus, so that it is the same on every machine."""

    name: str
    content: bytes


def read_documents(path: str | None, text_field: str, max_bytes: int | None) -> Iterator[Document]:
    """Non-empty documents of ``path`` in the order of their names, up to ``max_bytes`` in all: the last one is cut.

    ``path`` is a file, a folder (with all below it), a glob, or None for the Python standard library's own
    sources. A file is a document; each line of a ``.jsonl`` file is one, its text in ``text_field``. Files named
    ``.gz`` are unpacked. Files that are not UTF-8 text, or hold a NUL byte, are passed over, and hidden ones too.

    Raises UserError for a path that doesn't exist, a file that can't be read, and JSON lines without the field.
    """
    budget = max_bytes
    for name, file in _files(path):
        for document in _documents_of(name, file, text_field, budget):
            content = document.content if budget is None else document.content[:budget]
            if not content:
                continue
            yield Document(document.name, content)
            if budget is not None:
                budget -= len(content)
                if budget == 0:
                    return


def _files(path: str | None) -> list[tuple[str, Path]]:
    """(name, file) sorted by name."""
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _below(root, NOT_LIBRARY) if file.suffix == ".py"]
        return _named(root, files)
    given = Path(path).expanduser()
    if given.is_dir():
        return _named(given, _below(given, frozenset({"__pycache__"})))
    if given.is_file():
        return [(given.name, given)]
    if glob.has_magic(path):
        files = [Path(match) for match in glob.glob(str(given), recursive=True)]
        return _named(Path(*_until_magic(given.parts)), [file for file in files if file.is_file()])
    raise UserError(f"task.path: no file or folder {path!r}; give a file, a folder, a glob, or leave it out")


def _below(root: Path, left_out: frozenset[str]) -> list[Path]:
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return found


def _until_magic(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part


def _named(root: Path, files: list[Path]) -> list[tuple[str, Path]]:
    return sorted((file.relative_to(root).as_posix(), file) for file in files)


def _documents_of(name: str, file: Path, text_field: str, limit: int | None) -> Iterator[Document]:
    """The documents of one file; of a plain one no more than ``limit`` bytes are read."""
    try:
        with _opened(file) as stream:
            if name.endswith(SUFFIX_JSONL):
                yield from _lines(name, stream, text_field)
            else:
                content = stream.read(-1 if limit is None else limit)
                if _is_text(content):
                    yield Document(name, content)
    except gzip.BadGzipFile:
        return  # not gzip in spite of its name: passed over like any binary file
    except (EOFError, zlib.error) as error:
        raise UserError(f"task.path: {file} is damaged: {error}; pack it anew or choose another path") from None
    except OSError as error:
        raise UserError(
            f"task.path: {file} can't be read: {error.strerror or error}; mend it or choose another path"
        ) from None


def _opened(file: Path) -> BinaryIO:
    if file.name.endswith(".gz"):
        return gzip.open(file)  # type: ignore[return-value]  # reads bytes as any other
    return open(file, "rb")


def _is_text(content: bytes) -> bool:
    """UTF-8 without NUL bytes; a character cut off at the end is no fault."""
    if b"\0" in content:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content)
    except UnicodeDecodeError:
        return False
    return True


def _lines(name: str, stream: BinaryIO, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        place = f"task.path: {name}, line {number}"
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{place}: not a JSON object: {error}; every line of a .jsonl file holds one") from None
        if not isinstance(values, dict) or not isinstance(values.get(text_field), str):
            known = ", ".join(sorted(values)) if isinstance(values, dict) else type(values).__name__
            raise UserError(f"{place}: no text in field {text_field!r} (has: {known}); set task.text_field")
        yield Document(f"{name}#{number}", values[text_field].encode("utf-8", errors="surrogatepass"))
