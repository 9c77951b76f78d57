"""What of a guided run is finished, so that a stopped one goes on where it was."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline.errors import ConfigError


@dataclass
class DemoState:
    """The file `state.json` of a demo's folder."""

    preset: str
    root: str
    finished: dict[str, str] = field(default_factory=dict)  # stage -> its resolved settings
    wall_seconds: dict[str, float] = field(default_factory=dict)  # stage -> seconds, over all attempts
    peak_rss_bytes: int = 0

    def save(self, file: Path) -> None:
        """Write the file whole or not at all."""
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        temporary.replace(file)

    @classmethod
    def load(cls, file: Path, preset: str, root: str) -> DemoState:
        """The state in `file`, or a new one. Raises ConfigError when it is of another demo, or cannot be read."""
        if not file.is_file():
            return cls(preset, root)
        try:
            state = cls(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{file} cannot be read", "start over with --fresh") from error
        if (state.preset, state.root) != (preset, root):
            raise ConfigError(
                f"{file.parent} holds a demo of preset {state.preset} on {state.root}",
                "start over with --fresh, or use another --dir",
            )
        return state
