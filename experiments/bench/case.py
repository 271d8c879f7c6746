"""What one row of a benchmark measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SCENES = ("prefill", "train", "scopes", "decode", "layer", "small", "static", "model")
IMPLEMENTATIONS = ("dense", "reference", "sparse", "triton", "package", "floor")
# What is said of a row that holds no time.
OK, NO_MEMORY, ABSENT, WRONG, FAILED = "measured", "out of memory", "not installed", "wrong", "failed"


@dataclass(frozen=True)
class Case:
    """One operation at one size. ``scene`` says what runs, ``impl`` what runs it."""

    scene: str
    impl: str
    scope: str
    n: int  # sub-keys per half: n * n slots
    batch: int
    tokens: int
    chunk: int
    key_dim: int
    value_dim: int
    top_k: int
    device: str
    seed: int
    backward: bool = False

    @property
    def n_tokens_total(self) -> int:
        return self.batch * self.tokens

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def bound_bytes(self) -> int | None:
        """Least bytes to move in float32 if no two accesses share a row; None where the bound is of no use.

        Forward: every accessed row is gathered and written, q, v and read pass once. With a backward, seven passes
        over the accessed rows (gather, keep, write; then read the kept, gather, read and write their gradients) and
        q, v, read, then q, v, read and its derivative, dq and dv. A static read needs every row at most once each way.
        """
        if self.scene == "static":
            n_rows = min(self.n**2, self.n_tokens_total * self.top_k)
            return 4 * self.value_dim * (2 * n_rows + self.n**2 + 2 * self.n_tokens_total)
        if self.scene not in ("prefill", "train", "scopes"):
            return None
        row, q, v = self.top_k * self.value_dim, self.key_dim, self.value_dim
        per_token = 7 * row + 3 * q + 6 * v if self.backward else 2 * row + q + 2 * v
        return 4 * per_token * self.n_tokens_total
