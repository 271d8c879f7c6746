"""Reports, excuses, exceptions of a mixer, and the helper for a third party's pytest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixers import contract
from mixers.errors import UserError
from tests.mixers.contract.faulty import FlopsTwice, IgnoresMask, NoTokensCrash, SeesOneTokenAhead
from tests.mixers.contract.healthy import DecayedSum

D = 8
ROOT = Path(__file__).parent.parent.parent.parent


def build(cls):
    return lambda: cls(cls.Config(d_model=D))


@contract.parametrize(build(DecayedSum))
def test_parametrize_gives_one_test_per_check(check):
    check()


def test_a_report_lists_all_checks_and_names_what_failed():
    report = contract.check_mixer(build(FlopsTwice))
    assert [result.name for result in report.results] == list(contract.CHECKS)
    assert not report.ok
    assert {result.name for result in report.results if not result.ok} == {"flops"}
    n_flops = 4 * D * D + 2 * D * 3
    assert report["flops"].message == (
        f"flops: flops_per_token(0) declares {2 * n_flops}, torch counts {n_flops}: off by {n_flops} (context 0)"
    )
    assert all(result.seconds > 0 for result in report.results)


def test_an_excuse_covers_its_check_only():
    result = contract.run_check("flops", build(FlopsTwice), excuses={"flops": "counted by hand"})
    assert (result.status, result.ok) == ("excused", True)
    assert result.message.startswith("counted by hand (flops: ")
    assert contract.run_check("padding", build(IgnoresMask), excuses={"flops": "counted by hand"}).status == "failed"


@pytest.mark.parametrize(("cls", "check"), [(DecayedSum, "flops"), (DecayedSum, "causality")])
def test_an_excuse_that_is_not_needed_fails(cls, check):
    result = contract.run_check(check, build(cls), excuses={check: "was so once"})
    assert (result.status, result.ok) == ("stale_excuse", False)
    assert result.message == f"{check}: excused as 'was so once', but it passes; remove the excuse"


@pytest.mark.parametrize(
    ("excuses", "message"),
    [
        ({"flopps": "x"}, "excuse for unknown check 'flopps'; did you mean 'flops'"),
        ({"flops": " "}, "the excuse for 'flops' gives no reason"),
    ],
)
def test_excuses_need_a_known_check_and_a_reason(excuses, message):
    with pytest.raises(UserError, match=message):
        contract.check_mixer(build(DecayedSum), excuses=excuses)
    with pytest.raises(UserError, match=message):
        contract.parametrize(build(DecayedSum), excuses=excuses)


def test_a_class_declares_its_excuses():
    class Excused(FlopsTwice):
        contract_excuses = {"flops": "counted by hand"}  # noqa: RUF012  as a user writes it

    assert contract.declared_excuses(DecayedSum) == {}
    excuses = contract.declared_excuses(Excused)
    assert contract.run_check("flops", build(Excused), excuses=excuses).status == "excused"


def test_an_exception_in_the_mixer_names_type_file_and_line():
    result = contract.run_check("shapes", build(NoTokensCrash))
    lines = (ROOT / "tests/mixers/contract/faulty.py").read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if text.strip() == "assert x.shape[1] > 0")
    assert result.message.startswith("shapes: raised AssertionError")
    assert f"faulty.py:{line})" in result.message


def test_an_exception_while_building_fails_every_check():
    def broken():
        raise RuntimeError("no such table")

    report = contract.check_mixer(broken)
    assert {result.status for result in report.results} == {"failed"}
    assert "raised RuntimeError: no such table" in report["flops"].message


def test_failures_carry_position_size_and_limit():
    result = contract.run_check("causality", build(SeesOneTokenAhead))
    assert "differs by 0." in result.message
    assert "allowed 1e-09" in result.message
    assert "token 0, channel" in result.message


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    contract.check_mixer(build(SeesOneTokenAhead), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_require_fails_skips_or_passes():
    with pytest.raises(pytest.fail.Exception, match="flops_per_token"):
        contract.require("flops", build(FlopsTwice))
    with pytest.raises(pytest.skip.Exception, match="excused: by hand"):
        contract.require("flops", build(FlopsTwice), excuses={"flops": "by hand"})
    contract.require("flops", build(DecayedSum))


def test_every_check_says_what_it_checks():
    assert all(function.__doc__ and function.__doc__.strip() for function in contract.CHECKS.values())
