"""Watched runs on a terminal: a block each, or a row each where there is no room for that."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.console import duration, printable
from pipeline.operate.watch.figures import ASCII, BLOCKS, percent, seconds_left, share_done
from pipeline.operate.watch.watched import Watched, line

_STYLES = {
    "finished": "green",
    "running": "cyan",
    "unfinished": "yellow",
    "stalled": "bold yellow",
    "stopped": "yellow",
    "killed": "bold red",
}
_NAME, _VALUE = 10, 12
_LEAST_COURSE = _LEAST_BAR = 8
_MOST_NEWS = 3


class Screen:
    """What is drawn, anew at each refresh.

    Args:
        watched: the runs.
        keys: whether there is a keyboard that is listened to.
    """

    def __init__(self, watched: Sequence[Watched], *, keys: bool) -> None:
        self._watched, self.keys = watched, keys
        self.news: list[str] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        blocks = [list(self._block(one, console)) for one in self._watched]
        news = self.news[-_MOST_NEWS:][: max(0, console.height - 3)]
        room = console.height - 2 - len(news)
        if sum(len(block) + 1 for block in blocks) <= room:
            for block in blocks:
                yield from block
                yield Text("")
        else:
            shown = self._watched if len(self._watched) <= room else self._watched[: max(1, room - 1)]
            for one in shown:
                yield self._row(one)
            if len(shown) < len(self._watched) and room > 1:
                yield _line(f"and {len(self._watched) - len(shown):,} more")
        for said in news:
            yield _line(printable(said, one_line=True))
        if room > 0:
            yield _line("q or Ctrl-C leaves; the runs go on" if self.keys else "Ctrl-C leaves; the runs go on")

    def _block(self, one: Watched, console: Console) -> list[Text | Table]:
        run, levels = one.run, BLOCKS if console.encoding.lower().startswith("utf") else ASCII
        head = Text(no_wrap=True, overflow="ellipsis")
        head.append(printable(run.name, one_line=True), style="bold")
        head.append("  ")
        head.append(printable(str(one.state), one_line=True), style=_STYLES.get(one.state.word, ""))
        lines: list[Text | Table] = [head]
        if (done := share_done(run)) is not None:
            lines.append(self._bar(one, done, console.width))
        for figure in one.figures:
            room = console.width - _NAME - max(_VALUE, len(figure.value)) - 5
            text = Text(f"  {figure.name:<{_NAME}}", style="dim", no_wrap=True, overflow="ellipsis")
            text.append(f"{printable(figure.value, one_line=True):<{_VALUE}}", style="not dim")
            if figure.course is not None and room >= _LEAST_COURSE and len(figure.course.values) > 1:
                text.append(f"  {figure.drawn(min(room, 60), levels)}", style="not dim blue")
            lines.append(text)
        lines.append(_line(f"  {_footnote(one)}"))
        return lines

    def _bar(self, one: Watched, done: float, width: int) -> Text | Table:
        left = seconds_left(one.run) if one.state.word == "running" else None
        said = percent(done) + (f", {duration(left)} left" if left else "")
        room = width - len(said) - 6
        if room < _LEAST_BAR:
            return _line(f"  {said}")
        table = Table.grid(padding=(0, 1))
        table.add_row(" ", ProgressBar(total=1.0, completed=done, width=min(50, room)), said)
        return table

    def _row(self, one: Watched) -> Text:
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(printable(one.run.name, one_line=True), style="bold")
        text.append(f" {one.state.word} ", style=_STYLES.get(one.state.word, ""))
        text.append(printable(line(one), one_line=True))
        return text


def _line(text: str) -> Text:
    return Text(text, style="dim", no_wrap=True, overflow="ellipsis")


def _footnote(one: Watched) -> str:
    """Checkpoints, starts, when something last came, what is wrong."""
    run = one.run
    checkpoints = run.checkpoints if run.found.kind != "encode" else {}
    parts = [f"checkpoint step {max(checkpoints):,}"] if checkpoints else []
    parts += [f"{len(run.starts)} starts"] if len(run.starts) > 1 else []
    parts += [f"news {duration(one.silent)} ago"] if one.silent is not None and one.state.word != "finished" else []
    parts += run.problems
    parts += [f"not read now: {one.problem}"] if one.problem else []
    return printable("; ".join(parts) or run.found.address, one_line=True)
