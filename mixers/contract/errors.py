"""How a check says that it failed, or that it has nothing to check."""

from __future__ import annotations


class ContractError(AssertionError):
    """A mixer breaks the contract: what, where, and by how much. ``check`` is filled in by the runner."""

    def __init__(
        self, message: str, *, position: str = "", size: float | None = None, allowed: float | None = None
    ) -> None:
        super().__init__(message, position, size, allowed)
        self.check = ""
        self.message = message
        self.position = position
        self.size = size
        self.allowed = allowed

    def __str__(self) -> str:
        check = f"{self.check}: " if self.check else ""
        size = "" if self.size is None else f" by {self.size:.3g}"
        allowed = "" if self.allowed is None else f", allowed {self.allowed:.2g}"
        position = f" ({self.position})" if self.position else ""
        return f"{check}{self.message}{size}{allowed}{position}"


class NotApplicable(Exception):
    """What the mixer declares leaves this check nothing to check; the message says why."""
