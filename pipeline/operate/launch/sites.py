"""Which site's settings count."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pipeline import runfile
from pipeline.config import SiteConfig
from pipeline.errors import ConfigError

VARIABLE = "LATHE_SITE"


def find_site(given: Path | None, environment: Mapping[str, str] = os.environ) -> SiteConfig:
    """The file given, else that of $LATHE_SITE, else ~/.config/lathe/site.yaml, else nothing but defaults.

    Raises:
        ConfigError: a file that was named is not there, or holds what it may not; it names the field.
    """
    named = given or (Path(environment[VARIABLE]) if environment.get(VARIABLE) else None)
    usual = Path(environment.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "lathe" / "site.yaml"
    if named is None and not usual.is_file():
        return SiteConfig()
    path = named or usual
    if not path.is_file():
        who = "--site" if given else VARIABLE
        raise ConfigError(f"{who}: {path}: no such file", "copy configs/site.example.yaml there, and fill it in")
    return runfile.load_settings(SiteConfig, str(path))
