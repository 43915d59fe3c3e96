"""JSON objects with a checksum of their own, so that a flipped bit is no other setting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "sha256"


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values and their checksum, as they are to be written.

    Example:
        >>> opened(sealed({"lr": 0.1}))
        {'lr': 0.1}
    """
    return {**values, SEAL: _digest(values)}


def opened(values: Any) -> Any:
    """What ``sealed`` was given, from JSON; other values, and an object without a checksum, as they are.

    Raises:
        ValueError: if the checksum is not that of the values.

    Example:
        >>> opened(sealed({"lr": 0.1}) | {"lr": 0.2})
        Traceback (most recent call last):
            ...
        ValueError: values that do not fit their checksum; if you changed them, remove the line "sha256"
    """
    if not isinstance(values, dict) or SEAL not in values:
        return values
    rest = {name: value for name, value in values.items() if name != SEAL}
    if values[SEAL] != _digest(rest):
        raise ValueError(f'values that do not fit their checksum; if you changed them, remove the line "{SEAL}"')
    return rest


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
