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
    home = environment.get("XDG_CONFIG_HOME") or "~/.config"
    usual = Path(os.path.expanduser(home), "lathe", "site.yaml")  # noqa: PTH111  a user without a home has none
    if named is None and not os.path.isfile(usual):  # noqa: PTH113  nor does one whose home is somebody else's
        return SiteConfig()
    path = named or usual
    if not os.path.isfile(path):  # noqa: PTH113
        who = "--site" if given else VARIABLE
        raise ConfigError(f"{who}: {path}: no such file", "copy configs/site.example.yaml there, and fill it in")
    return runfile.load_settings(SiteConfig, str(path))
