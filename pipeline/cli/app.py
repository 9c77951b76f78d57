"""The `lathe` command: its commands in the order of help, and how it ends."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline import __version__
from pipeline.cli import bench, data, doctor, launching, looking, runs, training
from pipeline.console import flush, printable, say, tell, without_logins
from pipeline.errors import LatheError, SetupError
from pipeline.stopping import SAID, Stopped


class _Group(TyperGroup):
    """Typer leaves without a word on Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Stopped as stop:  # it has told so
            raise typer.Exit(stop.exit_code) from stop
        except KeyboardInterrupt as stop:
            tell(SAID)
            raise typer.Exit(130) from stop


app = typer.Typer(
    name="lathe",
    cls=_Group,
    help="Image shards to latents, latents to text-to-image diffusion models.\n\n"
    "New here? `lathe demo` runs every stage on this machine and shows the pictures.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    add_completion=False,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": runs.demo,
    "pack": data.pack,
    "train-vae": training.train_vae,
    "encode": data.encode,
    "verify": data.verify,
    "inspect": data.inspect,
    "remove": data.remove,
    "train": training.train,
    "ema": training.ema,
    "sample": training.sample,
    "evaluate": training.evaluate,
    "export": training.export,
    "report": looking.report,
    "watch": looking.watch,
    "doctor": doctor.doctor,
    "config": runs.show_config,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(launching.app, name="launch")
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        say(__version__)
        raise typer.Exit


class Warnings(logging.Handler):
    """Warnings go where stderr is at that moment: above the progress bar, which takes its place."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one warning."""
        tell(self.format(record))


def _check_folder() -> None:
    try:
        os.getcwd()  # noqa: PTH109
    except OSError as error:  # libraries have no words for it
        raise SetupError("the current folder is not there any more", "go to one that is: cd ~") from error


def main() -> None:
    """Run the command line; a user's error ends it with one line, its remedy and the error's exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Warnings()])
    try:
        _check_folder()
        app(prog_name="lathe")
    except LatheError as error:
        from pipeline.runtime.launch import report

        error.message, error.remedy = (
            printable(without_logins(said), one_line=True) for said in (error.message, error.remedy)
        )
        if not report(error):  # a rank's launcher tells what all ranks meet once
            print(f"error: {error.message}", file=sys.stderr)  # noqa: T201
            if error.remedy:
                print(f"  {error.remedy}", file=sys.stderr)  # noqa: T201
        if error.leaves_at_once:
            flush()
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
