"""A batch goes to a device as a whole."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import Batch, TowerText


def batch() -> Batch:
    texts = TowerText(embeddings=torch.ones(2, 3, 4, dtype=torch.float16), mask=torch.ones(2, 3, dtype=torch.bool))
    return Batch(
        step=7,
        bucket=(4, 8),
        positions=torch.arange(2),
        epochs=torch.zeros(2, dtype=torch.int64),
        datasets=torch.zeros(2, dtype=torch.int64),
        shards=np.zeros(2, np.int64),
        moments=torch.ones(2, 4, 2, 4, dtype=torch.float16),
        text={"a": texts, "b": TowerText(tokens=torch.ones(2, 5, dtype=torch.int64), pooled=torch.ones(2, 6))},
        size=torch.zeros(2, 6, dtype=torch.int32),
        weight=torch.ones(2),
        mirrored=torch.zeros(2, dtype=torch.bool),
        keys=["k", ""],
        captions=[1, 0],
    )


def tensors(one: Batch | TowerText) -> dict[str, Tensor]:
    values = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    found = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    for tower, text in values.get("text", {}).items():
        found |= {f"{tower}.{name}": value for name, value in tensors(text).items()}
    return found


def test_every_tensor_moves_and_nothing_else_changes() -> None:
    before = batch()
    after = before.to("meta")
    assert {name: value.shape for name, value in tensors(after).items()} == {
        name: value.shape for name, value in tensors(before).items()
    }
    assert len(tensors(after)) == 11
    assert all(value.is_meta for value in tensors(after).values())
    assert not any(value.is_meta for value in tensors(before).values())
    kept = ("step", "bucket", "keys", "captions")
    assert [getattr(after, name) for name in kept] == [getattr(before, name) for name in kept]


def test_every_tensor_is_pinned(monkeypatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.to("meta"))  # as there may be no GPU here
    assert all(value.is_meta for value in tensors(batch().pin_memory()).values())
