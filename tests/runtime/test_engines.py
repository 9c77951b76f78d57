"""Every engine, on a small network: averages, skipped steps, micro batches, and state that moves between them."""

from __future__ import annotations

import json
from unittest.mock import MagicMock

import pytest
import torch

from pipeline.config import EngineConfig
from pipeline.errors import ConfigError
from pipeline.runtime import deepspeed_config
from pipeline.runtime.engine import describe, micro_batch
from pipeline.runtime.zero import ZeroEngine

ENGINES = ("ddp", "zero1", "zero2", "zero3")


EXACT = {"ema.main": 0.0, "ema.slow": 0.0, "ema.power": 0.0}


@pytest.mark.ranks
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_starts_from_the_first_ranks_weights_unrounded(results, engine, precision):
    for result in results:
        found = dict(result["starting"][f"{engine} {precision}"])
        assert found.pop("masters") == 0.0
        assert [name for name, right in found.items() if not right] == []


@pytest.mark.ranks
def test_ddp_names_a_parameter_that_takes_no_part(results):
    for result in results:
        for said in result["starting"]["unused"]:
            assert said == (
                "engine.zero_stage=0: spare.weight and 1 more parameters take no part in the loss, and DDP waits for"
                " every gradient\n"
                "  freeze such parameters (requires_grad=False), or set engine.zero_stage to 1, 2 or 3"
            )


@pytest.mark.ranks
def test_norms_of_large_gradients_are_right(results):
    for result in results:
        assert len(result["sizes"]["norms"]) == 8
        assert max(result["sizes"]["norms"].values()) < 1e-6


@pytest.mark.ranks
def test_a_rank_without_a_piece_of_a_group_takes_part_in_a_restore(results):
    tiny = [result["sizes"]["tiny"] for result in results]
    assert len(tiny[0]) == 4
    assert all("bias" in found["pieces"] for found in tiny[0].values())
    assert all("bias" not in found["pieces"] for found in tiny[1].values())
    for found in (*tiny[0].values(), *tiny[1].values()):
        assert (found["steps"], found["off"]) == (2, pytest.approx(0.0, abs=1e-6))


@pytest.mark.ranks
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_fifty_steps_equal_those_by_hand_to_the_bit(results, alone, engine, precision):
    for result in (*results, alone):
        found = result["averages"][precision][engine]
        assert found["averages"] == EXACT
        assert found["weight"] == 0.0
        assert found["dtypes"] == ["torch.float32"]
        assert found["updates"] == 50


@pytest.mark.ranks
@pytest.mark.parametrize("engine", ENGINES)
def test_in_bfloat16_averages_are_no_further_from_float32_than_the_weights_are(results, alone, engine):
    for result in (*results, alone):
        found = result["averages"]["rounding"][engine]
        assert 0 < max(found["averages"].values()) <= found["weight"] < found["largest"] * 2**-9


@pytest.mark.ranks
@pytest.mark.parametrize("engine", ENGINES)
def test_averages_are_of_the_masters_and_not_of_the_working_weights(results, alone, engine):
    for result in (*results, alone):
        found = result["averages"]["by_hand"][engine]
        assert found["masters"] == 0.0
        assert found["working_weights"] > 1e-4


@pytest.mark.ranks
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "parameters", "parameters alone"])
def test_what_is_offloaded_learns_alike(results, engine):
    for result in results:
        found = result["averages"]["offloaded"][engine]
        assert found["averages"] == EXACT
        assert ("optimizer on the host (torch's fused AdamW)" in found["engine"]) == (engine != "parameters alone")
        assert ("weights on the host" in found["engine"]) == engine.startswith("parameters")


@pytest.mark.ranks
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["float32", "bfloat16", "float16", "accumulation", "offloaded"])
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(results, engine, how):
    if (engine, how) == ("ddp", "offloaded"):
        return
    for result in results:
        assert result["skipping"]["non_finite"][f"{engine} {how}"] == {
            "told": ["APPLIED", "APPLIED", "NOT_FINITE", "APPLIED"],
            "norm": float("inf"),
            "kept": True,
            "steps": 3,
        }


