from __future__ import annotations

import io
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from analysis.comparison import compare
from analysis.figures import comparison_png
from analysis.palette import styles
from analysis.runs import rows_from_records
from sweeps.saved import SavedSweep
from tests.analysis import planted
from tests.analysis.conftest import HOSTILE


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]


def holds(png: bytes, color: str) -> bool:
    wanted = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return bool((np.abs(pixels(png) - wanted).max(axis=-1) < 0.02).sum() > 50)


def draw(tmp_path: Path, saved: SavedSweep, x: str = "cost/state_bytes", y: str = "report/accuracy") -> bytes:
    planted.write_records(tmp_path, saved)
    _, rows = rows_from_records(tmp_path, saved.name)
    return comparison_png(saved, compare(saved, rows, x, y), x=x, y=y, chance=2 / 8192)


def test_every_arm_is_drawn_in_its_colour_even_with_no_state_at_all(tmp_path: Path) -> None:
    png = draw(tmp_path, planted.plan())
    for arm, style in styles(planted.ARMS).items():
        assert holds(png, style.color), arm
    assert pixels(png).shape[1] > 2000  # four panels at 300 dpi


@pytest.mark.parametrize(
    ("x", "y"),
    [("cost/train_tokens_per_s", "report/loss"), ("cost/flops_per_token", "select/accuracy"), ("report/loss",) * 2],
)
def test_other_axes(tmp_path: Path, x: str, y: str) -> None:
    assert holds(draw(tmp_path, planted.plan(), x, y), styles(planted.ARMS)["attention"].color)


def test_names_are_text_not_formulas_and_one_cell_is_enough(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = draw(tmp_path, planted.plan("odd", arms=HOSTILE, pairs=(8,)))
    for style in styles(HOSTILE).values():
        assert holds(png, style.color)


def test_a_sweep_without_any_result_still_gives_a_figure() -> None:
    saved = planted.plan(pairs=(8, 16, 32, 64, 128))
    assert pixels(comparison_png(saved, compare(saved, []), x="cost/state_bytes", y="report/accuracy")).size


def test_styles_stay_with_the_arm_and_pairs_are_unique() -> None:
    arms = [f"arm {i}" for i in range(40)]
    many = styles(arms)
    assert len({(style.color, style.symbol) for style in many.values()}) == 40
    assert styles(arms[:3]) == {arm: many[arm] for arm in arms[:3]}
    assert len({style.color for style in styles(arms[:8]).values()}) == 8
    assert len({style.marker for style in styles(arms[:8]).values()}) == 8
