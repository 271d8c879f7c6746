"""A sweep's definition as the text of a TOML file."""

from __future__ import annotations

import json
import re
from typing import Any


def toml_text(values: dict[str, Any]) -> str:
    """``values`` (JSON values without null) as TOML: plain keys first, then one table for each object of objects."""
    lines = [f"{_key(name)} = {_value(value)}" for name, value in values.items() if not isinstance(value, dict)]
    for name, table in values.items():
        if not isinstance(table, dict):
            continue
        nested = bool(table) and all(isinstance(value, dict) for value in table.values()) and name != "tune"
        for path, entries in (
            ((f"{_key(name)}.{_key(key)}", part) for key, part in table.items()) if nested else ((_key(name), table),)
        ):
            lines += ["", f"[{path}]"]
            lines += [f"{_key(key)} = {_value(value)}" for key, value in entries.items()]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(name)} = {_value(part)}" for name, part in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(part) for part in value) + "]"
    # numbers, booleans and strings are written as in JSON; TOML knows no escaped slash or surrogate pair
    return json.dumps(value, ensure_ascii=False)
