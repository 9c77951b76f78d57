"""float16's loss scale through the checkpoints of a real run."""

from __future__ import annotations

import pytest
from training_run import Run, copy_of, finish

from pipeline.train import checkpoint

FLOAT16 = ("engine.zero_stage=0", "engine.precision=float16", "engine.loss_scale.growth_interval=4", "steps=7")
SAVED = ("checkpoint.every=1", "checkpoint.keep=9")


@pytest.mark.ranks
def test_a_run_goes_on_with_the_loss_scale_and_the_steps_since_it_changed(tmp_path, latents):
    run = Run(tmp_path, latents)
    finish(run.start(*FLOAT16, *SAVED, "engine.loss_scale.initial_power=6", ranks=1))
    counters = [found.run()["counters"] for found in reversed(checkpoint.find(run.store))]
    found = [(c["loss_scale"], c["loss_scale_good_steps"], c["skipped"]) for c in counters]
    assert found == [(64, 1, 0), (64, 2, 0), (64, 3, 0), (128, 0, 0), (128, 1, 0), (128, 2, 0), (128, 3, 0)]

    resumed = copy_of(run, tmp_path / "resumed", 3)
    finish(resumed.start(*FLOAT16, *SAVED, "engine.loss_scale.initial_power=20", ranks=1))  # what is saved counts
    assert [found.run()["counters"] for found in reversed(checkpoint.find(resumed.store))] == counters
    assert resumed.state(7) == run.state(7)
