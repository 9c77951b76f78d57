"""A UNet of diffusers to start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from pipeline.config import UNetConfig
from pipeline.errors import ConfigError, DataError
from pipeline.models import pretrained_unet, unet
from pipeline.storage import open_store

GEOMETRY: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 + 6 * 4,
    "cross_attention_dim": 12,
    "sample_size": 16,
}


def save(folder: Path, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    model = UNet2DConditionModel(**{**GEOMETRY, **changes})
    model.save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> str:
    save(tmp_path / "pipeline" / "unet")
    return str(tmp_path / "pipeline")


def test_geometry_and_weights_are_the_folders(folder: str) -> None:
    config = pretrained_unet.with_geometry(UNetConfig(pretrained=folder))
    assert config.block_out_channels == (8, 16)
    assert config.by_level("transformer_layers_per_block") == (1, 2)
    assert config.addition_time_embed_dim == 4
    assert pretrained_unet.with_geometry(config) == config
    new = unet.build(config, 4, 16, 12, 6)
    pretrained_unet.check(folder, new)
    pretrained_unet.load_into(new, folder)
    theirs = UNet2DConditionModel.from_pretrained(f"{folder}/unet").state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in new.state_dict().items())
    assert new.state_dict().keys() == theirs.keys()


def test_null_is_off_as_in_sdxls_own_config(tmp_path: Path, folder: str) -> None:
    told = json.loads((Path(folder) / "unet" / "config.json").read_text())
    off = {"upcast_attention": None, "mid_block_only_cross_attention": None, "cross_attention_norm": None}
    (tmp_path / "config.json").write_text(json.dumps({**told, **off}))
    config = pretrained_unet.with_geometry(UNetConfig(pretrained=str(tmp_path)))
    assert config.upcast_attention is False
    pretrained_unet.check(str(tmp_path), unet.build(config, 4, 16, 12, 6))


def test_weights_in_several_files_behind_an_address(tmp_path: Path, folder: str) -> None:
    shards = tmp_path / "shards"
    UNet2DConditionModel.from_pretrained(f"{folder}/unet").save_pretrained(shards, max_shard_size="50KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    one, several = (
        unet.build(pretrained_unet.with_geometry(UNetConfig(pretrained=folder)), 4, 16, 12, 6) for _ in "12"
    )
    pretrained_unet.load_into(one, folder)
    pretrained_unet.load_into(several, str(shards))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), several.parameters(), strict=True))


@pytest.mark.s3
def test_from_s3(s3_url: str, tmp_path: Path, folder: str) -> None:
    store = open_store(s3_url)
    for file in (Path(folder) / "unet").iterdir():
        store.upload(file, f"unet/{file.name}")
    config = pretrained_unet.with_geometry(UNetConfig(pretrained=s3_url))
    pretrained_unet.load_into(unet.build(config, 4, 16, 12, 6), s3_url)


def test_a_run_file_may_say_the_same_once_for_all_levels(tmp_path: Path) -> None:
    three = {"block_out_channels": (8, 8, 16), "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2}
    three |= {"up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), "attention_head_dim": 2}
    save(tmp_path, **three, transformer_layers_per_block=2, layers_per_block=2)
    config = UNetConfig(pretrained=str(tmp_path), attention_head_dim=2, layers_per_block=2)
    assert pretrained_unet.with_geometry(config).levels == 3


def test_a_run_file_that_says_otherwise_is_refused(folder: str) -> None:
    wrong = UNetConfig(pretrained=folder, attention_head_dim=8, block_out_channels=(64, 64))
    with pytest.raises(ConfigError, match=r"^unet\.attention_head_dim: \(8,\), but unet\.pretrained=.* has \(2, 4\)\n"):
        pretrained_unet.with_geometry(wrong)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type=timestep"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type=fourier"),
        ({"conv_in_kernel": 1}, "conv_in_kernel=1"),
    ],
)
def test_what_is_not_trained_here_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    save(tmp_path, **changes)
    with pytest.raises(ConfigError, match=rf"^unet\.pretrained: .* has {said}, which Lathe does not train\n"):
        pretrained_unet.with_geometry(UNetConfig(pretrained=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("layers_per_block", "two", "config.json of FOLDER has layers_per_block=two, which Lathe does not train"),
        ("norm_num_groups", -4, "config.json of FOLDER has norm_num_groups=-4, which Lathe does not train"),
        ("layers_per_block", [1, 2, 3], "config.json of FOLDER: layers_per_block: 3 values for 2 levels;"),
    ],
)
def test_a_wrong_value_of_its_config_is_told_by_file_and_field(tmp_path, folder, name, value, said) -> None:
    told = json.loads((Path(folder) / "unet" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, name: value}))
    with pytest.raises(ConfigError) as error:
        pretrained_unet.with_geometry(UNetConfig(pretrained=str(tmp_path)))
    assert error.value.message.startswith(f"unet.pretrained: {said}".replace("FOLDER", str(tmp_path)))
    assert error.value.remedy == "give a UNet of the geometry of SD 1.5, SD 2, SDXL, or one like them"


@pytest.mark.parametrize(
    ("built", "said"),
    [
        ((16, 16, 12, 6), r"4 latent channels \(in_channels\), and the latents have 16\n"),
        ((4, 16, 20, 6), r"12 numbers for each token \(cross_attention_dim\), and the captions have 20\n"),
        ((4, 16, 12, 8), r"30 numbers of pooled text and sizes \(\w+\), and the samples have 32\n"),
    ],
)
def test_latents_and_captions_that_do_not_fit_are_told(folder: str, built: tuple[int, ...], said: str) -> None:
    config = pretrained_unet.with_geometry(UNetConfig(pretrained=folder))
    with pytest.raises(ConfigError, match=rf"^unet\.pretrained: .* takes {said}") as error:
        pretrained_unet.check(folder, unet.build(config, *built))
    assert "\n" not in error.value.message
    assert error.value.remedy


def test_folders_that_hold_no_unet(tmp_path: Path, folder: str) -> None:
    with pytest.raises(DataError, match=r"no such folder"):
        pretrained_unet.with_geometry(UNetConfig(pretrained=str(tmp_path / "nothing")))
    with pytest.raises(DataError, match=r"has no config\.json, nor unet/config\.json"):
        pretrained_unet.with_geometry(UNetConfig(pretrained=str(tmp_path)))
    file = Path(folder) / "unet" / "config.json"
    file.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(DataError, match=r"config\.json is not that of UNet2DConditionModel"):
        pretrained_unet.with_geometry(UNetConfig(pretrained=folder))
    file.write_text("{")
    with pytest.raises(DataError, match=r"config\.json cannot be read"):
        pretrained_unet.with_geometry(UNetConfig(pretrained=folder))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = save(tmp_path)
    with torch.no_grad():
        model.conv_in.bias[0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"unet\.pretrained: weights of .* are not finite: conv_in\.bias"):
        pretrained_unet.load_into(model, str(tmp_path))
