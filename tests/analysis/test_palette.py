from __future__ import annotations

import itertools

import numpy as np
import pytest

from analysis.palette import FAMILIES, family, styles


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("softmax", "softmax"),
        ("softmax(window=512,head_dim=8)", "window"),
        ("softmax(window=512) | fwpkm@2,10 + pkm@6", "fwpkm"),
        ("gated_deltanet*3,softmax | pkm@6", "pkm"),
        ("gated_deltanet*3,softmax(window=512)", "gated_deltanet"),
        ("fla:gla(expand=2)", "gla"),
        ("my_mixer", "my_mixer"),
        ("", ""),
    ],
)
def test_a_pattern_belongs_to_its_memory_or_its_first_mixer(pattern: str, expected: str) -> None:
    assert family(pattern) == expected


def test_a_family_looks_the_same_in_every_sweep() -> None:
    one = styles({"a": "softmax", "b": "fwpkm(n_subkeys=8)", "c": "linear_attention"})
    other = styles({"x": "fwpkm", "y": "gated_deltanet", "z": "softmax(head_dim=3)"})
    assert one["b"] == other["x"]
    assert one["a"] == other["z"]
    assert styles({"p": "their_mixer"})["p"] == styles({"a": "softmax", "q": "their_mixer(x=1)"})["q"]


def test_arms_differ_in_colour_and_mark_and_in_the_mark_alone_while_there_are_enough() -> None:
    many = styles({f"arm {i}": "softmax" for i in range(40)})
    assert list(many) == [f"arm {i}" for i in range(40)]
    assert len({(style.color, style.symbol) for style in many.values()}) == 40
    mixed = styles(
        {f"arm {i}": pattern for i, pattern in enumerate(["fwpkm", "fwpkm(top_k=2)", "softmax", "fwpkm(x=3)"])}
    )
    assert len({style.marker for style in mixed.values()}) == 4
    assert mixed["arm 2"] == styles({"s": "softmax"})["s"]  # a relative of another arm changes nothing
    own = styles({name: "softmax(window=3)" if name == "window" else name for name in FAMILIES})
    assert len({(style.color, style.marker) for style in own.values()}) == len(FAMILIES)


# linear RGB to the responses of the cones (Hunt, Pointer & Estevez, at D65) and back, and to CIE XYZ
CONES = np.array([[0.31399, 0.63951, 0.04650], [0.15537, 0.75789, 0.08670], [0.01775, 0.10944, 0.87257]])
BLIND = {"protan": (0, (0.0, 1.05118, -0.05116)), "deutan": (1, (0.95131, 0.0, 0.04867))}  # Vienot et al. 1999
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(color: str, blind: str) -> np.ndarray:
    """CIE Lab of a colour as a dichromat sees it."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    cones = CONES @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    missing, weights = BLIND[blind]
    cones[missing] = cones @ np.array(weights)
    x, y, z = np.cbrt(XYZ @ np.clip(np.linalg.inv(CONES) @ cones, 1e-4, 1) / (0.9505, 1, 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("blind", ["protan", "deutan"])
def test_families_stay_apart_for_colour_blind_readers_and_in_grey(blind: str) -> None:
    looks = styles({name: name for name in ("softmax", "linear_attention", "gated_deltanet", "fwpkm", "pkm")})
    for a, b in itertools.combinations(looks.values(), 2):
        assert np.linalg.norm(lab(a.color, blind) - lab(b.color, blind)) > 15  # 2 can just be told apart
    assert len({look.marker for look in looks.values()}) == len(looks)
