"""The error type of user mistakes, for the layers above."""

from mixers.errors import UserError, nearest

__all__ = ["UserError", "nearest"]
