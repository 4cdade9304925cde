"""Arguments of other libraries that this one does not have."""

from __future__ import annotations

import warnings
from typing import Any, Mapping

from .errors import UnsupportedError

_warned: set[str] = set()


def refuse(where: str, given: Mapping[str, Any], neutral: Mapping[str, Any], advice: Mapping[str, str]) -> None:
    """Raises for arguments that would change answers, unless they have a value that changes nothing.

    Raises:
        UnsupportedError: It names the argument and what to do instead.
    """
    for name, value in neutral.items():
        if given[name] is not None and given[name] != value:
            hint = f"; {advice[name]}" if name in advice else ""
            raise UnsupportedError(f"{where}: {name}={given[name]!r} is not supported{hint}")


def ignore(where: str, given: Mapping[str, Any], neutral: Mapping[str, Any]) -> None:
    """Warns once about each argument that has no meaning here and changes no answer."""
    for name, value in neutral.items():
        key = f"{where}.{name}"
        if given[name] is not None and given[name] != value and key not in _warned:
            _warned.add(key)
            warnings.warn(f"{where}: {name}={given[name]!r} has no meaning here and is ignored", stacklevel=4)
