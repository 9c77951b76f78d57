"""The table of metrics as Markdown, as docs/metrics.md has it.

`python -m pipeline.metrics.page docs/metrics.md` brings the page up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.metrics.table import DEFINITIONS, Definition, Subject

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
_PARTS: tuple[tuple[str, tuple[Subject, ...]], ...] = (
    ("`lathe train`: `lathe_train_...`", ("train",)),
    ("`lathe train-vae` alone: `lathe_first_stage_...`", ("first_stage",)),
    ("`lathe encode`: `lathe_encode_...`", ("encode",)),
    ("Storage, of every process: `lathe_storage_...`", ("storage",)),
)


def tables() -> str:
    """All metrics, each told once."""
    told: set[Definition] = set()
    parts = []
    for title, (subject,) in _PARTS:
        rows = [d for d in DEFINITIONS if subject in d.jobs and d not in told]
        told.update(rows)
        parts.append(
            "\n".join([f"### {title}", "", "| metric | labels | kind | by | unit | what |", "| --- " * 6 + "|"])
        )
        parts[-1] += "".join(f"\n{_row(d, subject)}" for d in rows)
    return "\n\n".join(parts)


def up_to_date(page: str) -> str:
    """A page with the present table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _row(definition: Definition, subject: Subject) -> str:
    name = definition.name(subject).removeprefix(f"lathe_{subject}_")
    others = ", ".join(f"`{other}`" for other in definition.jobs if other != subject)
    labels = ", ".join(f"`{label}`" for label in definition.labels)
    by = "each process" if definition.scope == "local" else "rank 0"
    also = f", {others} too" if others else ""
    return f"| `{name}`{also} | {labels} | {definition.kind} | {by} | {definition.unit} | {definition.help} |"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(up_to_date(path.read_text(encoding="utf-8")), encoding="utf-8")
