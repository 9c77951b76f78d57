"""`lathe launch`: pipelines on SLURM, on Kubernetes and on this machine, and what has become of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import say, tell

if TYPE_CHECKING:
    from pipeline.config import SiteConfig
    from pipeline.operate.launch.stages import Pipeline

app = typer.Typer(
    help="Run files as jobs: on SLURM, on Kubernetes, or one after the other on this machine.\n\n"
    "Several run files, or a pipeline (`job: launch`), are one submission: each stage begins once the one before has "
    "finished. All of them are resolved and held against each other before anything starts.\n\n"
    "```\nlathe launch local configs/demo/pipeline.yaml root=my-run pack.source=photos\n"
    "lathe launch slurm encode.yaml train.yaml export.yaml --tasks 16 --nodes 4 --dry-run\n"
    "lathe launch status\n```",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="Run file of the first stage, or a pipeline (`job: launch`).")
]
More = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG|FIELD=VALUE",
        help="Run files of the stages after it; and fields to set, `STAGE.FIELD=VALUE` in one of them, such as "
        "`train.steps=500`, others in all, such as `root=s3://mine/run`.",
        show_default=False,
    ),
]
Site = Annotated[
    Path | None,
    typer.Option(
        "--site",
        metavar="FILE",
        help="The cluster's settings (configs/site.example.yaml). Default: $LATHE_SITE, or ~/.config/lathe/site.yaml.",
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--folder",
        metavar="DIR",
        help="Where submissions are kept, a folder each: run files, scripts, logs. On a cluster all nodes must see it. "
        "Default: `lathe-launches` here.",
    ),
]
Nodes = Annotated[int | None, typer.Option("--nodes", metavar="N", min=1, help="Machines of `train`.")]
Tasks = Annotated[int | None, typer.Option("--tasks", metavar="N", min=1, help="Workers of `encode`.")]
AtOnce = Annotated[
    int | None, typer.Option("--at-once", metavar="K", min=1, help="Of the workers, how many may run at the same time.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and print all that would run; start and write nothing.")
]
Submission = Annotated[
    str | None,
    typer.Argument(
        metavar="SUBMISSION",
        help="Its name, or its folder. Default: the newest in `lathe-launches` here.",
        show_default=False,
    ),
]


@app.command("slurm")
def launch_slurm(
    config: Config,
    more: More = None,
    *,
    site: Site = None,
    folder: Folder = None,
    nodes: Nodes = None,
    tasks: Tasks = None,
    at_once: AtOnce = None,
    dry_run: DryRun = False,
) -> None:
    """Submit to SLURM: every stage a job that waits for the one before.

    `encode` of several tasks is an array; behind it one worker takes what tasks that failed have left, and sees to the
    manifest. `train-vae`, `encode` and `train` are queued again when their time is over or a node is lost, and go on
    where they were. If one job is refused, those submitted before are cancelled.

    With `--dry-run` SLURM is asked whether it would take each script (`sbatch --test-only`).

    ```
    lathe launch slurm encode.yaml train.yaml export.yaml root=s3://mine/run --tasks 16 --nodes 4
    lathe launch slurm train.yaml --nodes 8 optimizer.learning_rate=1e-4
    ```
    """
    from pipeline.operate.launch import slurm

    pipeline, settings = _for_cluster([config, *(more or [])], site, nodes, tasks, at_once)
    for warning in slurm.signal_warnings(pipeline, settings):
        tell(f"warning: {warning}")
    if dry_run:
        printed, verdicts = slurm.dry_run(pipeline, settings, folder, Path.cwd())
        say(printed)
        for verdict in verdicts:
            tell(verdict)
        return
    submission = slurm.launch(pipeline, settings, folder, Path.cwd())
    for stage in submission.record.stages:
        say(f"{stage.name:<16}job {stage.id}")
    tell(f"submitted as {submission.name}, in {submission.folder}\n  lathe launch status {submission.shown}")


@app.command("k8s")
def launch_k8s(
    config: Config,
    more: More = None,
    *,
    site: Site = None,
    folder: Folder = None,
    nodes: Nodes = None,
    tasks: Tasks = None,
    at_once: AtOnce = None,
    watch: Annotated[bool, typer.Option("--watch", help="Wait for the last stage too, and fail if it does.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Run on Kubernetes, by kubectl: every stage a Job, made once the one before has finished.

    Kubernetes has no Jobs that wait for others, so this command waits, without a GPU. It may be stopped, and Jobs go
    on; the same command goes on waiting. Addresses must be ones that pods share: s3://, or below /data with
    `kubernetes.data_claim`. `encode`, `train` and `export` can be launched.

    ```
    lathe launch k8s encode.yaml train.yaml export.yaml root=s3://mine/run --tasks 16 --nodes 4
    lathe launch k8s train.yaml --nodes 2 --dry-run | kubectl apply --dry-run=server -f -
    ```
    """
    from pipeline.operate.launch import k8s

    pipeline, settings = _for_cluster([config, *(more or [])], site, nodes, tasks, at_once)
    for warning in k8s.model_warnings(pipeline, settings):
        tell(f"warning: {warning}")
    if dry_run:
        say(k8s.dry_run(pipeline, settings, folder, Path.cwd()).rstrip())
        return
    submission = k8s.launch(pipeline, settings, folder, Path.cwd(), waits=watch)
    for stage in submission.record.stages:
        say(f"{stage.name:<16}{stage.id}")
    tell(f"in {submission.folder}\n  lathe launch status {submission.shown}")


