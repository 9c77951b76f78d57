"""Addresses in what runs noted, without the names, passwords and tokens in them."""

from __future__ import annotations

import re
from typing import Any

_OF_WEB = re.compile(r"""(?<=://)[^\s"'<>]*@""")  # to the last @: whoever wrote a password may not have escaped it
_OF_STORE = re.compile(r"""(?<=://)[^/\s"'<>]*@""")  # its names may have an @
_ADDRESS = re.compile(r"""\w+://[^\s"'<>]*""")


def without_credentials(value: Any) -> Any:
    """The same tree, in which `http://user:password@host/x?token=y` is `http://***@host/x?***`."""
    if isinstance(value, str):
        return _ADDRESS.sub(lambda found: _masked(found[0]), value)
    if isinstance(value, dict):
        return {name: without_credentials(inner) for name, inner in value.items()}
    return [without_credentials(inner) for inner in value] if isinstance(value, list) else value


def _masked(address: str) -> str:
    if not address.lower().startswith(("http://", "https://")):
        return _OF_STORE.sub("***@", address)
    place, mark, _ = _OF_WEB.sub("***@", address).partition("?")
    return f"{place}?***" if mark else place
