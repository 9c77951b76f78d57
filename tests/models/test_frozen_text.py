"""Frozen towers against transformers' models of the same weights, by the conventions of diffusers' pipelines."""

from __future__ import annotations

import json
import pickle
import socket
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import clip, clip_description, save_clip, transformers_twin

from pipeline.config import TowerConfig
from pipeline.errors import ConfigError, DataError
from pipeline.models import frozen_text
from pipeline.models.frozen_text import FrozenTower
from pipeline.models.text import Tokenizer

CAPTIONS = ["", "a cat", "two dogs, one of them asleep!", "word " * 100]


class UnpickledError(Exception):
    pass


class Bomb:
    def __reduce__(self):
        return UnpickledError, ()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A CLIP with OpenAI's activation, and its folder."""
    model = clip(quick_gelu=True)
    return model, save_clip(tmp_path_factory.mktemp("quick") / "clip", model, quick_gelu=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A CLIP with OpenCLIP's activation, and its folder."""
    model = clip(seed=1)
    return model, save_clip(tmp_path_factory.mktemp("plain") / "clip", model)


def tokens(pad: str, length: int = 77) -> torch.Tensor:
    return torch.from_numpy(Tokenizer(length, pad)(CAPTIONS).astype(np.int64))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def copy_folder(folder: str, to: Path, **changes: object) -> Path:
    """A folder with another description."""
    to.mkdir()
    (to / "open_clip_model.safetensors").write_bytes((Path(folder) / "open_clip_model.safetensors").read_bytes())
    (to / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**clip_description(), **changes}}))
    return to


@torch.no_grad()
def test_sd15_takes_the_last_layer_with_its_norm(quick):
    model, folder = quick
    ids = tokens("end")
    hidden, pooled = FrozenTower(TowerConfig(model=folder, pad="end")).encode(ids)
    close(hidden, transformers_twin(model).text_model(ids).last_hidden_state)
    assert pooled is None


@torch.no_grad()
def test_sd2_is_a_tower_without_its_last_layer(plain):
    model, folder = plain
    ids = tokens("zero")
    hidden, _ = FrozenTower(TowerConfig(model=folder, layer="penultimate")).encode(ids)
    close(hidden, transformers_twin(model, layers=2).text_model(ids).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("pad", ["zero", "end"])
def test_sdxl_takes_the_layer_before_the_last_without_norm_and_the_second_towers_projection(quick, plain, pad):
    for model, folder in (quick, plain):
        ids = tokens(pad)
        config = TowerConfig(model=folder, layer="penultimate", final_norm=False, pooled=True)
        hidden, pooled = FrozenTower(config).encode(ids)
        expected = transformers_twin(model)(ids, output_hidden_states=True)
        close(hidden, expected.hidden_states[-2])
        close(pooled, expected.text_embeds)


@torch.no_grad()
def test_open_clip_pools_the_same(plain):
    model, folder = plain
    tower = FrozenTower(TowerConfig(model=folder, pooled=True))
    ids = tokens("zero")
    close(tower.encode(ids)[1], model.encode_text(ids))
    assert (tower.context_length, tower.width, tower.pooled_width) == (77, 32, 24)
    assert FrozenTower(TowerConfig(model=folder)).pooled_width == 0


@torch.no_grad()
def test_a_shorter_context_gives_the_beginning_of_the_whole(plain):
    tower = FrozenTower(TowerConfig(model=plain[1], layer="last", final_norm=False))
    short, whole = tower.encode(tokens("zero", 12)[:2])[0], tower.encode(tokens("zero")[:2])[0]
    close(short, whole[:, :12])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precision_changes_last_places_and_not_the_hash(plain, precision):
    exact, rough = (FrozenTower(TowerConfig(model=plain[1]), None, kind) for kind in ("float32", precision))
    hidden = rough.encode(tokens("zero"))[0]
    assert hidden.dtype == getattr(torch, precision)
    torch.testing.assert_close(hidden.float(), exact.encode(tokens("zero"))[0], rtol=0.05, atol=0.05)
    assert rough.weights_hash() == exact.weights_hash()


def test_hash_is_of_weights_heads_and_activation(plain, quick, tmp_path):
    folder = plain[1]
    text = clip_description()["text_cfg"]
    others = [
        quick[1],
        copy_folder(folder, tmp_path / "gelu", quick_gelu=True),
        copy_folder(folder, tmp_path / "heads", text_cfg={**text, "heads": 2}),
    ]
    hashes = [FrozenTower(TowerConfig(model=str(model))).weights_hash() for model in (folder, *others)]
    assert len(set(hashes)) == 4
    same = copy_folder(folder, tmp_path / "same")
    assert FrozenTower(TowerConfig(model=str(same))).weights_hash() == hashes[0]


def test_what_open_clip_calls_a_custom_text_model_is_read_too(plain, tmp_path):
    folder = plain[1]
    other = copy_folder(folder, tmp_path / "custom", custom_text=True)
    weights = load_file(other / "open_clip_model.safetensors")
    text = {"positional_embedding", "text_projection", "token_embedding.weight"}
    save_file(
        {
            f"text.{name}" if name in text or name.startswith(("transformer.", "ln_final.")) else name: tensor.half()
            for name, tensor in weights.items()
        },
        other / "open_clip_model.safetensors",
    )
    hidden, expected = (FrozenTower(TowerConfig(model=str(f))).encode(tokens("zero"))[0] for f in (other, folder))
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, expected, rtol=0.01, atol=0.01)


