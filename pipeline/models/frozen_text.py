"""Frozen text towers: open_clip's pretrained text encoders, without their image half.

Only the text weights are read, from safetensors: nothing is unpickled, and ViT-bigG-14 needs no memory for pictures.
Legend: N captions, L tokens, D the tower's width, P the width of the space it shares with pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transformer import QuickGELU, TextTransformer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.config import TowerConfig
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.models.autoencoder import weights_hash
from pipeline.storage import fetch_folder, local_path, temporary_folder

_HUB = "hf-hub:"
_WEIGHTS = (HF_SAFE_WEIGHTS_NAME, "open_clip_pytorch_model.safetensors", "model.safetensors")
_PREFIXES = ("", "text.", "module.", "module.text.")  # of the text half's weights in what open_clip saves
_GEOMETRY = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
_NO_MATTER = (*_GEOMETRY, "output_tokens", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type")
_VOCABULARY = 49408  # of CLIP's byte-pair codes, the only ones that `Tokenizer` has
_SAFETENSORS = "give weights in safetensors (open_clip_model.safetensors): pickled ones could run any code"


@dataclass(frozen=True)
class _Source:
    """Where a tower comes from: open_clip's description of the model, and a local file with its weights."""

    description: dict[str, Any]
    weights: Path


class FrozenTower:
    """A pretrained text encoder on one device.

    Args:
        config: which tower, and which of its outputs.
        device: where it runs; None = the CPU.
        precision: `float32`, `bfloat16` or `float16`.

    Raises:
        ConfigError: open_clip has no such model or weights.
        DataError: the files cannot be used, are not of a causal transformer with CLIP's tokens, or have another hash.
        StorageError: an `s3://` prefix cannot be read.
    """

    def __init__(self, config: TowerConfig, device: torch.device | None = None, precision: str = "float32") -> None:
        with _find(config) as source:
            tower = _read(source, config)
        self.config = config
        self._hash = _hash(tower)
        if config.sha256 and config.sha256 != self._hash:
            raise DataError(
                f"text tower {config.name}: {config.model} has other weights than were asked for (sha256 {self._hash})",
                f"give the ones of sha256 {config.sha256}",
            )
        self._device = device or torch.device("cpu")
        self._tower = tower.to(device=self._device, dtype=getattr(torch, precision))
        self.context_length = int(tower.context_length)
        self.width = int(tower.width)
        self.pooled_width = int(tower.output_dim) if config.pooled else 0

    @property
    def transformer(self) -> TextTransformer:
        """open_clip's module."""
        return self._tower

    def weights_hash(self) -> str:
        """SHA-256 of the float32 weights, and of heads and activation, which they do not show; in every precision."""
        return self._hash

    @torch.no_grad()  # what it returns takes part in training, which inference_mode would forbid
    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the tower, in its precision and on its device.

        Args:
            tokens: ids int64 [N, L] on any device, with one end token or more each; L up to `context_length`.

        Returns:
            The hidden state [N, L, D] of the configured layer, with the final norm or without it, and the projected
            state of the first end token [N, P] where `pooled` is configured.
        """
        tower, tokens = self._tower, tokens.to(self._device)
        length = tokens.shape[1]
        hidden = tower.token_embedding(tokens) + tower.positional_embedding[:length]
        causal = torch.full((length, length), -torch.inf, device=self._device, dtype=hidden.dtype).triu(1)
        *earlier, last = tower.transformer.resblocks
        for block in earlier:
            hidden = block(hidden, attn_mask=causal)
        wanted = hidden
        if self.config.layer == "last" or self.config.pooled:
            hidden = last(hidden, attn_mask=causal)
        if self.config.layer == "last":
            wanted = hidden
        pooled = None
        if self.config.pooled:
            ends = hidden[torch.arange(len(tokens), device=self._device), tokens.argmax(dim=1)]
            pooled = tower.ln_final(ends) @ tower.text_projection
        return (tower.ln_final(wanted) if self.config.final_norm else wanted), pooled


@contextmanager
def _find(config: TowerConfig) -> Iterator[_Source]:
    """The tower's files, here for as long as the context lasts. Only names of the hub and tags are looked for there."""
    name = config.model
    is_folder = name.startswith((".", "/", "~")) or _is_there(name, Path.is_dir)
    if config.pretrained and (is_folder or "://" in name or name.startswith(_HUB)):
        raise ConfigError(f"text tower {config.name}: {name} has weights of its own", "leave pretrained out")
    if "://" in name:
        with temporary_folder("tower") as folder:
            yield _in_folder(fetch_folder(name, folder), config)
    elif is_folder:
        try:
            found = _in_folder(local_path(name), config)
        except OSError as error:
            said = f"text tower {config.name}: {name}: {error.strerror}"
            raise StorageError(said, "check the path and its permissions") from error
        yield found
    elif name.startswith(_HUB):
        hub_id = name.removeprefix(_HUB)
        description = _parse(_download(hub_id, HF_CONFIG_NAME, config), config)
        yield _Source(description, _download(hub_id, HF_SAFE_WEIGHTS_NAME, config))
    else:
        yield _by_architecture(config)


def _is_there(name: str, check: Callable[[Path], bool]) -> bool:
    try:
        return check(local_path(name))
    except (OSError, StorageError):  # no path can be meant
        return False


def _in_folder(folder: Path, config: TowerConfig) -> _Source:
    if not (folder / HF_CONFIG_NAME).is_file():
        raise DataError(
            f"text tower {config.name}: {config.model} has no {HF_CONFIG_NAME}",
            f"give a folder with {HF_CONFIG_NAME} and {HF_SAFE_WEIGHTS_NAME}, as open_clip saves models",
        )
    description = _parse(folder / HF_CONFIG_NAME, config)
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return _Source(description, folder / name)
    raise DataError(f"text tower {config.name}: {config.model} has no {HF_SAFE_WEIGHTS_NAME}", _SAFETENSORS)


