"""Arguments that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="Run file in YAML, or a bundled one: see `lathe config`.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="FIELD=VALUE", help="Fields to set, dotted: `optimizer.learning_rate=1e-4 steps=500`."),
]
ManifestUrl = Annotated[
    str, typer.Argument(metavar="MANIFEST", help="Address of a data set's manifest.json, local or s3://.")
]
