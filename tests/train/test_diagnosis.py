"""Why steps were not finite, by one rank: which samples, and whether there is a checkpoint to go on from."""

from __future__ import annotations

import pytest
import torch
from one_rank import alone, small_engine

from pipeline.config import LoaderConfig, TrainConfig
from pipeline.data.datasets import open_datasets
from pipeline.data.loader import LatentLoader
from pipeline.errors import LatheError
from pipeline.runtime import state
from pipeline.runtime.engine import Engine, Outcome
from pipeline.train.diagnosis import Suspects
from pipeline.train.skipped_steps import LIMIT


def spoil(number, moments):
    moments[0, 0, 0] = float("nan")


def suspects(latents: str, *, is_saved: bool, engine: Engine | None = None) -> Suspects:
    config = TrainConfig(manifest=latents, output="o")
    datasets = open_datasets(config.sources, global_batch=2)
    engine = engine or small_engine(alone())
    found = Suspects(config, datasets, alone(), engine, step=0, is_saved=lambda: is_saved)
    with LatentLoader(
        datasets, global_batch=2, seed=0, window=4, rank=0, world_size=1, config=LoaderConfig()
    ) as loader:
        for _ in range(LIMIT):
            found.remember(loader.take(), torch.tensor(1.0))
            found.look([Outcome.NOT_FINITE])
    return found


def explained(found: Suspects) -> LatheError:
    with pytest.raises(LatheError) as told:
        found.explain(LIMIT)
    return told.value


def test_samples_are_named_with_their_shard(tmp_path, make_latents, caplog):
    folder = tmp_path / "spoilt"
    error = explained(suspects(make_latents(folder, change=spoil), is_saved=True))
    assert f" in 00000.tar and {2 * LIMIT - 3} more of {folder}" in error.message
    assert error.remedy.startswith(f"`lathe verify {folder}` names all such samples")
    assert error.remedy.endswith("; the last checkpoint is from before")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert said[0].startswith("step 1 was skipped: not finite are the latents of ")
    assert said[0].count(" in 00000.tar") == 2


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_checkpoint_from_before_is_told_of_where_there_is_one(tmp_path, latents, make_latents, is_saved):
    broken = small_engine(alone())
    next(iter(state.fragments(broken))).tensors[state.WEIGHT].fill_(float("nan"))
    of_state = explained(suspects(latents, is_saved=is_saved, engine=broken)).remedy
    of_rate = explained(suspects(latents, is_saved=is_saved)).remedy
    of_data = explained(suspects(make_latents(tmp_path / "spoilt", change=spoil), is_saved=is_saved)).remedy
    assert of_state.startswith("delete the newest checkpoints" if is_saved else "begin anew with a smaller")
    assert of_rate.startswith("resume with" if is_saved else "begin anew with")
    assert [("the last checkpoint is from before" in said) for said in (of_rate, of_data)] == [is_saved] * 2
