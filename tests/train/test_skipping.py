"""T4 through the trainer: steps that are not finite are skipped on all ranks, in every engine, and explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rank_scripts import TWO, run

pytestmark = pytest.mark.ranks
SCRIPT = Path(__file__).with_name("skipping_ranks.py")
BROKEN, STEPS, EPOCH = 7, 40, 5


def learnable(number, moments):
    """All samples alike, so that a loss can fall; one of them is infinite in a place."""
    moments[:4], moments[4:] = 0.5, -20
    moments[0] = 1.5
    if number == BROKEN:
        moments[1, 2, 3] = float("inf")


def all_broken(number, moments):
    moments[number % 4, 0, 0] = float("nan") if number % 2 else float("inf")


@pytest.fixture(scope="module")
def results(tmp_path_factory, make_latents) -> list[dict]:
    folder = tmp_path_factory.mktemp("skipping")
    addresses = [make_latents(folder / change.__name__, change=change) for change in (learnable, all_broken)]
    said = run(*TWO, str(SCRIPT), str(folder), *addresses, timeout=300)
    return [{**json.loads((folder / f"{rank}.json").read_text()), "said": said} for rank in (0, 1)]


ALL = [f"{engine} {dtype}" for engine in ("ddp", "zero1", "zero2", "zero3") for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("name", [*ALL, "ddp float16"])
def test_a_batch_that_is_not_finite_is_skipped_counted_and_the_run_converges(results, name):
    skipped = STEPS // EPOCH  # one sample of an epoch
    for result in results:
        found = result["trained"][name]
        assert (found["skipped"], found["updates"]) == (skipped, STEPS - skipped)
        assert found["counters"]["skipped"] == skipped
        assert found["counters"]["optimizer_step"] == STEPS - skipped
    losses = [loss for loss in results[0]["trained"][name]["losses"] if loss is not None]
    assert sum(losses[-8:]) < 0.6 * sum(losses[:8])


def test_the_samples_are_named_when_a_step_is_skipped(results):
    assert "step " in results[0]["said"]
    assert "was skipped: not finite are the latents of 0007 in 00000.tar of " in results[0]["said"]


@pytest.mark.parametrize("name", ["data", "data float16"])
def test_ten_in_a_row_by_data_name_them(results, name):
    for result in results:
        found = result[name]
        assert found["step"] == 10
        assert found["message"].startswith(
            "loss or gradient was not finite in 10 steps in a row, by step 10: not finite"
        )
        assert " more of /" in found["message"]
        assert found["remedy"].startswith("`lathe verify ")


def test_ten_in_a_row_by_weights_name_them(results):
    for result in results:
        assert "weights or optimizer are not finite: unet." in result["weights"]["message"]
        assert result["weights"]["remedy"].startswith("begin anew with")  # nothing was saved


def test_ten_in_a_row_by_a_learning_rate(results):
    for result in results:
        assert "overflowed; latents and weights are finite" in result["rate"]["message"]
        assert "smaller optimizer.learning_rate" in result["rate"]["remedy"]
        assert "optimizer.gradient_clip=1" in result["rate"]["remedy"]
