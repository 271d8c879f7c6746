"""Pattern strings: which mixer stands in which slot of which layer.

    gated_deltanet*3,softmax(window=64) | pkm@2 + fwpkm:channel@1,3

Left of the bar: token mixers, cycled over the depth; ``*n`` repeats one, ``none`` leaves the slot empty. Right of it:
placements joined by ``+``, each ``mixer[:slot][(options)]@layers``; without a slot the mixer's default one. Layers
count from 0. The same string, with options in order, labels runs, tables and plots.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn

from experiments.errors import UserError

SLOT_NAMES = ("token", "memory", "channel")
EMPTY = "none"
_TOKEN = re.compile(
    r"\s*(?:(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)|(?P<word>[A-Za-z_]\w*)|(?P<text>\"[^\"]*\")|(?P<mark>[*,|+@:()=]))"
)
_CONSTANTS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class MixerSpec:
    """A mixer by name, with options as sorted (key, value) pairs."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}({','.join(f'{key}={_written(value)}' for key, value in self.options)})"


@dataclass(frozen=True)
class Placement:
    """A mixer put into ``slot`` (None: the mixer's default) of certain layers."""

    mixer: MixerSpec
    slot: str | None
    layers: tuple[int, ...]

    def __str__(self) -> str:
        slot = f":{self.slot}" if self.slot else ""
        options = str(self.mixer).removeprefix(self.mixer.name)
        return f"{self.mixer.name}{slot}{options}@{','.join(map(str, self.layers))}"


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern. ``str()`` gives its canonical form, which parses to an equal pattern."""

    token: tuple[MixerSpec | None, ...]
    placements: tuple[Placement, ...] = ()

    def __str__(self) -> str:
        parts: list[str] = []
        for spec in self.token:
            text = EMPTY if spec is None else str(spec)
            if parts and parts[-1].partition("*")[0] == text:
                parts[-1] = f"{text}*{int(parts[-1].partition('*')[2] or 1) + 1}"
            else:
                parts.append(text)
        placed = " + ".join(map(str, self.placements))
        return ",".join(parts) + (f" | {placed}" if placed else "")

    def mixer_names(self) -> list[str]:
        specs = [spec for spec in self.token if spec is not None] + [place.mixer for place in self.placements]
        return sorted({spec.name for spec in specs})


def parse_pattern(text: str) -> Pattern:
    """Parse ``text``; a mistake is a :class:`UserError` that shows where it stands."""
    return _Parser(text).pattern()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                start = position + len(text[position:]) - len(text[position:].lstrip())
                self.fail(start, f"unexpected {text[start]!r}")
            kind = match.lastgroup
            assert kind is not None
            self.tokens.append((kind, match[kind], match.start(kind)))
            position = match.end()
        self.index = 0

    def fail(self, position: int, why: str) -> NoReturn:
        raise UserError(f"pattern {self.text!r}: at character {position + 1}: {why}")

    def at(self, mark: str) -> bool:
        return self.index < len(self.tokens) and self.tokens[self.index][:2] == ("mark", mark)

    def take(self, mark: str) -> bool:
        if self.at(mark):
            self.index += 1
            return True
        return False

    def need(self, kind: str, what: str) -> str:
        if self.index == len(self.tokens):
            self.fail(len(self.text), f"expected {what}, but the pattern ends")
        found, value, position = self.tokens[self.index]
        if found != kind:
            self.fail(position, f"expected {what}, got {value!r}")
        self.index += 1
        return value

    def whole(self, what: str) -> int:
        value = self.need("number", what)
        if not value.isdigit():
            self.fail(self.tokens[self.index - 1][2], f"expected {what}, got {value!r}")
        return int(value)

    def pattern(self) -> Pattern:
        token = self.repeated()
        while self.take(","):
            token += self.repeated()
        placements: list[Placement] = []
        if self.take("|"):
            placements.append(self.placement())
            while self.take("+"):
                placements.append(self.placement())
        if self.index < len(self.tokens):
            _, value, position = self.tokens[self.index]
            self.fail(position, f"unexpected {value!r}")
        return Pattern(tuple(token), tuple(placements))

    def repeated(self) -> list[MixerSpec | None]:
        name = self.name()
        options = self.options()
        spec = None if name == EMPTY else MixerSpec(name, options)
        if spec is None and options:
            self.fail(0, "'none' takes no options")
        n_times = self.whole("a repeat count") if self.take("*") else 1
        if n_times == 0:
            self.fail(self.tokens[self.index - 1][2], "a repeat count is at least 1")
        return [spec] * n_times

    def name(self) -> str:
        name = self.need("word", "the name of a mixer")
        # A mixer's name may itself have a colon ("fla:rwkv7"); a slot's name after it is the slot.
        while self.at(":") and self.index + 1 < len(self.tokens) and self.tokens[self.index + 1][1] not in SLOT_NAMES:
            self.index += 1
            name += ":" + self.need("word", "the rest of a mixer's name or one of the slots " + ", ".join(SLOT_NAMES))
        return name

    def placement(self) -> Placement:
        name = self.name()
        slot = self.need("word", "a slot") if self.take(":") else None
        options = self.options()
        if not self.take("@"):
            position = self.tokens[self.index][2] if self.index < len(self.tokens) else len(self.text)
            self.fail(position, f"a placement names its layers, for example {name}@0")
        layers = [self.whole("a layer number")]
        while self.take(","):
            layers.append(self.whole("a layer number"))
        if len(set(layers)) != len(layers):
            self.fail(self.tokens[self.index - 1][2], f"layer numbers of {name} repeat: {layers}")
        return Placement(MixerSpec(name, options), slot, tuple(sorted(layers)))

    def options(self) -> tuple[tuple[str, Any], ...]:
        options: dict[str, Any] = {}
        if not self.take("("):
            return ()
        while not self.take(")"):
            key = self.need("word", "an option's name")
            position = self.tokens[self.index - 1][2]
            if key in options:
                self.fail(position, f"option {key!r} is given twice")
            if not self.take("="):
                self.fail(position, f"option {key!r} needs a value: {key}=...")
            options[key] = self.value()
            if not self.at(")") and not self.take(","):
                self.need("mark", "',' or ')'")
        return tuple(sorted(options.items()))

    def value(self) -> Any:
        if self.index == len(self.tokens):
            self.fail(len(self.text), "expected a value, but the pattern ends")
        kind, value, position = self.tokens[self.index]
        self.index += 1
        if kind == "number":
            return int(value) if re.fullmatch(r"-?\d+", value) else float(value)
        if kind == "text":
            return value[1:-1]
        if kind == "word":
            return _CONSTANTS.get(value, value)
        self.fail(position, f"expected a value, got {value!r}")


def _written(value: Any) -> str:
    for word, constant in _CONSTANTS.items():
        if value is constant:
            return word
    if isinstance(value, str) and (value in _CONSTANTS or not re.fullmatch(r"[A-Za-z_]\w*", value)):
        return f'"{value}"'
    return str(value)
