"""Shipped experiment recipes, found by name."""

from __future__ import annotations

from pathlib import Path

from experiments.errors import UserError, nearest

RECIPES = Path(__file__).parent / "recipes"


def recipe_path(name_or_path: str) -> Path:
    """A path to a TOML file, or the name of a shipped recipe."""
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.exists():
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        return path
    shipped = RECIPES / f"{name_or_path}.toml"
    if shipped.is_file():
        return shipped
    known = sorted(recipe.stem for recipe in RECIPES.glob("*.toml"))
    raise UserError(
        f"no experiment {name_or_path!r}: neither a file nor a shipped recipe{nearest(name_or_path, known)}"
    )
