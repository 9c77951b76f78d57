"""`lathe doctor`: is everything ready for a run?"""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.arguments import Config, Overrides
from pipeline.console import say
from pipeline.errors import SetupError


def doctor(
    config: Config,
    overrides: Overrides = None,
    *,
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            metavar="N",
            min=1,
            help="Ranks that the training will have. Default: NODES x NPROC, engine.world_size, or the GPUs here.",
        ),
    ] = None,
    all_ranks: Annotated[
        bool, typer.Option("--all-ranks", help="Under torchrun or srun: ask every rank, and try a collective.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as failures.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Look for what would stop `lathe train` or `lathe encode`, before GPUs are held.

    Versions, devices, network, storage and rights on it, latents, earlier checkpoints, disks, memory, limits: each is
    told as pass, warn or fail, with a remedy. Exit code 5 where one fails. Nothing stays behind.

    ```
    lathe doctor run.yaml --ranks 16
    torchrun --nproc-per-node 2 -m pipeline doctor run.yaml --all-ranks
    ```
    """
    from pipeline.operate.doctor import job, page
    from pipeline.runtime.roll_call import RollCall

    call = RollCall() if all_ranks else None
    if call is None:
        found = job.examine_run(config, overrides or [], ranks=ranks)
    else:
        found = job.examine_ranks(config, overrides or [], call)
    is_well = page.is_well(found, strict=strict)
    if call is None or call.rank == 0:
        if as_json:
            say(page.as_json(found, strict=strict))
        else:
            page.show(found)
    if call is not None:
        is_well = job.agreed(call, is_well=is_well)
    if not is_well:
        raise typer.Exit(SetupError.exit_code)
