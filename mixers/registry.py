"""Names of mixers: built in, from a plugin file, or from an installed package's entry point."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixers  # the package, to list its modules
from mixers import fla_layers
from mixers.base import Mixer
from mixers.errors import UserError, nearest

ENTRY_POINT_GROUP = "mixlab.mixers"
_registered: dict[str, type[Mixer]] = {}
_problems: dict[str, str] = {}  # entry points that could not be loaded: name -> why
_loaded = False


def register(name: str) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator: make a :class:`Mixer` known under ``name``."""

    def add(cls: type[Mixer]) -> type[Mixer]:
        place = f"{cls.__module__}.{cls.__qualname__}"
        if not name.isidentifier():
            raise UserError(f"{place}: a mixer's name is letters, digits and underscores, got {name!r}")
        if not (isinstance(cls, type) and issubclass(cls, Mixer)):
            raise UserError(f"{place}: @register({name!r}) takes a subclass of mixers.base.Mixer")
        other = _registered.get(name)
        if other is not None and other is not cls:
            raise UserError(
                f"{place}: the name {name!r} is taken by {other.__module__}.{other.__qualname__}; choose another"
            )
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
    """Import every module of this package, then every installed entry point. Done once."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for module in pkgutil.iter_modules(mixers.__path__, "mixers."):
        importlib.import_module(module.name)
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()
        except Exception as error:  # noqa: BLE001  a stranger's package may raise anything; the others keep working
            _problems[point.name] = f"{point.value}: {_where(error)}"


def load_plugin(path: str | Path) -> list[str]:
    """Run one Python file that the user named; return the names that it registered."""
    load_all()
    path = Path(path).resolve()
    if not path.is_file():
        raise UserError(f"--plugin {path}: no such file")
    module_name = "mixlab_plugin_" + hashlib.sha256(str(path).encode()).hexdigest()[:12]
    if module_name in sys.modules:
        return [name for name, cls in _registered.items() if cls.__module__ == module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin {path}: not a Python file (its name must end in .py)")
    before = dict(_registered)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001  a user's file may raise anything; its registrations are undone
        del sys.modules[module_name]
        _registered.clear()
        _registered.update(before)
        raise UserError(f"--plugin {path}: {_where(error, str(path))}") from None
    added = sorted(set(_registered) - set(before))
    if not added:
        raise UserError(f"--plugin {path}: registers no mixer; decorate a Mixer subclass with @register('name')")
    return added


def _where(error: BaseException, path: str | None = None) -> str:
    """``line 12: TypeError: ...`` for the innermost frame in ``path`` (or of all)."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if path is None or frame.filename == path]
    if isinstance(error, SyntaxError) and error.lineno:
        return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
    line = f"line {inside[-1].lineno}: " if inside else ""
    return f"{line}{type(error).__name__}: {error}"
