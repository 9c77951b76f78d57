"""Small real models for tests: autoencoders of the kinds that are in use, and open_clip models with their twins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

KINDS: dict[str, dict[str, Any]] = {
    "sd": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True},
    "sd3": {
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}
_BLOCK = {  # open_clip's names within a block -> transformers'
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def autoencoder(kind: str = "sd", **fields: Any) -> AutoencoderKL:
    """A random autoencoder that makes a picture 8 times smaller, with posteriors like a trained one's."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        **{"sample_size": 64, **KINDS[kind], **fields},
    )
    with torch.no_grad():
        last = model.quant_conv if model.quant_conv is not None else model.encoder.conv_out
        half = len(last.bias) // 2
        last.weight[:half] *= 8
        last.bias[half:] -= 12
    return model.eval()


def autoencoder_of_large_latents() -> AutoencoderKL:
    """A random autoencoder that is quick, and only halves a picture: its latents are 64 times as large as `sd`'s."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=16,
        mid_block_add_attention=False,
    )


def clip_description(**fields: Any) -> dict[str, Any]:
    """What open_clip_config.json says of a small CLIP."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}
    vision = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8}
    return {"embed_dim": 24, "quick_gelu": False, "vision_cfg": vision, "text_cfg": text, **fields}


def clip(seed: int = 0, **fields: Any) -> open_clip.CLIP:
    """A random CLIP, whose norms and biases are not at their neutral start."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**clip_description(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def save_clip(folder: Path, model: open_clip.CLIP, **fields: Any) -> str:
    """The folder that open_clip would save, without its pickled weights."""
    folder.mkdir(parents=True)
    description = {"model_cfg": clip_description(**fields), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return str(folder)


def transformers_twin(model: open_clip.CLIP, layers: int = 3) -> CLIPTextModelWithProjection:
    """The first `layers` of the text half as transformers has it in pipelines."""
    width, gelu = model.transformer.width, type(model.transformer.resblocks[0].mlp.gelu).__name__
    twin = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=model.text_projection.shape[1],
            num_hidden_layers=layers,
            num_attention_heads=model.transformer.resblocks[0].attn.num_heads,
            max_position_embeddings=77,
            hidden_act={"GELU": "gelu", "QuickGELU": "quick_gelu"}[gelu],
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )
    weights: dict[str, Tensor] = {
        "text_projection.weight": model.text_projection.T,
        "text_model.embeddings.token_embedding.weight": model.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": model.positional_embedding,
        "text_model.final_layer_norm.weight": model.ln_final.weight,
        "text_model.final_layer_norm.bias": model.ln_final.bias,
    }
    for number, block in enumerate(model.transformer.resblocks[:layers]):
        here = f"text_model.encoder.layers.{number}"
        for part in ("weight", "bias"):
            for letter, third in zip("qkv", getattr(block.attn, f"in_proj_{part}").chunk(3), strict=True):
                weights[f"{here}.self_attn.{letter}_proj.{part}"] = third
            for ours, theirs in _BLOCK.items():
                weights[f"{here}.{theirs}.{part}"] = getattr(block.get_submodule(ours), part)
    twin.load_state_dict({name: tensor.detach() for name, tensor in weights.items()}, strict=True)
    return twin.eval()
