"""The exceptions of this package.

Every failure of a model or of its files is an :class:`Error`. Its class says what kind of failure it is, and most classes are
also of the built-in kind that fits, so that ``except ValueError`` or ``except TimeoutError`` work as usual.
"""

from __future__ import annotations

import builtins
from typing import Any

__all__ = [
    "Error",
    "InvalidRequestError",
    "ContextOverflowError",
    "InvalidConfigError",
    "NotFoundError",
    "InvalidModelError",
    "UnsupportedError",
    "ResourceExhaustedError",
    "BusyError",
    "TimeoutError",
    "CancelledError",
    "ClosedError",
    "BackendError",
    "IoError",
]


class Error(Exception):
    """The base of all exceptions of this package. ``str(error)`` is one line that says what to do."""

    kind: str = "error"
    """The kind of failure, as in logs: ``invalid_request``, ``busy`` and so on."""
    operation: str = ""
    """The operation that failed, such as ``load`` or ``generate``; empty where it is not known."""
    retryable: bool = False
    """Whether the same call may succeed later without any change."""
    context: dict[str, str] = {}
    """What the error is about, such as the file or the tensor."""


class InvalidRequestError(Error, ValueError):
    """A field of a request is out of its range. Change the request."""

    kind = "invalid_request"


class ContextOverflowError(InvalidRequestError):
    """The prompt does not fit into the context. Shorten it or raise the context."""

    kind = "context_overflow"


class InvalidConfigError(Error, ValueError):
    """The configuration cannot be read or names something that does not exist."""

    kind = "invalid_config"


class NotFoundError(Error, FileNotFoundError):
    """No file is at the path that was named."""

    kind = "not_found"


class InvalidModelError(Error, ValueError):
    """A model file is damaged or contradicts itself."""

    kind = "invalid_model"


class UnsupportedError(Error, NotImplementedError):
    """The request asks for something that is not implemented or not compiled in."""

    kind = "unsupported"


class ResourceExhaustedError(Error, MemoryError):
    """Memory or another resource is exhausted."""

    kind = "resource_exhausted"


class BusyError(Error):
    """The queue is full at the moment. Try again later."""

    kind = "busy"


class TimeoutError(Error, builtins.TimeoutError):
    """The answer took longer than the host allows."""

    kind = "timeout"


class CancelledError(Error):
    """The request was cancelled."""

    kind = "cancelled"


class ClosedError(Error):
    """The model has been closed, has stopped, or was loaded before this process was forked. Load it again."""

    kind = "closed"


class BackendError(Error, RuntimeError):
    """The engine failed while it computed."""

    kind = "backend"


class IoError(Error, OSError):
    """Reading or writing a file failed."""

    kind = "io"


_CLASSES = {
    value.kind: value for value in list(globals().values()) if isinstance(value, type) and issubclass(value, Error)
}


def from_native(kind: str, message: str, operation: str, retryable: bool, context: dict[str, Any]) -> Error:
    """The exception for an error of the native module, which calls this."""
    error = _CLASSES.get(kind, Error)(message)
    error.kind, error.operation, error.retryable, error.context = kind, operation, retryable, context
    return error
