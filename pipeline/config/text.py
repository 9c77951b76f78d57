"""Captions: what is stored of them, and the towers that read them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.base import Count, Positive, Section


class TowerConfig(Section):
    """A frozen text encoder of open_clip, and which of its outputs the UNet is to see."""

    name: str = Field("clip", pattern="^[a-z0-9_]+$", description="its name in files and manifest: KEY.text0.NAME.npy")
    model: str = Field(
        description="open_clip architecture (ViT-L-14), hf-hub:OWNER/NAME, or a folder with open_clip_config.json and"
        " open_clip_model.safetensors"
    )
    pretrained: str = Field(
        "", description="weights of an architecture: a tag of open_clip, or a .safetensors file; a folder has its own"
    )
    layer: Literal["last", "penultimate"] = Field("last", description="SD 1.5: last; SD 2 and SDXL: penultimate")
    final_norm: bool = Field(True, description="apply the tower's final norm to that layer; SDXL does not")
    pooled: bool = Field(False, description="store the projected end-of-text vector too, as SDXL's second tower needs")
    pad: Literal["zero", "end"] = Field(
        "zero", description="token behind the caption: open_clip's 0, or end of text (SD 1.5, SDXL's first tower)"
    )
    sha256: str = Field(
        "",
        pattern="^([0-9a-f]{64})?$",
        description="hash that its weights must have, as manifests and checkpoints note it",
    )


class EncodeTextConfig(Section):
    """What is stored of captions: token ids (`joint`, `online`), or what frozen text towers make of them (`cached`)."""

    mode: Literal["joint", "online", "cached"] = Field(
        "joint", description="the tower is trained with the UNet, runs frozen while training, or runs now"
    )
    context_length: int = Field(77, ge=8, le=77, description="tokens a caption is padded or cut to")
    towers: tuple[TowerConfig, ...] = Field((), description="the frozen text encoders of online and cached")
    padding: Literal["full", "trimmed"] = Field(
        "full", description="cached: keep the whole context (stock pipelines need it), or the caption's own length"
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field("float32", description="in which cached towers run")

    @model_validator(mode="after")
    def _towers_fit_the_mode(self) -> EncodeTextConfig:
        _check_towers(self.mode, self.towers, needed=self.mode != "joint")
        if self.padding == "trimmed" and self.mode != "cached":
            raise ValueError(f"padding: trimmed is for mode=cached, not for {self.mode}")
        return self


class TextConfig(Section):
    """What the UNet knows of captions: by a tower trained with it, by frozen ones that run meanwhile, or ran before."""

    mode: Literal["joint", "online", "cached"] = Field(
        "joint", description="as the latents were encoded for: own tower, frozen towers running now, stored embeddings"
    )
    context_length: int = Field(77, ge=8, le=77, description="tokens a caption is padded or cut to")
    towers: tuple[TowerConfig, ...] = Field(
        (),
        description="as the latents' run file has them. online: the frozen towers; cached: only pictures need them, and"
        " they may be named then",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field("float32", description="in which online towers run")
    width: Count = Field(128, description="joint: of the tower")
    layers: Count = Field(2, description="joint")
    heads: Count = Field(4, description="joint")
    train_token_embedding: bool = Field(True, description="joint; off: the table of token codes keeps its random start")
    token_embedding_std: Positive = Field(
        0.02, description="joint: spread of that random start; positions get half of it"
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is not a multiple of heads={self.heads}")
        return self

    @model_validator(mode="after")
    def _settings_are_of_the_mode(self) -> TextConfig:
        _check_towers(self.mode, self.towers, needed=self.mode == "online")
        if self.mode != "joint":
            for name in ("width", "layers", "heads", "train_token_embedding", "token_embedding_std"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: mode={self.mode} trains no tower; leave {name} out")
        if self.mode != "online" and self.precision != "float32":
            raise ValueError(f"precision: mode={self.mode} runs no frozen towers; leave precision out")
        return self


def _check_towers(mode: str, towers: tuple[TowerConfig, ...], *, needed: bool) -> None:
    names = [tower.name for tower in towers]
    if mode == "joint" and names:
        raise ValueError("towers: joint trains its own tower; leave towers out, or set mode to cached or online")
    if needed and not names:
        raise ValueError(f"towers: mode={mode} needs at least one, for example [{{model: ViT-L-14, ...}}]")
    if len(set(names)) < len(names):
        raise ValueError("towers: two have the same name; give each its own")
