from __future__ import annotations

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


def test_hues_stay_apart_for_colour_blind_readers_and_in_grey() -> None:
    """The families that stand together in most sweeps; dichromat simulation of Vienot, Brettel & Mollon 1999."""
    looks = styles({name: name for name in ("softmax", "linear_attention", "gated_deltanet", "fwpkm", "pkm")})
    to_lms = ((17.8824, 43.5161, 4.11935), (3.45565, 27.1554, 3.86714), (0.0299566, 0.184309, 1.46709))

    def linear(color: str) -> list[float]:
        return [(int(color[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]

    def seen(color: str, blind: str) -> list[float]:
        long, middle, short = (sum(w * c for w, c in zip(row, linear(color), strict=True)) for row in to_lms)
        if blind == "protan":
            return [2.02344 * middle - 2.52581 * short, middle, short]
        return [long, 0.494207 * long + 1.24827 * short, short]

    names = list(looks)
    for blind in ("protan", "deutan"):
        for i, a in enumerate(names):
            for b in names[:i]:
                distance = sum(
                    abs(x - y) for x, y in zip(seen(looks[a].color, blind), seen(looks[b].color, blind), strict=True)
                )
                assert distance > 1.5, (blind, a, b, distance)
    assert len({look.marker for look in looks.values()}) == len(looks)  # grey prints are told apart by the mark
