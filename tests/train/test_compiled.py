"""torch.compile of the real network, with what else changes how it is called."""

from __future__ import annotations

import pytest
from training_run import Run, finish

pytestmark = [pytest.mark.long, pytest.mark.ranks, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_compiled_network_learns_alike_with_activation_checkpointing_and_micro_batches(tmp_path, latents, stage):
    run = Run(tmp_path, latents)
    finish(run.launch("steps=6", f"output={tmp_path}/plain"))
    compiled = ("engine.compile=true", "engine.activation_checkpointing=true", "engine.accumulation=2")
    child = run.launch("steps=6", f"engine.zero_stage={stage}", "engine.timeout_seconds=1000", *compiled)
    said = child.communicate(timeout=1000)[0]
    assert child.returncode == 0, said
    plain = Run(tmp_path / "again", latents, f"{tmp_path}/plain")
    assert run.losses() == pytest.approx(plain.losses(), rel=1e-5)
