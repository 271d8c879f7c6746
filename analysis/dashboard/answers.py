"""Answers as JSON with an ETag: a browser that polls gets 304 and no body while nothing has changed."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flask import Response, request

_COMPRESS_FROM = 10_000  # bytes
_GZIP_LEVEL = 1  # a sixth of the size in a few milliseconds


@dataclass(frozen=True)
class Answer:
    body: bytes
    etag: str
    status: int = 200

    @cached_property
    def compressed(self) -> bytes:
        return gzip.compress(self.body, _GZIP_LEVEL, mtime=0)


def answer(value: Any, status: int = 200) -> Answer:
    body = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    return Answer(body, hashlib.sha256(body).hexdigest()[:32], status)


class Answers:
    """The answers last given, each kept with the state that it was made from; the oldest of many are forgotten."""

    def __init__(self, n_kept: int = 64) -> None:
        self._n_kept = n_kept
        self._kept: OrderedDict[Hashable, tuple[Hashable, Answer]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, question: Hashable, state: Hashable, make: Callable[[], Answer]) -> Answer:
        """What was answered to ``question`` in ``state``, or what ``make`` now gives."""
        with self._lock:
            kept = self._kept.get(question)
            if kept is not None and kept[0] == state:
                self._kept.move_to_end(question)
                return kept[1]
        made = make()
        with self._lock:
            self._kept[question] = (state, made)
            self._kept.move_to_end(question)
            while len(self._kept) > self._n_kept:
                self._kept.popitem(last=False)
        return made


def respond(given: Answer) -> Response:
    """``given`` to the present request: whole, or 304 where the browser has it. Nobody else may keep it."""
    headers = {"Cache-Control": "private, no-cache", "ETag": f'"{given.etag}"', "Vary": "Cookie, Authorization"}
    if given.status == 200 and given.etag in request.if_none_match:
        return Response(status=304, headers=headers)
    body = given.body
    if takes_gzip(body):
        body = given.compressed
        headers["Content-Encoding"] = "gzip"
        headers["Vary"] += ", Accept-Encoding"
    return Response(body, status=given.status, mimetype="application/json", headers=headers)


def takes_gzip(body: bytes) -> bool:
    """Whether the present request takes ``body`` compressed, and it is large enough for that to pay."""
    return len(body) >= _COMPRESS_FROM and "gzip" in request.accept_encodings
