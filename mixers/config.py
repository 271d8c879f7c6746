"""Strict, frozen configuration models: an unknown key, a wrong type or a bad value is one clear line."""

from __future__ import annotations

import tomllib
import types
import typing
from typing import Any, Self

import pydantic
from pydantic import BaseModel, ConfigDict

from mixers.errors import UserError, nearest


class StrictModel(BaseModel):
    """Frozen pydantic model in which every key must be known and every value of the declared type.

    Types are strict (``"3"`` is not an integer, ``1.5`` is not one either), except that an integer is
    accepted where a float is meant and a list where a tuple is, as TOML and JSON can't write them.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @classmethod
    def parse(cls, values: dict[str, Any], place: str) -> Self:
        """Validate ``values``; raise :class:`UserError` naming ``place``, rule, value and near matches."""
        try:
            return cls.model_validate(_tuples(values))
        except pydantic.ValidationError as error:
            raise UserError(_one_line(cls, error, place, values)) from None


class MixerConfig(StrictModel):
    """Base of every mixer's options. ``d_model`` is filled in by whoever builds the model."""

    d_model: int = pydantic.Field(default=64, gt=0, description="width D of the residual stream")


def parse_overrides(words: tuple[str, ...]) -> dict[str, Any]:
    """``("train.lr=3e-4", "model.mlp=swiglu")`` to values: TOML where it parses, plain text otherwise."""
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r}: overrides are written key=value, for example train.lr=3e-4")
        try:
            values[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key] = text
    return values


def _tuples(value: Any) -> Any:
    """Lists become tuples, so that configs stay hashable and strict mode accepts TOML arrays."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _one_line(cls: type[BaseModel], error: pydantic.ValidationError, place: str, values: Any) -> str:
    first = error.errors(include_url=False)[0]
    path = _path_in(values, first["loc"], first["type"] == "missing")
    dotted = ".".join(path)
    where = f"{place}: {dotted}" if dotted else place
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(path[-1], _fields_at(cls, first['loc'][:-1]))}{more}"
    if first["type"] == "missing":
        return f"{where}: required, but not given{more}"
    if first["type"] == "union_tag_invalid":
        context = first["ctx"]
        known = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
        field = context["discriminator"].strip("'")
        return f"{where}.{field}: unknown {context['tag']!r}{nearest(context['tag'], known)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"{where}: {message}{given}{more}"


def _path_in(values: Any, location: tuple[int | str, ...], is_missing: bool) -> list[str]:
    """The part of pydantic's location that the user wrote: a tagged union also puts its tag in."""
    path: list[str] = []
    for depth, part in enumerate(location):
        in_table = isinstance(values, dict) and part in values
        in_list = isinstance(values, (list, tuple)) and isinstance(part, int) and part < len(values)
        if in_table or in_list:
            values = values[part]
        elif not (is_missing and depth == len(location) - 1):
            continue
        path.append(str(part))
    return path


def _fields_at(cls: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the model that lies at pydantic's ``location`` below ``cls``."""
    models: list[type[BaseModel]] = [cls]
    for part in location:
        inner = [
            field_model
            for model in models
            if part in model.model_fields
            for field_model in _models(model.model_fields[str(part)].annotation)
        ]
        tagged = [model for model in models if any(field.default == part for field in model.model_fields.values())]
        models = inner or tagged or models
    return sorted({name for model in models for name in model.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, tuple, list, dict):
        return [model for arg in typing.get_args(annotation) for model in _models(arg)]
    return []
