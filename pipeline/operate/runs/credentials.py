"""What runs noted, without the users, passwords and tokens in its addresses."""

from __future__ import annotations

from typing import Any

from pipeline.console import without_logins


def without_credentials(value: Any) -> Any:
    """The same tree, in which `http://user:password@host/x?token=y` is `http://***@host/x`."""
    if isinstance(value, str):
        return without_logins(value)
    if isinstance(value, dict):
        return {name: without_credentials(inner) for name, inner in value.items()}
    return [without_credentials(inner) for inner in value] if isinstance(value, list) else value
