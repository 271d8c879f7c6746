"""A first version of a new mixer and of its test: two files that work at once and are meant to be changed."""

from __future__ import annotations

import keyword
import os
import re
import string
from pathlib import Path

from mixers import registry
from mixers.declaration import require_name
from mixers.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
PACKAGE = Path(__file__).parent


def scaffold(name: str, folder: Path, *, force: bool = False) -> tuple[Path, Path]:
    """Write ``NAME.py`` and ``test_NAME.py`` into ``folder``; return both paths.

    Either both files are written or none: everything is checked first, and both are complete under other names
    before either takes its place. ``force`` replaces files that exist; it doesn't free a registered name.

    Raises:
        UserError: a name that can't be registered or is taken, a folder that doesn't exist or can't be written,
            and files that exist without ``force``.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(
            f"new {name}: a mixer's name is lower-case letters, digits and underscores, starts with a letter and is "
            "no Python keyword; for example my_mixer"
        )
    require_name(name)
    if name in registry.names() or name in registry.problems():
        raise UserError(f"new {name}: the name is taken by a registered mixer; choose another")
    if not folder.is_dir():
        raise UserError(f"--dir {folder}: no such folder; make it first")
    if folder.resolve() == PACKAGE.resolve():
        raise UserError(
            f"--dir {folder}: files of this package register themselves, and the test would load the mixer twice; "
            "write it elsewhere, and move it here when it is finished"
        )
    # The ending keeps a name such as "mixer" or "traits" apart from what the file imports.
    class_name = "".join(part.capitalize() for part in name.split("_")) + "Mixer"
    words = {"name": name, "class_name": class_name}
    files = {
        folder / f"{name}.py": _filled("mixer.py.txt", words),
        folder / f"test_{name}.py": _filled("test_mixer.py.txt", words),
    }
    existing = [str(path) for path in files if path.exists()]
    if existing and not force:
        raise UserError(f"new {name}: {' and '.join(existing)} exist already; choose another name or add --force")
    _write_all(files)
    mixer, test = files
    return mixer, test


def _filled(template: str, words: dict[str, str]) -> str:
    return string.Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(words)


def _write_all(files: dict[Path, str]) -> None:
    """All files or none: complete drafts first, then every draft into its place."""
    drafts = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, text in files.items():
            if path.is_dir():
                raise UserError(f"{path}: is a folder; choose another name")
            drafts[path].write_text(text, encoding="utf-8")
        for path, draft in drafts.items():
            draft.replace(path)
    except OSError as error:
        raise UserError(f"{error.filename}: can't be written: {error.strerror}; give another --dir") from None
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