@pytest.mark.ranks
@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_scale_finds_its_size(results, engine):
    for result in results:
        found = result["skipping"]["loss_scale"][engine]
        overflows = found["told"].count("OVERFLOWED")
        assert overflows > 0
        assert found["told"] == ["OVERFLOWED"] * overflows + ["APPLIED"] * 10
        assert found["settled"] == [2 ** (20 - overflows), 1]
        first = found["settled"][0]
        assert found["seen"][:4] == [[first, 2], [first, 3], [2 * first, 0], [2 * first, 1]]
        assert found["set"]


@pytest.mark.ranks
def test_float16_is_refused_where_deepspeed_does_not_run_it(alone):
    assert alone["refused"] == (
        "engine.precision: DeepSpeed does not run float16 on this cpu\n"
        "  set engine.precision to bfloat16 or float32, or engine.zero_stage to 0"
    )


@pytest.mark.ranks
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_ddp_waits_for_the_flag_of_the_step_before_and_for_nothing_else(results, precision):
    for result in results:
        assert result["skipping"]["waits"][precision] == {
            "numbers": 0,
            "flags": [[step, step - 1] for step in range(1, 10)],
        }
        assert result["skipping"]["waits"]["control"] > 0


@pytest.mark.ranks
def test_micro_batches_change_nothing_but_rounding(results):
    for result in results:
        assert len(result["accumulated"]) == 8
        assert max(result["accumulated"].values()) < 1e-6


def check_elastic(found):
    for name, one in found.items():
        assert one["equal"], f"{name}: other state than was saved"
        assert (one["steps"], one["after"]) == (6, 26), name
        assert max(one["off"]) < 1e-4, name
        source, target = name.split(" to ")
        assert source != target or max(one["off"]) == 0.0, f"{name}: the same engine, but not to the bit"


@pytest.mark.ranks
def test_every_engine_takes_over_from_every_other(results):
    assert len(results[0]["elastic"]) == 16 + 4
    for result in results:
        check_elastic(result["elastic"])


@pytest.mark.ranks
def test_one_rank_takes_over_from_two(alone):
    assert len(alone["elastic"]) == 8
    check_elastic(alone["elastic"])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.ranks
def test_every_engine_at_each_world_size_takes_over_from_every_other(matrix):
    assert len(matrix) == 64
    check_elastic(matrix)


@pytest.mark.ranks
def test_a_new_run_begins_with_the_weights_of_any_engine_and_nothing_else(results):
    for result in results:
        found = result["beginning"]
        assert len(found["found"]) == 12
        for way, facts in found["found"].items():
            assert (way, [name for name, right in facts.items() if not right]) == (way, [])
        first, *others = found["losses"]
        assert all(losses == pytest.approx(first, rel=1e-5) for losses in others)
        assert "is of another model: extra has shape none there and [2, 3] here" in found["refused"]


@pytest.mark.ranks
def test_float16_goes_on_with_its_loss_scale(results):
    for result in results:
        assert all(found["same"] for found in result["scaled"].values())
        assert {found["scale"] for found in result["scaled"].values()} == {256}
        assert max(found["off_elsewhere"] for found in result["scaled"].values()) < 1e-3


THEORY = {  # bytes per parameter on each of two ranks: weights, gradients, masters, moments, one average
    "ddp float32": (4, 8, 0, 8, 4),
    "zero1 float32": (4, 4, 2, 4, 2),
    "zero2 float32": (4, 2, 2, 4, 2),
    "zero3 float32": (2, 2, 2, 4, 2),
    "ddp bfloat16": (2, 6, 4, 8, 4),
    "zero1 bfloat16": (2, 2, 2, 4, 2),
    "zero2 bfloat16": (2, 1, 2, 4, 2),
    "zero3 bfloat16": (1, 1, 2, 4, 2),
}


@pytest.mark.ranks
def test_memory_of_a_rank_is_what_the_page_says(results):
    for result in results:
        for name, expected in THEORY.items():
            assert tuple(result["memory"][name].values()) == pytest.approx(expected, abs=0.05), name


@pytest.mark.ranks
def test_an_average_takes_the_place_of_the_weights_and_training_does_not_notice(results):
    for result in results:
        assert len(result["swapping"]) == 12
        for way, found in result["swapping"].items():
            assert (way, [name for name, right in found.items() if not right]) == (way, [])


