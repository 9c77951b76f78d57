"""A checkpoint as a model: what cannot be used says so."""

from __future__ import annotations

import pytest
import torch
import yaml
from checkpoints import write_checkpoint

from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.storage import open_store
from pipeline.train.checkpoint import CONFIG
from pipeline.train.trained_model import load_trained


def test_settings_that_were_taken_once_and_are_refused_now_are_told_in_one_line(tmp_path):
    tree = TrainConfig(manifest="m", output="o").model_dump(mode="json")
    tree["optimizer"]["reference_steps"] = 7
    texts = {CONFIG: yaml.safe_dump(tree).encode()}
    write_checkpoint(open_store(str(tmp_path)), 3, {"weight": {"w": torch.ones(2)}}, texts=texts)
    with pytest.raises(ConfigError, match=r"step-00000003/config\.yaml: optimizer: reference_steps: schedule=cosine"):
        load_trained(str(tmp_path))
