"""Options of layers whose heads have free key and value widths."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from mixers.config import MixerConfig


class HeadWidthsConfig(MixerConfig):
    """H, K and V, each K and V the even share of D unless given."""

    n_heads: int = Field(1, gt=0, description="H")
    key_dim: int | None = Field(None, gt=0, description="K, query and key width of a head; None: d_model / n_heads")
    value_dim: int | None = Field(None, gt=0, description="V, value width of a head; None: d_model / n_heads")

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        if self.d_model % self.n_heads and None in (self.key_dim, self.value_dim):
            raise ValueError(
                f"d_model={self.d_model} isn't divisible by n_heads={self.n_heads}; "
                "change one, or set key_dim and value_dim"
            )
        return self

    @property
    def head_key_dim(self) -> int:
        """K, resolved."""
        return self.d_model // self.n_heads if self.key_dim is None else self.key_dim

    @property
    def head_value_dim(self) -> int:
        """V, resolved."""
        return self.d_model // self.n_heads if self.value_dim is None else self.value_dim