@app.command("local")
def launch_local(
    config: Config,
    more: More = None,
    folder: Folder = None,
    tasks: Annotated[
        int | None, typer.Option("--tasks", metavar="N", min=1, help="Workers of `encode`, side by side. Default: one.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Run the stages one after the other on this machine, each by its own command; `train` on all GPUs.

    The first that fails ends it, with its exit code. Stopped or failed, the same command goes on with what is not
    finished. What a pipeline says of nodes and tasks is for clusters.

    ```
    lathe launch local configs/demo/pipeline.yaml root=my-run pack.source=photos
    ```
    """
    from pipeline.operate.launch import local
    from pipeline.operate.launch.stages import read_pipeline

    pipeline = read_pipeline([config, *(more or [])]).on_one_machine(tasks)
    if dry_run:
        say(local.dry_run(pipeline, folder, Path.cwd()))
        return
    tell(f"finished: {local.launch(pipeline, folder, Path.cwd()).folder}")


@app.command()
def status(submission: Submission = None) -> None:
    """How far each stage is: waiting, running, finished, failed, cancelled.

    Exit code 1 where a stage has failed or was stopped.

    ```
    lathe launch status
    watch -n 30 lathe launch status demo-1123-164512
    ```
    """
    from pipeline.operate.launch.states import is_well, page, states
    from pipeline.operate.launch.submissions import find

    found = find(submission)
    now = states(found)
    say(page(found, now))
    if not is_well(now):
        raise typer.Exit(1)


@app.command()
def logs(
    submission: Submission = None,
    stage: Annotated[str | None, typer.Option("--stage", metavar="NAME", help="One stage alone.")] = None,
    task: Annotated[
        int | None,
        typer.Option("--task", metavar="I", min=0, help="One worker of `encode` alone; on Kubernetes, one pod."),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", metavar="N", min=0, help="The last so many of each log.")] = 20,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until the stage is over.")
    ] = False,
) -> None:
    """Print what a stage has said; without `--stage`, the last that has said anything.

    ```
    lathe launch logs --follow
    lathe launch logs demo-1123-164512 --stage encode --task 3 -n 100
    ```
    """
    from pipeline.operate.launch.reading import read
    from pipeline.operate.launch.submissions import find

    read(find(submission), stage, task, lines, follow=follow)


@app.command()
def cancel(
    submission: Submission = None,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="NAME", help="This stage, and those after it.")
    ] = None,
) -> None:
    """End what is running of a submission, and what waits; one that has finished stays as it is.

    What is finished is kept: the same launch goes on from there.

    ```
    lathe launch cancel demo-1123-164512
    ```
    """
    from pipeline.operate.launch.cancelling import cancel as run
    from pipeline.operate.launch.submissions import find

    found = find(submission)
    ended = run(found, stage)
    say(f"cancelled of {found.name}: {', '.join(ended)}" if ended else f"nothing of {found.name} is left to cancel")


def _for_cluster(
    arguments: list[str], site: Path | None, nodes: int | None, tasks: int | None, at_once: int | None
) -> tuple[Pipeline, SiteConfig]:
    from pipeline.operate.launch.sites import find_site
    from pipeline.operate.launch.stages import read_pipeline

    settings = find_site(site)
    return read_pipeline(arguments, nodes=nodes, tasks=tasks, at_once=at_once).with_finalizers(), settings
