"""Names of mixers: built in, from a plugin file, or from an installed package's entry point."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixers  # the package, to list its modules
from mixers import fla_layers
from mixers.base import Mixer
from mixers.declaration import require_declared, require_name
from mixers.errors import UserError, nearest

ENTRY_POINT_GROUP = "mixlab.mixers"
_registered: dict[str, type[Mixer]] = {}
_problems: dict[str, str] = {}  # entry points that could not be loaded: name -> why
_loaded = False
_PLUGIN_MODULE = "mixlab_plugin_"


def register(name: str) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator: make a :class:`Mixer` known under ``name``."""

    require_name(name)

    def add(cls: type[Mixer]) -> type[Mixer]:
        if not (isinstance(cls, type) and issubclass(cls, Mixer)):
            got = cls.__qualname__ if isinstance(cls, type) else type(cls).__name__
            raise UserError(f"@register({name!r}) takes a subclass of mixers.base.Mixer, got {got}")
        other = _registered.get(name)
        if other is not None and other is not cls:
            raise UserError(f"{cls.__qualname__}: the name {name!r} is taken by {_place(other)}; choose another")
        if other is None and cls in _registered.values():
            raise UserError(
                f"{cls.__qualname__} is registered as {cls.name!r} already, and a class has one name; "
                f"register a subclass as {name!r}"
            )
        require_declared(cls, name)
        cls.name = name
        _registered[name] = cls
        return cls

    return add


def get(name: str) -> type[Mixer]:
    """The class registered under ``name``, or of the layer ``fla:...``; an unknown name lists the near matches."""
    load_all()
    if name in _registered:
        return _registered[name]
    if name.startswith(fla_layers.PREFIX):
        return fla_layers.layer_class(name)
    if name in _problems:
        raise UserError(f"mixer {name!r} could not be loaded: {_problems[name]}")
    known = {*_registered, *({fla_layers.PREFIX + name} & {*fla_layers.layer_names()})}
    raise UserError(f"unknown mixer {name!r}{nearest(name, known)}")


def names() -> list[str]:
    """All registered names, sorted; those of fla's layers are ``fla_layers.layer_names()``."""
    load_all()
    return sorted(_registered)


def problems() -> dict[str, str]:
    """Entry points that failed to load, with the reason."""
    load_all()
    return dict(_problems)


def build(name: str, options: dict[str, Any] | None = None) -> Mixer:
    """A mixer of that name with these options, initialised."""
    cls = get(name)
    return cls(cls.Config.parse(options or {}, f"mixer {name!r}"))


def load_all() -> None:
    """Import every module of this package, then every installed entry point. Done once.

    But for the contract suite, which registers nothing and takes a compiler along.
    """
    global _loaded
    if _loaded:
        return
    _loaded = True
    for module in pkgutil.iter_modules(mixers.__path__, "mixers."):
        if module.name != "mixers.contract":
            importlib.import_module(module.name)
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        _load_entry_point(point)


def load_plugin(path: str | Path) -> list[str]:
    """Run one Python file that the user named; return the names that it registered.

    Raises:
        UserError: the file can't be found or run, or registers nothing; its registrations are undone.
    """
    load_all()
    place, path = f"--plugin {path}", Path(path).resolve()
    if path.is_dir():
        raise UserError(f"{place}: is a folder; name the Python file in it that registers the mixer")
    if not path.is_file():
        raise UserError(f"{place}: no such file")
    module_name = _PLUGIN_MODULE + hashlib.sha256(str(path).encode()).hexdigest()[:12]
    if module_name in sys.modules:
        return [name for name, cls in _registered.items() if cls.__module__ == module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{place}: not a Python file (its name must end in .py)")
    before = dict(_registered)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001  a user's file may raise anything; it is undone and named
        del sys.modules[module_name]
        _restore(before)
        raise UserError(f"{place}: {_line(error, str(path))}{_what(error)}{_way_out(error, path)}") from None
    added = sorted(set(_registered) - set(before))
    if not added:
        del sys.modules[module_name]
        raise UserError(f"{place}: registers no mixer; decorate a Mixer subclass with @register('name')")
    return added


def _load_entry_point(point: importlib.metadata.EntryPoint) -> None:
    """Import what an installed package names; if that fails, its registrations are undone and the reason kept."""
    package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
    before = dict(_registered)
    try:
        point.load()
        if not any(cls.__module__.partition(".")[0] == point.module.partition(".")[0] for cls in _registered.values()):
            raise UserError(
                f"{point.value} registers no mixer; decorate a Mixer subclass in it with @register({point.name!r})"
            )
    except (Exception, SystemExit) as error:  # noqa: BLE001  a stranger's package may raise anything; others keep working
        _restore(before)
        why = f"package {package}: {_file_and_line(error)}{_what(error)}; mend the package, or uninstall it"
        _problems[point.name] = f"{_problems[point.name]}; {why}" if point.name in _problems else why


def _restore(before: dict[str, type[Mixer]]) -> None:
    _registered.clear()
    _registered.update(before)


def _place(cls: type[Mixer]) -> str:
    """Where a class is, in words that a user knows: a plugin's module name is made up."""
    if cls.__module__.startswith(_PLUGIN_MODULE):
        return f"{cls.__qualname__} in {sys.modules[cls.__module__].__file__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _line(error: BaseException, path: str) -> str:
    """``line 12: `` for the innermost frame in ``path``, or for a syntax error in it."""
    if isinstance(error, SyntaxError) and error.filename == path and error.lineno:
        return f"line {error.lineno}: "
    inside = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"line {inside[-1].lineno}: " if inside else ""


def _file_and_line(error: BaseException) -> str:
    """``layers.py: line 12: `` for the innermost frame outside of Python's import system and this package."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}: line {error.lineno}: "
    ours = (str(Path(__file__).parent), "<frozen", str(Path(importlib.__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    return f"{frames[-1].filename}: line {frames[-1].lineno}: " if frames else ""


def _what(error: BaseException) -> str:
    """The error in one line; ours needs no type."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    text = " ".join(text.split())
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _way_out(error: BaseException, path: Path) -> str:
    """Our own errors name theirs; for others, how to see more."""
    return (
        "" if isinstance(error, (UserError, SyntaxError)) else f" (for the traceback: python {shlex.quote(path.name)})"
    )