@pytest.mark.parametrize(("error", "collectives"), [(RuntimeError, 1), (MemoryError, 1), (InterruptedError, 2)])
def test_what_may_be_one_ranks_error_leaves_an_average_without_a_collective(error, collectives):
    master, wrapped = torch.zeros(2), MagicMock()
    wrapped.zero_optimization_stage.return_value = 2
    wrapped.optimizer.single_partition_of_fp32_groups = [master]
    optimizer = MagicMock(state={master: {"ema.main": torch.ones(2)}})
    with pytest.raises(error), ZeroEngine(wrapped, optimizer, EngineConfig()).using("ema.main"):
        raise error
    assert wrapped.optimizer.update_lp_params.call_count == collectives
    assert wrapped.optimizer.single_partition_of_fp32_groups[0] is master


@pytest.mark.ranks
def test_one_rank_without_deepspeed_never_imports_it(python):
    code = """
import sys, torch
from pipeline.config import AverageConfig, EngineConfig, OptimizerConfig
from pipeline.runtime import engine, process
from pipeline.train.optimizer import AdamWithEMA, parameter_groups
config, net = EngineConfig(zero_stage=0), torch.nn.Linear(2, 2)
ranks = process.start(config)
optimizer = AdamWithEMA(parameter_groups(net, 0.0), OptimizerConfig(), [AverageConfig(decay=0.9)])
built = engine.build(ranks, net, optimizer, config, micro_batch=1)
built.backward(built(torch.ones(1, 2)).sum())
built.step(0.1)
print(built, built.outcomes(wait=True), [m for m in ("deepspeed", "accelerate") if m in sys.modules])
ranks.finish()
"""
    assert python("-c", code) == "one rank, no DDP, float32 [<Outcome.APPLIED: 0>] []\n"


@pytest.mark.parametrize(
    ("settings", "batch", "ranks", "message", "remedy"),
    [
        (
            {"accumulation": 3},
            64,
            2,
            "engine.accumulation: 3 micro batches cannot share the 32 samples of each of 2 ranks equally",
            "set engine.accumulation to 2 or 4, or global_batch to 60 or 66",
        ),
        (
            {"accumulation": 9},
            8,
            2,
            "engine.accumulation: 9 micro batches cannot share the 4 samples of each of 2 ranks equally",
            "set engine.accumulation to 2 or 4, or global_batch to 18",
        ),
        (
            {"accumulation": 2},
            8,
            3,
            "global_batch: 8 samples cannot be shared equally by 3 ranks of 2 micro batches each",
            "set global_batch to 6 or 12, or start another number of ranks",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_nearest(settings, batch, ranks, message, remedy):
    with pytest.raises(ConfigError) as error:
        micro_batch(EngineConfig(**settings), batch, ranks)
    assert (error.value.message, error.value.remedy) == (message, remedy)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_whole_configuration_is_told_and_read_by_deepspeed(stage, precision, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    offload = {"offload_optimizer": stage > 0, "offload_parameters": stage == 3}
    config = EngineConfig.model_validate({"zero_stage": stage, "precision": precision, "accumulation": 2, **offload})
    whole = describe(config, global_batch=64, gradient_clip=1.0, world_size=8)
    assert whole["train_micro_batch_size_per_gpu"] == 4
    assert "auto" not in json.dumps(whole)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert whole == describe(config, global_batch=64, gradient_clip=1.0, world_size=8)
    if stage:
        assert (whole["train_batch_size"], whole["zero_optimization"]["stage"]) == (64, stage)


def test_what_deepspeed_refuses_is_one_line(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(deepspeed_config, "PERSISTENT_ELEMENTS", -1)
    with pytest.raises(ConfigError, match="engine: DeepSpeed refuses it") as error:
        describe(EngineConfig(zero_stage=3), global_batch=8, gradient_clip=0.0, world_size=2)
    assert "param_persistence_threshold" in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_networks_learn_alike(matrix, folder, ranks):
    found = json.loads((folder / f"matrix-{ranks}-0.json").read_text())["compiled"]
    assert found.keys() == {
        f"{engine} {how}" for engine in ENGINES[:3] for how in ("plain", "accumulated", "checkpointed", "both")
    }
    assert max(found.values()) < 1e-5


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.ranks
def test_ddp_costs_little_beside_a_bare_loop(cost):
    print(cost)  # noqa: T201  # what docs/engines.md tells: pytest -s
    assert cost["ddp"] < 1.15
    assert max(cost[engine] for engine in ENGINES) < 3
