"""Options: strict, frozen, and fit to be written down."""

from __future__ import annotations

import copy
import json
import pickle

import pydantic

from mixers.config import MixerConfig
from mixers.contract.errors import ContractError
from mixers.contract.subject import Subject
from mixers.errors import UserError

MISSPELT = "d_modle"


def config(subject: Subject) -> None:
    """An unknown option is refused with its near match; options are frozen, and survive copy, pickle and JSON."""
    mixer = subject.build()
    given = mixer.config
    if not isinstance(given, MixerConfig) or type(given) is not type(mixer).Config:
        raise ContractError(f"config is a {type(given).__name__}, not the mixer's Config {type(mixer).Config.__name__}")
    _require_unknown_key_refused(given)
    try:
        given.d_model = given.d_model
    except (pydantic.ValidationError, AttributeError):
        pass
    else:
        raise ContractError("an option can be changed after the mixer is built: the config isn't frozen")
    text = given.model_dump_json()
    for what, twin in (
        ("copy.deepcopy", copy.deepcopy(given)),
        ("pickle", pickle.loads(pickle.dumps(given))),  # noqa: S301  made on this line
        ("JSON", type(given).parse(json.loads(text), "contract")),
    ):
        if twin != given:
            raise ContractError(f"{what} of the config gives {twin!r} instead of {given!r}")


def _require_unknown_key_refused(given: MixerConfig) -> None:
    try:
        type(given).parse({**given.model_dump(), MISSPELT: given.d_model}, "contract")
    except UserError as error:
        if "'d_model'" not in str(error):
            raise ContractError(f"unknown option {MISSPELT!r}: the error names no near match: {error}") from None
    else:
        raise ContractError(f"unknown option {MISSPELT!r} is accepted")