def _by_architecture(config: TowerConfig) -> _Source:
    name, weights = config.model.replace("/", "-"), config.pretrained
    description = open_clip.get_model_config(name)
    if description is None:
        raise ConfigError(
            f"text tower {config.name}: neither a folder nor an architecture of open_clip is called {config.model}",
            "give a folder, hf-hub:OWNER/NAME, or an architecture such as ViT-L-14 (see open_clip.list_models())",
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not weights:
        raise ConfigError(
            f"text tower {config.name}: {config.model} is an architecture, and names no weights",
            f"set pretrained to a .safetensors file, or to a tag of open_clip: {', '.join(tags) or 'it has none'}",
        )
    if tag := open_clip.get_pretrained_cfg(name, weights):
        # The weights know their activation; the architecture of the same name may have the other one.
        return _Source({**description, "quick_gelu": tag.get("quick_gelu", False)}, _of_tag(tag, config))
    file = local_path(weights)
    if not _is_there(weights, Path.is_file):
        raise ConfigError(
            f"text tower {config.name}: pretrained={weights} is neither a file nor a tag of {config.model}",
            f"open_clip's tags for it: {', '.join(tags) or 'none'}",
        )
    return _Source(description, file)


def _of_tag(tag: dict[str, Any], config: TowerConfig) -> Path:
    hub_id, _, file = str(tag.get("hf_hub", "")).rpartition("/")
    if not hub_id:
        raise DataError(f"text tower {config.name}: {config.pretrained} comes as a pickled file only", _SAFETENSORS)
    return _download(hub_id, f"{file.rpartition('.')[0]}.safetensors" if file else HF_SAFE_WEIGHTS_NAME, config)


def _download(hub_id: str, file: str, config: TowerConfig) -> Path:
    try:
        return Path(download_pretrained_from_hf(hub_id, filename=file))
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"text tower {config.name}: {hub_id} cannot be fetched: {said}",
            f"check name and network; it must have {file}. Or download the model, and give its folder",
        ) from error


def _parse(file: Path, config: TowerConfig) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_bytes())
        description = tree.get("model_cfg", tree)
        if isinstance(description["text_cfg"], dict) and isinstance(description["embed_dim"], int):
            return dict(description)
        said = "text_cfg or embed_dim is of another kind"
    except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
        said = str(error)
    except KeyError as error:
        said = f"{error} is missing"
    raise DataError(
        f"text tower {config.name}: {HF_CONFIG_NAME} of {config.model} cannot be used: {said}",
        "give a model that open_clip saved",
    )


def _read(source: _Source, config: TowerConfig) -> TextTransformer:
    text = _checked_text(source.description, config)
    with torch.device("meta"):  # no memory, no random start: every weight is replaced
        tower = TextTransformer(
            **text,
            output_dim=source.description["embed_dim"],
            act_layer=QuickGELU if source.description.get("quick_gelu", False) else nn.GELU,
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    tower.load_state_dict(_read_weights(source.weights, shapes, config), assign=True)
    tower.attn_mask = None  # `encode` makes its own, of the captions' length
    return tower.eval().requires_grad_(False)


def _checked_text(description: dict[str, Any], config: TowerConfig) -> dict[str, Any]:
    """The transformer's geometry, where the rest of its description is CLIP's."""
    said = description["text_cfg"]
    defaults = {field.name: field.default for field in fields(open_clip.CLIPTextCfg) if field.default is not MISSING}
    odd = [name for name, value in said.items() if name not in _NO_MATTER and value != defaults.get(name)]
    if said.get("vocab_size", _VOCABULARY) != _VOCABULARY:
        odd.append("vocab_size")
    if odd or "multimodal_cfg" in description:
        raise DataError(
            f"text tower {config.name}: {config.model} is not CLIP's causal text transformer with CLIP's tokens"
            f" ({', '.join(odd) or 'multimodal_cfg'})",
            "use a CLIP model such as ViT-L-14, ViT-H-14 or ViT-bigG-14",
        )
    return {name: said.get(name, defaults[name]) for name in _GEOMETRY}


def _read_weights(file: Path, shapes: dict[str, tuple[int, ...]], config: TowerConfig) -> dict[str, Tensor]:
    """The named tensors alone, in float32."""
    if file.suffix != ".safetensors":
        raise DataError(f"text tower {config.name}: {file} is not safetensors", _SAFETENSORS)
    mismatch = f"check that the weights are of {config.model}, as open_clip saves them"
    try:
        with safe_open(file, framework="pt") as weights:
            there = set(weights.keys())
            prefix = next((p for p in _PREFIXES if f"{p}token_embedding.weight" in there), "")
            found = {}
            for name, shape in shapes.items():
                if prefix + name not in there:
                    raise DataError(f"text tower {config.name}: {file.name} has no {prefix}{name}", mismatch)
                found[name] = weights.get_tensor(prefix + name).float()
                if found[name].shape != shape:
                    raise DataError(
                        f"text tower {config.name}: {name} is {tuple(found[name].shape)} in {file.name}, not {shape}",
                        mismatch,
                    )
            return found
    except (SafetensorError, OSError) as error:
        raise DataError(f"text tower {config.name}: {file} cannot be read: {error}", "fetch it again") from error


def _hash(tower: TextTransformer) -> str:
    block = tower.transformer.resblocks[0]
    shape = f"heads {tower.heads} activation {type(block.mlp.gelu).__name__}\n"
    return hashlib.sha256((shape + weights_hash(tower)).encode()).hexdigest()