def test_a_description_without_preprocessing_is_read(plain, tmp_path):
    folder = copy_folder(plain[1], tmp_path / "bare")
    (folder / "open_clip_config.json").write_text(json.dumps(clip_description()))
    assert FrozenTower(TowerConfig(model=str(folder))).weights_hash() == (
        FrozenTower(TowerConfig(model=plain[1])).weights_hash()
    )


def test_an_architecture_takes_weights_from_a_file(plain, monkeypatch):
    folder = plain[1]
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: clip_description() if name == "small" else None)
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: [])
    config = TowerConfig(model="small", pretrained=f"{folder}/open_clip_model.safetensors")
    assert FrozenTower(config).weights_hash() == FrozenTower(TowerConfig(model=folder)).weights_hash()


def test_a_tag_brings_its_activation_and_is_fetched_as_safetensors(plain, quick, monkeypatch):
    """open_clip only warns where ViT-L-14 meets OpenAI's weights, which are of ViT-L-14-quickgelu."""
    fetched = []

    def download(hub_id, filename):
        fetched.append((hub_id, filename))
        return f"{quick[1]}/open_clip_model.safetensors"

    monkeypatch.setattr(frozen_text, "download_pretrained_from_hf", download)
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: clip_description())
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["openai"])
    monkeypatch.setattr(
        open_clip, "get_pretrained_cfg", lambda name, tag: {"hf_hub": "timm/small.openai/", "quick_gelu": True}
    )
    tower = FrozenTower(TowerConfig(model="ViT-L-14", pretrained="openai"))
    assert fetched == [("timm/small.openai", "open_clip_model.safetensors")]
    assert tower.weights_hash() == FrozenTower(TowerConfig(model=quick[1])).weights_hash()


def test_a_hub_model_is_fetched_as_safetensors(plain, monkeypatch):
    monkeypatch.setattr(frozen_text, "download_pretrained_from_hf", lambda hub_id, filename: f"{plain[1]}/{filename}")
    tower = FrozenTower(TowerConfig(model="hf-hub:someone/clip"))
    assert tower.weights_hash() == FrozenTower(TowerConfig(model=plain[1])).weights_hash()


def test_the_hubs_failure_is_told(monkeypatch):
    def fail(hub_id, filename):
        raise FileNotFoundError(f"Failed to download file ({filename}) for {hub_id}.\nmore")

    monkeypatch.setattr(frozen_text, "download_pretrained_from_hf", fail)
    with pytest.raises(DataError, match="someone/clip cannot be fetched: Failed to download"):
        FrozenTower(TowerConfig(model="hf-hub:someone/clip"))


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.pt"])
def test_a_folder_with_pickled_weights_alone_is_refused_unread(plain, tmp_path, name):
    folder = copy_folder(plain[1], tmp_path / "pickled")
    (folder / "open_clip_model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match=r"has no open_clip_model\.safetensors") as caught:
        FrozenTower(TowerConfig(model=str(folder)))
    assert "safetensors" in caught.value.remedy


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.npz"])
def test_a_pickled_file_is_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="is not safetensors") as caught:
        FrozenTower(TowerConfig(model="ViT-B-32", pretrained=str(tmp_path / name)))
    assert "pickled" in caught.value.remedy


