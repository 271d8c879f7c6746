"""Keys pressed while a display runs, where there is a keyboard. Ctrl-C stays what it is."""

from __future__ import annotations

import os
import select
import sys
from typing import Any, Self

try:
    import termios
    import tty
except ImportError:  # not a Unix terminal
    termios = None


class Keys:
    """Context manager: single keys instead of lines. A process in the background leaves the terminal alone."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = _stdin() if descriptor is None else descriptor
        self._before: list[Any] | None = None

    def __enter__(self) -> Self:
        if termios is not None and self._descriptor >= 0 and self._is_ours():
            self._before = termios.tcgetattr(self._descriptor)
            tty.setcbreak(self._descriptor)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None and self._is_ours():
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)
        self._before = None

    @property
    def listens(self) -> bool:
        return self._before is not None

    def pressed(self) -> str:
        """What has been typed since the last call; never waits."""
        if not self.listens or not self._is_ours() or not select.select([self._descriptor], [], [], 0)[0]:
            return ""
        return os.read(self._descriptor, 64).decode(errors="replace")

    def _is_ours(self) -> bool:
        """Whoever touches the terminal from the background is stopped by the system."""
        try:
            return os.tcgetpgrp(self._descriptor) == os.getpgrp()
        except OSError:
            return False


def _stdin() -> int:
    try:
        return sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        return -1
