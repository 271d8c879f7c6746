"""Checkpoints: everything that decides the rest of a training, written atomically, loaded as data only."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from experiments.errors import UserError


def save_checkpoint(path: Path, values: dict[str, Any]) -> None:
    """``values``: tensors and plain containers. A reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(values, temporary)
        os.replace(temporary, path)
    except BaseException as error:
        # torch has no exception of its own for it
        is_full = isinstance(error, RuntimeError) and shutil.disk_usage(path.parent).free == 0
        temporary.unlink(missing_ok=True)
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The values, or None where there is no checkpoint. Loaded with ``weights_only``: no code runs."""
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({error}); delete it to start the run afresh") from None