def test_a_tag_that_is_a_pickled_file_is_refused(monkeypatch):
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"url": "https://example.org/weights.pt"})
    with pytest.raises(DataError, match="old comes as a pickled file only"):
        FrozenTower(TowerConfig(model="ViT-B-32", pretrained="old"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"no_causal_mask": True}, "no_causal_mask"),  # SigLIP
        ({"pool_type": "last"}, "pool_type"),
        ({"embed_cls": True}, "embed_cls"),  # CoCa
        ({"hf_model_name": "roberta-base"}, "hf_model_name"),
        ({"hf_tokenizer_name": "bert-base-uncased"}, "hf_tokenizer_name"),
        ({"vocab_size": 32000}, "vocab_size"),
        ({"a_new_trick": 1}, "a_new_trick"),
    ],
)
def test_a_tower_of_another_kind_is_refused_by_name(plain, tmp_path, changes, named):
    folder = copy_folder(plain[1], tmp_path / "odd", text_cfg={**clip_description()["text_cfg"], **changes})
    with pytest.raises(DataError, match=rf"not CLIP's causal text transformer.*\({named}\)"):
        FrozenTower(TowerConfig(model=str(folder)))


def test_weights_of_another_model_are_told(plain, tmp_path):
    deeper = {**clip_description()["text_cfg"], "layers": 4}
    with pytest.raises(DataError, match=r"has no transformer\.resblocks\.3\."):
        FrozenTower(TowerConfig(model=str(copy_folder(plain[1], tmp_path / "deeper", text_cfg=deeper))))
    wider = {**clip_description()["text_cfg"], "width": 64}
    with pytest.raises(DataError, match=r"is \(77, 32\) in open_clip_model.safetensors, not \(77, 64\)"):
        FrozenTower(TowerConfig(model=str(copy_folder(plain[1], tmp_path / "wider", text_cfg=wider))))


def test_damaged_files_are_told(plain, tmp_path):
    folder = copy_folder(plain[1], tmp_path / "damaged")
    (folder / "open_clip_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not safetensors")
    with pytest.raises(DataError, match="cannot be read"):
        FrozenTower(TowerConfig(model=str(folder)))
    for content in (b"\xff", b"[]", b"{}", b'{"text_cfg": 1, "embed_dim": 2}'):
        (folder / "open_clip_config.json").write_bytes(content)
        with pytest.raises(DataError, match=r"open_clip_config\.json of .* cannot be used"):
            FrozenTower(TowerConfig(model=str(folder)))
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(DataError, match=r"has no open_clip_config\.json"):
        FrozenTower(TowerConfig(model=str(folder)))


def test_names_that_are_nothing_are_told(plain, tmp_path):
    with pytest.raises(ConfigError, match="neither a folder nor an architecture of open_clip is called ViT-X"):
        FrozenTower(TowerConfig(model="ViT-X"))
    with pytest.raises(ConfigError, match="names no weights") as caught:
        FrozenTower(TowerConfig(model="ViT-L-14"))
    assert "openai" in caught.value.remedy
    with pytest.raises(ConfigError, match="neither a file nor a tag of ViT-L-14"):
        FrozenTower(TowerConfig(model="ViT-L-14", pretrained="opnai"))
    with pytest.raises(DataError, match=r"has no open_clip_config\.json"):
        FrozenTower(TowerConfig(model=str(tmp_path / "nowhere")))
    for place in (plain[1], "hf-hub:someone/clip", "s3://bucket/clip"):
        with pytest.raises(ConfigError, match="has weights of its own"):
            FrozenTower(TowerConfig(model=place, pretrained="openai"))


def test_pooling_needs_a_projection(plain, tmp_path):
    folder = copy_folder(plain[1], tmp_path / "bare", text_cfg={**clip_description()["text_cfg"], "proj_type": "none"})
    with pytest.raises(DataError, match="proj_type"):
        FrozenTower(TowerConfig(model=str(folder), pooled=True))
