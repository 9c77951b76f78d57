from __future__ import annotations

import open_clip
import pytest
import torch

from pipeline import runfile
from pipeline.config import TextConfig, TrainConfig, UNetConfig
from pipeline.errors import ConfigError
from pipeline.models import unet
from pipeline.models.text import TextTower
from pipeline.models.unet import TextToImage
from pipeline.train.telling import engine_configuration

TEXT = TextConfig(width=16, layers=1, heads=2, context_length=8)
UNET = UNetConfig(block_out_channels=(16, 32), attention_head_dim=2, norm_num_groups=8)


def model() -> TextToImage:
    torch.manual_seed(0)
    return TextToImage(unet.build(UNET, latent_channels=8, latent_side=4, text_width=16), TextTower(TEXT))


def test_velocity_has_the_latents_shape_and_every_parameter_takes_part() -> None:
    net = model()
    noisy, tokens = torch.randn(3, 8, 4, 4), torch.randint(0, 49408, (3, 8))
    velocity = net(noisy, torch.tensor([0.0, 500.5, 1000.0]), tokens)
    assert velocity.shape == noisy.shape
    velocity.square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_velocity_depends_on_noise_level_and_text() -> None:
    net = model().eval()
    noisy, tokens = torch.randn(1, 8, 4, 4), torch.randint(0, 49408, (1, 8))
    base = net(noisy, torch.tensor([500.0]), tokens)
    assert not torch.allclose(base, net(noisy, torch.tensor([500.5]), tokens), atol=1e-7)
    assert not torch.allclose(base, net(noisy, torch.tensor([500.0]), tokens.flip(1)), atol=1e-7)


def test_samples_of_a_batch_do_not_touch_each_other() -> None:
    net = model().eval()
    noisy, tokens, timestep = torch.randn(2, 8, 4, 4), torch.randint(0, 49408, (2, 8)), torch.tensor([100.0, 900.0])
    both = net(noisy, timestep, tokens)
    alone = net(noisy[1:], timestep[1:], tokens[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-4)


def test_sample_size_is_the_latents_side() -> None:
    assert model().unet.config.sample_size == 4


def test_bfloat16_weights_take_float32_latents() -> None:
    velocity = model().bfloat16()(torch.randn(1, 8, 4, 4), torch.tensor([500.0]), torch.zeros(1, 8, dtype=torch.int64))
    assert velocity.dtype == torch.bfloat16


PUBLISHED = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}
"""Parameters of the UNets of Stable Diffusion 1.5, 2.1 and XL."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_run_files_of_known_models_have_their_parameters_and_a_valid_engine(name: str) -> None:
    config = runfile.load(TrainConfig, f"configs/train/{name}.yaml", [])
    towers = [open_clip.get_model_config(tower.model) for tower in config.text.towers]
    width = sum(tower["text_cfg"]["width"] for tower in towers)
    pooled = sum(known["embed_dim"] for known, tower in zip(towers, config.text.towers, strict=True) if tower.pooled)
    with torch.device("meta"):
        net = unet.build(config.unet, 4, 64, width, pooled)
    assert sum(parameter.numel() for parameter in net.parameters()) == PUBLISHED[name]
    for ranks in (8, 64):
        whole = engine_configuration(config, ranks)
        micro, parts = whole["train_micro_batch_size_per_gpu"], whole["gradient_accumulation_steps"]
        assert micro * parts * ranks == whole["train_batch_size"] == config.global_batch
        assert whole["bf16"]["enabled"]
        assert "auto" not in str(whole)


def test_a_block_that_diffusers_does_not_have_is_told() -> None:
    config = UNET.model_copy(update={"down_block_types": ("CrossAttnDown", "CrossAttnDownBlock2D")})
    with pytest.raises(ConfigError, match="CrossAttnDown"):
        unet.build(config, latent_channels=8, latent_side=4, text_width=16)


@pytest.mark.parametrize("how", ["checkpoint_activations", "use_channels_last"])
def test_what_saves_memory_or_time_changes_no_gradient(how: str) -> None:
    plain, other = model(), model()
    getattr(other, how)()
    computed, formats = [], []
    last_block = other.unet.up_blocks[-1].resnets[-1]
    last_block.conv1.register_forward_hook(
        lambda _, inputs, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    other.text.transformer.transformer.resblocks[0].register_forward_pre_hook(lambda *_: computed.append("text"))
    last_block.register_forward_pre_hook(lambda *_: computed.append("unet"))
    noisy, tokens, timestep = torch.randn(2, 8, 4, 4), torch.randint(0, 49408, (2, 8)), torch.tensor([100.0, 900.0])
    for net in (plain, other):
        net(noisy, timestep, tokens).square().mean().backward()
    assert computed == (["text", "unet", "unet", "text"] if how == "checkpoint_activations" else ["text", "unet"])
    assert formats[0] == (how == "use_channels_last")
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
