"""What a pattern such as ``gated_deltanet*3,softmax(window=512) | pkm:channel@6 + fwpkm@2`` is made of, by its text."""

from __future__ import annotations

import re


def mixer_names(pattern: str) -> list[str]:
    """Names of its mixers in their order, each once."""
    without_options = re.sub(r"\([^()]*\)", "", pattern)
    found = re.findall(r"(?<![\w:])[A-Za-z_]\w*", without_options)
    return list(dict.fromkeys(found))


def windowed(pattern: str) -> int:
    """How many of its attention layers have a window."""
    return len(re.findall(r"softmax\([^()]*window=\d", re.sub(r"\s", "", pattern)))
