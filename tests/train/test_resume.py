"""T1 at length: killed at random steps on a real S3 server, and gone on with by any engine."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from training_run import Run, finish, ranks_of, same_in_the_end

from pipeline.storage import open_store
from pipeline.train import checkpoint

LONG_STEPS, KILLS, COMPARED = 40, 5, 20
OTHERS = {
    "one rank": (["engine.zero_stage=2"], 1),
    "ZeRO-3": (["engine.zero_stage=3"], 2),
    "ZeRO-1, 2 micro batches": (["engine.zero_stage=1", "engine.accumulation=2"], 2),
    "DDP": (["engine.zero_stage=0"], 2),
}

pytestmark = [pytest.mark.ranks, pytest.mark.s3, pytest.mark.long]


def run_on(url: str, folder: Path, latents: str) -> Run:
    return Run(folder, latents, f"{url}/{folder.name}", steps=LONG_STEPS, checkpoint={"every": 2, "keep": 100})


def kill_at(run: Run, step: int, *overrides: str) -> int:
    """SIGKILL to one of two ranks, when a step has been logged; returns the step that is gone on from."""
    child = run.launch(*overrides)
    run.wait_for_step(step, child)
    random.choice(ranks_of(child)).kill()
    finish(child, 128 + 9)
    return run.steps()[0]


def test_killed_at_random_and_gone_on_with_by_every_engine(s3_server, tmp_path, make_latents, capsys):
    url = f"{s3_server.url}/resume"
    local = Path(make_latents(tmp_path / "latents")).parent
    for file in local.iterdir():
        open_store(f"{url}/latents").write(file.name, file.read_bytes())
    latents = f"{url}/latents/manifest.json"
    undisturbed = run_on(url, tmp_path / "undisturbed", latents)
    finish(undisturbed.launch())
    losses = undisturbed.losses()
    assert len(losses) == LONG_STEPS

    same = run_on(url, tmp_path / "same", latents)
    kills = sorted(random.sample(range(3, LONG_STEPS - 3), KILLS))
    seen = [kill_at(same, step) for step in kills]
    finish(same.launch())
    told = [f"killed at {kills}, gone on from {seen}"]
    assert same.losses() == losses
    assert same.state(LONG_STEPS) == undisturbed.state(LONG_STEPS)

    for name, (overrides, ranks) in OTHERS.items():
        run = run_on(url, tmp_path / name.replace(" ", "-").replace(",", ""), latents)
        last = kill_at(run, random.randint(4, LONG_STEPS - COMPARED - 3))
        assert 0 < last <= LONG_STEPS - COMPARED
        child = run.start(*overrides, ranks=1) if ranks == 1 else run.launch(*overrides)
        assert f"{checkpoint.step_name(last)}\n" in finish(child)
        off = [abs(ours / theirs - 1) for ours, theirs in zip(run.losses(), losses, strict=True)]
        told.append(f"{name} from step {last}: " + " ".join(f"{value:.0e}" for value in off[last:]))
        assert off[:last] == [0.0] * last
        assert max(off[last : last + COMPARED]) < 1e-4
        same_in_the_end(run, undisturbed)
    with capsys.disabled():
        sys.stdout.write("\n".join(["", *told, ""]))
