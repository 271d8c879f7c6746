"""A layer's constructor as strict options: same names, types and defaults, ``d_model`` for its width."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Annotated, Any, Self

import pydantic
from pydantic import Field, model_validator

from mixers.config import MixerConfig
from mixers.fla_layers.catalog import REQUIRED, Argument

WIDTH, HEADS, DEPTH = "hidden_size", "num_heads", "layer_idx"
# Bounds may be infinite; NaN is none.
_Bound = Annotated[float, Field(allow_inf_nan=True)]
_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "dict": dict[str, Any], "None": None}


class FlaConfig(MixerConfig):
    """Options of a layer of flash-linear-attention."""

    @model_validator(mode="before")
    @classmethod
    def _own_names(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for theirs, ours in ((WIDTH, "d_model"), (HEADS, "n_heads")):
                if theirs in values and (ours == "d_model" or ours in cls.model_fields):
                    raise ValueError(f"{theirs} is called {ours} here")
        return values

    @model_validator(mode="after")
    def _no_nan(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if any(
                isinstance(item, float) and math.isnan(item) for item in (value if isinstance(value, tuple) else ())
            ):
                raise ValueError(f"{name} holds a NaN: {value}")
        return self


def config_class(name: str, arguments: tuple[Argument, ...], hidden: set[str], defaults: Mapping[str, Any]) -> type:
    """A :class:`FlaConfig` whose fields are ``arguments``, less the width, the layer's number and those ``hidden``."""
    fields: dict[str, Any] = {}
    for argument in arguments:
        if argument.name in {WIDTH, DEPTH} | hidden:
            continue
        default = defaults.get(argument.name, argument.default)
        if argument.name == HEADS:
            optional = default is None or "None" in argument.annotation
            positive = Annotated[int, Field(gt=0)]
            fields["n_heads"] = (positive | None if optional else positive, ... if default is REQUIRED else default)
            continue
        kind = type_of(argument.annotation)
        fields[argument.name] = (kind | None if default is None else kind, ... if default is REQUIRED else default)
    return pydantic.create_model(name, __base__=FlaConfig, __module__=__name__, **fields)


def constructor_arguments(config: FlaConfig, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """What the layer's constructor is called with: the options, and what no option decides."""
    given = {name: getattr(config, name) for name in type(config).model_fields}
    given[WIDTH] = given.pop("d_model")
    if "n_heads" in given:
        given[HEADS] = given.pop("n_heads")
    return {**given, **fixed}


def type_of(annotation: str) -> Any:
    """The type that an annotation means. Parts that no option can have, as tensors, are left out."""
    kinds = _kinds(ast.parse(annotation, mode="eval").body) if annotation else []
    if not kinds:
        return Any
    whole = kinds[0]
    for kind in kinds[1:]:
        whole = whole | kind
    return whole


def _kinds(node: ast.expr) -> list[Any]:
    if isinstance(node, ast.BinOp):
        return _kinds(node.left) + _kinds(node.right)
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "tuple" and isinstance(node.slice, ast.Tuple):
        parts = tuple(
            _Bound if ast.unparse(part) == "float" else type_of(ast.unparse(part)) for part in node.slice.elts
        )
        return [tuple[parts]]
    written = ast.unparse(node)
    return [_TYPES[written]] if written in _TYPES else []
