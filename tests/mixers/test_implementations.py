"""Where fla's gated gradients are refused, and what then runs."""

from types import SimpleNamespace

import pytest
import torch

from experiments import doctor
from mixers import implementations
from mixers.errors import UserError
from mixers.implementations import gated_backward_fault, resolve_fla

CUDA = torch.device("cuda")


def machine(monkeypatch, triton, major, tilelang=False):
    monkeypatch.setattr(implementations, "TRITON", triton)
    monkeypatch.setattr(implementations, "TILELANG_MISSING", () if tilelang else ("tilelang",))
    monkeypatch.setattr(implementations, "FLA_MISSING", ())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))


@pytest.mark.parametrize(
    ("triton", "major", "refused"),
    [
        ((3, 3, 1), 9, False),
        ((3, 4, 0), 9, True),
        ((3, 6, 0), 9, True),
        ((3, 7, 0), 9, True),
        ((3, 7, 1), 9, False),
        ((3, 6, 0), 8, False),
        ((3, 6, 0), 10, False),
        (None, 9, False),
    ],
)
def test_the_versions_and_the_devices_that_are_refused(monkeypatch, triton, major, refused):
    machine(monkeypatch, triton, major)
    assert bool(gated_backward_fault(CUDA)) is refused
    assert gated_backward_fault(torch.device("cpu")) == ""
    assert len(doctor.faulty_kernels(["cuda:0"])) == refused
    assert doctor.faulty_kernels([]) == []


def test_tilelang_mends_the_delta_rules_only(monkeypatch):
    machine(monkeypatch, (3, 6, 0), 9, tilelang=True)
    assert gated_backward_fault(CUDA) == ""
    assert "tilelang" not in gated_backward_fault(CUDA, mended_by_tilelang=False)


def test_auto_takes_the_reference_and_fla_is_a_clear_error(monkeypatch):
    machine(monkeypatch, (3, 6, 0), 9)
    fault = gated_backward_fault(CUDA)
    assert resolve_fla("auto", CUDA, "m", fault) == "reference"
    with pytest.raises(UserError, match=r"gated gradients with triton 3\.6\.0 on Hopper.*triton>=3\.7\.1.*tilelang"):
        resolve_fla("fla", CUDA, "m", fault)
