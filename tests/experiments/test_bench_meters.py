"""Meters against known answers: bytes of states, weights and FLOPs by hand; a meter with a planted fault is found."""

from __future__ import annotations

import ctypes
import math
import random
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from experiments.backbone import Backbone
from experiments.bench import meters
from experiments.bench.energy import Energy, nvml_counter
from experiments.bench.growth import T_975, growth
from experiments.bench.layers import Bench, Measured, parse_layers
from experiments.config import ModelConfig
from experiments.cost import active_params
from experiments.device import Compute
from experiments.errors import UserError
from mixers.base import Mixer, state_tensors
from mixers.fwpkm import FastWeightPKM
from mixers.product_key_layer import ProductKeyLayer

CPU = Compute(torch.device("cpu"), None)
D, T = 16, 32
FLOAT = 4


def layer(text: str) -> Measured:
    return parse_layers((text,), D, {}, "cpu")[0]


def states(text: str) -> dict:
    meter = meters.StateMeter(Bench(layer(text), CPU, seed=0))
    for n_tokens in (T // 2, T):
        meter.measure(n_tokens)
    return meter.summary()


def sizes(text: str) -> dict:
    return meters.sizes(Bench(layer(text), CPU, seed=0).layer)


def check_attention() -> None:
    """Keys and values of G heads of width K, and 8 bytes for the position, which the batch shares."""
    found = states("softmax(n_heads=4,n_kv_heads=2)")
    cache = 2 * 2 * (D // 4) * FLOAT
    assert [row["bytes"] for row in found["state"]] == [T // 2 * cache + 8, T * cache + 8]
    assert (found["state_bytes_per_token"], found["state_bytes_fixed"], found["state_bytes_shared"]) == (cache, 8, 8)
    window = states("softmax(window=5)")
    assert (window["state_bytes"], window["state_bytes_per_token"]) == (4 * 2 * D * FLOAT + 8, 0)


def check_recurrence() -> None:
    """H K V numbers, and what three convolutions of 4 taps still need."""
    found = states("gated_deltanet(n_heads=2,key_dim=6,value_dim=10,conv_kernel=0)")
    assert found["state_bytes"] == found["state_bytes_fixed"] == 2 * 6 * 10 * FLOAT
    assert (found["state_bytes_per_token"], found["state_bytes_shared"]) == (0, 0)
    convolved = states("gated_deltanet(n_heads=2,key_dim=6,value_dim=10)")
    assert convolved["state_bytes"] == (2 * 6 * 10 + 3 * 2 * (6 + 6 + 10)) * FLOAT


def check_fast_weights() -> None:
    """The table n n V and the sub-keys, whether or not they were written, and a queue of C-1 tokens at its fullest."""
    table = (6 * 6 * 10 + 2 * 6 * 8 // 2) * FLOAT
    queue = 7 * (8 + 10 + 1) * FLOAT
    for scope, shared in (("sequence", 0), ("shared", table)):
        found = states(f"fwpkm(n_subkeys=6,top_k=3,key_dim=8,value_dim=10,chunk_size=8,scope={scope},impl=sparse)")
        assert found["state_bytes"] == found["state_bytes_fixed"] == table + queue
        assert (found["state_bytes_per_token"], found["state_bytes_shared"]) == (0, shared)
    frozen = sizes("fwpkm(n_subkeys=6,top_k=3,key_dim=8,value_dim=10)")
    assert frozen["buffer_bytes"] == table
    assert frozen["active_params_per_token"] == frozen["params"]
    learned = sizes("fwpkm(n_subkeys=6,top_k=3,key_dim=8,value_dim=10,initial_memory=learned)")
    assert learned["params"] - frozen["params"] == table // FLOAT
    assert learned["active_params_per_token"] == learned["params"] - (6 * 6 - 3) * 10


def check_tables() -> None:
    """Of N rows a token reads H k, of each table."""
    assert states("pkm")["state_bytes"] == 0
    found = sizes("pkm(n_heads=2,n_subkeys=8,top_k=3,value_dim=10)")
    assert found["params"] - found["active_params_per_token"] == (64 - 6) * 10
    assert found["slow_weight_bytes"] == found["params"] * FLOAT
    assert sizes("pkm(train_keys=false)")["buffer_bytes"] == 4 * 2 * 32 * (D // 2) * FLOAT
    found = sizes("peer(n_heads=2,n_subkeys=8,top_k=3)")
    assert found["params"] - found["active_params_per_token"] == 2 * (64 - 6) * D


def check_flops() -> None:
    """By hand: four projections, and 2 products with T keys, of which the formula leaves out the masked half."""
    found = meters.flops(layer("softmax"), CPU, T, seed=0)
    assert found["flops_per_token"] == 8 * D * D + 4 * D * (T + 1) / 2
    assert found["counted_flops_per_token"] == 8 * D * D + 4 * D * T
    assert found["counted_train_flops_per_token"] == 3 * found["counted_flops_per_token"]
    # A depthwise convolution of 4 taps, whose backward is two such.
    found = meters.flops(layer("short_conv(kernel=4)"), CPU, T, seed=0)
    assert found["counted_flops_per_token"] == found["flops_per_token"]
    assert found["train_over_forward"] == 3
    # A fused gather and weighted sum of H k rows; the derivative of each is one more.
    gather = 2 * 2 * 3 * 10
    found = meters.flops(layer("pkm(n_heads=2,n_subkeys=8,top_k=3,value_dim=10,use_gate=false)"), CPU, T, seed=0)
    products = found["flops_per_token"] - gather
    assert found["counted_flops_per_token"] == found["flops_per_token"]
    assert found["counted_train_flops_per_token"] == 3 * (products + gather)


CHECKS = (check_attention, check_recurrence, check_fast_weights, check_tables, check_flops)


@pytest.mark.parametrize("check", CHECKS)
def test_known_answers(check) -> None:
    check()


def skips_the_token_before(self: meters.StateMeter, n_tokens: int):
    _, after = self.bench.state_after(n_tokens)
    n_bytes = self.bench.layer.full_state_bytes(after)
    self.rows[n_tokens] = {"tokens": n_tokens, "bytes": n_bytes, "stored_bytes": n_bytes}
    self.shared_bytes = 0


FAULTS = {
    "counts elements, not bytes": (
        Mixer, "full_state_bytes", lambda self, state: sum(part.numel() for part in state_tensors(state)),
    ),
    "counts the first tensor only": (
        Mixer, "full_state_bytes", lambda self, state: state_tensors(state)[0].nbytes if state_tensors(state) else 0,
    ),
    "counts what was written only": (FastWeightPKM, "full_state_bytes", Mixer.full_state_bytes),
    "misses the queue and the batch": (meters.StateMeter, "measure", skips_the_token_before),
    "takes tables as read whole": (ProductKeyLayer, "active_rows", Mixer.active_rows),
    "takes a learned memory as read whole": (FastWeightPKM, "active_rows", Mixer.active_rows),
    "counts no gathers": (meters, "BAG_FLOPS", {}),
    "counts a convolution's groups as torch does": (meters, "BACKWARD_FLOPS", {}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_meter_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    found = []
    for check in CHECKS:
        try:
            check()
        except AssertionError:
            found.append(check.__name__)
    assert found


def test_torch_counts_a_depthwise_convolution_too_high() -> None:
    """Why convolutions have a formula of ours; when this fails, it can go."""
    x, weight = torch.randn(1, 6, 9), torch.randn(6, 1, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.conv1d(x, weight, groups=6).sum().backward()
    forward = 2 * 6 * 4 * 6
    assert counter.get_total_flops() > 2 * forward


def test_active_parameters_of_a_model() -> None:
    """The embedding is read whole only where it is also the output projection."""
    for tied in (True, False):
        for positions in ("none", "learned"):
            config = ModelConfig(
                pattern="softmax | pkm(n_subkeys=8,top_k=2,n_heads=2)@0", d_model=D, n_layers=1, tie_embeddings=tied,
                positions=positions, max_positions=20,
            )  # fmt: skip
            model = Backbone(config, 32)
            unread = (64 - 4) * D + (0 if tied else 31 * D) + (19 * D if positions == "learned" else 0)
            assert active_params(model) == sum(parameter.numel() for parameter in model.parameters()) - unread


def test_growth_of_power_laws() -> None:
    costs = {n: 3.0 * n**1.5 for n in (512, 1024, 2048, 4096)}
    found = growth(costs)
    assert found is not None
    assert found.exponent == pytest.approx(1.5)
    assert found.last == pytest.approx(1.5)
    assert found.high - found.low == pytest.approx(0, abs=1e-6)
    assert growth({512: 7, 1024: 7, 2048: 7}) == (0, 0, 0, 0, 3)
    # An offset makes the exponent too small and the interval wide; the last slope is nearer.
    offset = growth({n: 1000.0 + n for n in (64, 256, 1024, 4096)})
    assert 0 < offset.exponent < offset.last < 1
    assert growth({512: 1.0, 1024: 4.0}) == (pytest.approx(2), None, None, pytest.approx(2), 2)
    assert growth({512: 1.0}) is None
    assert growth({512: 0, 1024: 0}) is None


def test_the_interval_of_growth_covers() -> None:
    """With log-normal scatter, 95 % of intervals hold the exponent, to four standard errors of 2,000 tries."""
    assert [round(float(stats.t.ppf(0.975, n)), 3) for n in range(1, 16)] == list(T_975)
    draw, n_tries, n_covered = random.Random(1), 2000, 0
    for _ in range(n_tries):
        found = growth({n: n**0.8 * math.exp(draw.gauss(0, 0.1)) for n in (512, 1024, 2048, 4096, 8192)})
        n_covered += found.low <= 0.8 <= found.high
    assert abs(n_covered / n_tries - 0.95) < 4 * math.sqrt(0.95 * 0.05 / n_tries)


def test_energy_of_packages(tmp_path: Path) -> None:
    """Two packages, one of whose counters overflows; the zones inside them are not counted twice."""

    def write(zone: str, microjoules: int) -> None:
        (tmp_path / zone).mkdir(exist_ok=True)
        (tmp_path / zone / "energy_uj").write_text(f"{microjoules}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("9999999\n")

    for zone, start in (("intel-rapl:0", 9_000_000), ("intel-rapl:1", 0), ("intel-rapl:0:0", 5)):
        write(zone, start)
    energy = Energy(torch.device("cpu"), tmp_path)
    assert energy.is_known
    write("intel-rapl:0", 500_000)
    write("intel-rapl:1", 2_000_000)
    write("intel-rapl:0:0", 4_000_000)
    assert energy.joules() == 3.5
    assert energy.joules() == 3.5
    assert "no RAPL" in Energy(torch.device("cpu"), tmp_path / "none").why_not


class StandInNVML:
    """What the driver's library answers for one GPU; ctypes passes references as the real one gets them."""

    def __init__(self, counts: bool) -> None:
        self.status, self.millijoules = (0 if counts else 3), 7000

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle) -> int:
        handle._obj.value = 99
        return 0 if uuid == b"GPU-1" else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, energy) -> int:
        assert handle.value == 99
        energy._obj.value = self.millijoules
        return self.status


def test_energy_of_a_gpu() -> None:
    read = nvml_counter(StandInNVML(counts=True), "GPU-1")
    assert read() == 7
    assert nvml_counter(StandInNVML(counts=False), "GPU-1") is None
    assert nvml_counter(StandInNVML(counts=True), "GPU-2") is None


def test_layers_are_named_as_in_patterns() -> None:
    found = parse_layers(("softmax(window=64)", "pkm"), 128, {"impl": "auto"}, "cpu")
    assert [entry.label for entry in found] == ["softmax(window=64)", "pkm"]
    # Token mixers have heads of 64 channels, a memory its own default; what is said goes.
    assert found[0].options == {"d_model": 128, "n_heads": 2, "impl": "auto", "window": 64}
    assert "n_heads" not in found[1].options
    assert parse_layers(("softmax(n_heads=8)",), 128, {}, "cpu")[0].options["n_heads"] == 8
    for words, names in (
        ("give mixers one by one", ("softmax,pkm",)),
        ("named twice", ("pkm", "pkm")),
        ("did you mean 'softmax'", ("sofmax",)),
        ("unknown key", ("softmax(windw=3)",)),
    ):
        with pytest.raises(UserError, match=words):
            parse_layers(names, 64, {}, "cpu")
