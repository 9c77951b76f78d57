"""Text towers and their tokenizers as transformers' CLIP models, whose outputs are the towers'."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip.transformer import QuickGELU, TextTransformer
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipeline.errors import ConfigError
from pipeline.models.conditioning import FrozenTowers, TokenIds
from pipeline.models.text import PAD, Tokenizer
from pipeline.models.unet import TextToImage

_BLOCK = {  # open_clip's names within a block -> transformers'
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}


@dataclass(frozen=True)
class TextParts:
    """Text encoders and tokenizers of a stock pipeline, by their names there, and our own tokenizers."""

    encoders: Mapping[str, CLIPTextModel | CLIPTextModelWithProjection]
    tokenizers: Mapping[str, CLIPTokenizer]
    own: Mapping[str, Tokenizer]

    @property
    def is_xl(self) -> bool:
        """Whether they are those of StableDiffusionXLPipeline."""
        return len(self.encoders) > 1

    def rewrite_for_older_transformers(self, folder: Path) -> None:
        """Weights and vocabulary under the names that transformers 4 knows; transformers 5 reads them as well."""
        for name, encoder in self.encoders.items():
            prefix = "" if isinstance(encoder, CLIPTextModelWithProjection) else "text_model."
            weights = {f"{prefix}{key}": tensor.contiguous() for key, tensor in encoder.state_dict().items()}
            save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
        for name, tokenizer in self.own.items():
            vocabulary = json.dumps(_vocabulary(tokenizer), ensure_ascii=False)
            (folder / name / "vocab.json").write_text(vocabulary, encoding="utf-8")
            merges = "".join(f"{first} {second}\n" for first, second in _merges(tokenizer))
            (folder / name / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")


def text_parts(model: TextToImage, prompts: TokenIds | FrozenTowers) -> TextParts:
    """The text side of a trained model in stock parts.

    Raises:
        ConfigError: no stock pipeline reads these towers in this way.
    """
    if isinstance(prompts, TokenIds):
        assert model.text is not None  # noqa: S101  (load_trained saw to it)
        encoder = clip_text_model(model.text.transformer, prompts.tokenizer)
        return _parts([(encoder, prompts.tokenizer)])
    _check_stock(model, prompts)
    found = []
    for tokenizer, tower in prompts.towers.values():
        skipped = int(tower.config.layer == "penultimate" and tower.config.final_norm)
        encoder = clip_text_model(
            tower.transformer, tokenizer, without_last=skipped, projected=tower.config.pooled and model.sees_sizes
        )
        found.append((encoder, tokenizer))
    return _parts(found)


def _parts(found: list[tuple[CLIPTextModel | CLIPTextModelWithProjection, Tokenizer]]) -> TextParts:
    numbered = [("" if number == 1 else f"_{number}", *pair) for number, pair in enumerate(found, 1)]
    return TextParts(
        encoders={f"text_encoder{suffix}": encoder for suffix, encoder, _ in numbered},
        tokenizers={f"tokenizer{suffix}": clip_tokenizer(own) for suffix, _, own in numbered},
        own={f"tokenizer{suffix}": own for suffix, _, own in numbered},
    )


def _check_stock(model: TextToImage, prompts: FrozenTowers) -> None:
    read = [(t.config.layer, t.config.final_norm, t.config.pooled) for _, t in prompts.towers.values()]
    if model.sees_sizes:
        if read != [("penultimate", False, False), ("penultimate", False, True)]:
            raise ConfigError(
                "text.towers: StableDiffusionXLPipeline reads the penultimate layers of two towers without the final"
                " norm, and the pooled vector of the second, and this run has others",
                "train with towers as in configs/train/sdxl.yaml, or sample with `lathe sample`",
            )
    elif len(read) != 1 or not read[0][1]:
        raise ConfigError(
            "text.towers: StableDiffusionPipeline reads one tower behind its final norm, and this run has others",
            "train with a tower as in configs/train/sd15.yaml or sd21.yaml, or sample with `lathe sample`",
        )


def clip_text_model(
    inner: TextTransformer, tokenizer: Tokenizer, *, without_last: int = 0, projected: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text tower as transformers' CLIPTextModel, whose last hidden state is the tower's behind the final norm.

    Args:
        inner: the tower.
        tokenizer: its own.
        without_last: so many of the last layers are left out, as SD 2 has it.
        projected: with the projection that makes the pooled vector.
    """
    blocks = inner.transformer.resblocks[: len(inner.transformer.resblocks) - without_last]
    mlp = inner.transformer.resblocks[0].mlp
    clip = (CLIPTextModelWithProjection if projected else CLIPTextModel)(
        CLIPTextConfig(
            vocab_size=inner.vocab_size,
            hidden_size=inner.width,
            intermediate_size=mlp.c_fc.out_features,
            projection_dim=inner.output_dim if projected else inner.width,
            num_hidden_layers=len(blocks),
            num_attention_heads=inner.heads,
            max_position_embeddings=inner.context_length,
            hidden_act="quick_gelu" if isinstance(mlp.gelu, QuickGELU) else "gelu",
            layer_norm_eps=inner.ln_final.eps,
            pad_token_id=tokenizer.pad_id,
            bos_token_id=inner.vocab_size - 2,
            eos_token_id=inner.vocab_size - 1,
        )
    )
    weights: dict[str, Any] = {
        "embeddings.token_embedding.weight": inner.token_embedding.weight,
        "embeddings.position_embedding.weight": inner.positional_embedding,
        "final_layer_norm.weight": inner.ln_final.weight,
        "final_layer_norm.bias": inner.ln_final.bias,
    }
    for number, block in enumerate(blocks):
        here = f"encoder.layers.{number}"
        for part in ("weight", "bias"):
            thirds = getattr(block.attn, f"in_proj_{part}").chunk(3)
            for letter, third in zip("qkv", thirds, strict=True):
                weights[f"{here}.self_attn.{letter}_proj.{part}"] = third
            for ours, theirs in _BLOCK.items():
                weights[f"{here}.{theirs}.{part}"] = getattr(block.get_submodule(ours), part)
    if projected:
        weights = {f"text_model.{name}": tensor for name, tensor in weights.items()}
        weights["text_projection.weight"] = inner.text_projection.T
    clip.load_state_dict(
        {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}, strict=True
    )
    return clip.eval()


def clip_tokenizer(tokenizer: Tokenizer) -> CLIPTokenizer:
    """The tokenizer as transformers' CLIPTokenizer, with the same ids for any prompt.

    The pad token is `!` where its id, 0, is what open_clip pads with. `split_special_tokens` keeps a `!` that is
    written in a prompt from being read as padding.
    """
    return CLIPTokenizer(
        vocab=_vocabulary(tokenizer),
        merges=_merges(tokenizer),
        pad_token="!" if tokenizer.pad_id == PAD else _SPECIAL["<end_of_text>"],
        model_max_length=tokenizer.context_length,
        split_special_tokens=True,
    )


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return {_SPECIAL.get(token, token): number for token, number in tokenizer.codes.encoder.items()}


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return sorted(tokenizer.codes.bpe_ranks, key=tokenizer.codes.bpe_ranks.__getitem__)
