from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import clip, save_clip

from pipeline.config import EncodeTextConfig, TowerConfig
from pipeline.encode.captions import CaptionEncoder
from pipeline.errors import ConfigError
from pipeline.models.frozen_text import FrozenTower
from pipeline.models.text import Tokenizer

CPU = torch.device("cpu")
CAPTIONS = ["a cat", "", "two dogs, one of them asleep!", "word " * 100, "a cat"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_clip(tmp_path_factory.mktemp("captions") / "clip", clip())


def cached(folder: str, batch_size: int = 2, tower: dict[str, object] | None = None, **fields) -> CaptionEncoder:
    tree = {"mode": "cached", "context_length": 20, "towers": [{"name": "one", "model": folder, **(tower or {})}]}
    return CaptionEncoder(EncodeTextConfig(**{**tree, **fields}), CPU, batch_size)


def test_joint_stores_the_ids_of_the_one_tower():
    encode = CaptionEncoder(EncodeTextConfig(context_length=20), CPU, 2)
    found = encode(CAPTIONS)
    assert [set(arrays) for arrays in found] == [{"tokens.clip"}] * 5
    ids = np.stack([arrays["tokens.clip"] for arrays in found])
    np.testing.assert_array_equal(ids, Tokenizer(20)(CAPTIONS))
    assert ids.dtype == np.uint16
    (tower,) = encode.towers
    assert (tower.name, tower.context_length, tower.weights, tower.width) == ("clip", 20, "", 0)
    assert encode([]) == []


def test_online_stores_the_ids_of_every_tower_and_loads_none():
    towers = [
        {"name": "l", "model": "ViT-L-14", "pretrained": "openai", "pad": "end"},
        {"name": "g", "model": "nowhere"},
    ]
    encode = CaptionEncoder(EncodeTextConfig(mode="online", context_length=20, towers=towers), CPU, 2)
    found = encode(CAPTIONS)
    for name, pad in (("l", "end"), ("g", "zero")):
        np.testing.assert_array_equal([row[f"tokens.{name}"] for row in found], Tokenizer(20, pad)(CAPTIONS))
    assert [tower.name for tower in encode.towers] == ["l", "g"]
    assert encode.towers[0].tokenizer != encode.towers[1].tokenizer
    assert {tower.weights for tower in encode.towers} == {""}


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_cached_stores_the_towers_states_whatever_the_batch(folder, batch_size):
    found = cached(folder, batch_size, {"pooled": True})(CAPTIONS)
    ids = torch.from_numpy(Tokenizer(20)(CAPTIONS).astype(np.int64))
    hidden, pooled = FrozenTower(TowerConfig(model=folder, pooled=True)).encode(ids)
    assert {array.dtype for row in found for array in row.values()} == {np.dtype(np.float16)}
    np.testing.assert_allclose([row["text.one"] for row in found], hidden.numpy(), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose([row["pooled.one"] for row in found], pooled.numpy(), rtol=2e-3, atol=2e-3)


def test_trimmed_keeps_the_captions_own_tokens(folder):
    whole, trimmed = cached(folder)(CAPTIONS), cached(folder, padding="trimmed")(CAPTIONS)
    lengths = [len(row["text.one"]) for row in trimmed]
    assert lengths == [4, 2, 10, 20, 4]
    for long, short, length in zip(whole, trimmed, lengths, strict=True):
        np.testing.assert_array_equal(short["text.one"], long["text.one"][:length])
        assert short["text.one"].base is None  # a view would keep the whole in memory


def test_description_names_what_changes_the_states(folder):
    (plain,) = cached(folder).towers
    assert (plain.width, plain.pooled_width, plain.layer, plain.final_norm) == (32, 0, "last", True)
    assert plain.weights == FrozenTower(TowerConfig(model=folder)).weights_hash()
    assert cached(folder, precision="bfloat16").towers == (plain,)
    others = [{"layer": "penultimate"}, {"final_norm": False}, {"pooled": True}, {"pad": "end"}]
    assert len({plain, *(cached(folder, tower=tower).towers[0] for tower in others)}) == 5


def test_context_longer_than_the_towers_is_refused(tmp_path: Path):
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}
    folder = save_clip(tmp_path / "short", clip(text_cfg=text), text_cfg=text)
    with pytest.raises(ConfigError, match=r"text\.context_length: 20 is more than the 16 tokens of tower one"):
        cached(folder)


def test_what_overflows_float16_is_encoded_again_in_float32(tmp_path, monkeypatch):
    model = clip()
    ids = Tokenizer(20)(["cat"])[0]
    with torch.no_grad():
        model.token_embedding.weight[int(ids[1])] *= 5e6  # beyond float16; the norms bring it back
    folder = save_clip(tmp_path / "fragile", model)
    captions = ["dog", "cat", "bird"]
    loaded = []
    monkeypatch.setattr(
        "pipeline.encode.captions.FrozenTower",
        lambda tower, device, precision: (loaded.append(precision), FrozenTower(tower, device, precision))[1],
    )
    rough = cached(folder, batch_size=3, precision="float16")
    assert loaded == ["float16"]
    found, expected = rough(captions), cached(folder)(captions)
    assert loaded == ["float16", "float32", "float32"]
    rough(captions)
    assert len(loaded) == 3
    assert all(np.isfinite(row["text.one"]).all() for row in found)
    np.testing.assert_allclose(found[1]["text.one"], expected[1]["text.one"], rtol=2e-3, atol=2e-3)
    assert not np.array_equal(found[0]["text.one"], expected[0]["text.one"])  # float16's own
