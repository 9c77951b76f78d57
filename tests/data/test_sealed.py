"""A manifest whose list of shards was changed by hand is refused by who relies on its content hash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latent_shards import write_latents

from pipeline.config import DataSetConfig
from pipeline.data import sealed
from pipeline.data.datasets import open_datasets
from pipeline.data.fold import content_hash
from pipeline.data.manifest import Manifest, canonical, parse_manifest
from pipeline.data.sealed import load_sealed_manifest
from pipeline.errors import DataError


def opened(url: str) -> Any:
    return open_datasets([DataSetConfig(manifest=url)], global_batch=4)


def drop(tree: dict[str, Any]) -> None:
    del tree["shards"][1]


def swap(tree: dict[str, Any]) -> None:
    tree["shards"][:2] = tree["shards"][1::-1]


def count(tree: dict[str, Any]) -> None:
    tree["shards"][2]["buckets"][0]["train"] -= 1


def repeat(tree: dict[str, Any]) -> None:
    tree["shards"].append(tree["shards"][0])


def other_hash(tree: dict[str, Any]) -> None:
    tree["content_hash"] = "0" * 64


@pytest.mark.parametrize("layout", [canonical, lambda tree: json.dumps(tree).encode()])
@pytest.mark.parametrize("change", [drop, swap, count, repeat, other_hash])
def test_it_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], layout: Callable[[Any], bytes]
) -> None:
    url = write_latents(tmp_path, [(4, 1), (5, 0), (6, 0)])
    tree = json.loads(Path(url).read_bytes())
    Path(url).write_bytes(layout(tree))
    assert opened(url).samples == 15
    change(tree)
    Path(url).write_bytes(layout(tree))
    with pytest.raises(DataError, match=r"manifest\.json was changed by hand: its list of shards") as told:
        opened(url)
    assert "lathe remove" in told.value.remedy


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_what_lathe_writes_is_recognised_without_looking_at_each_shard(
    tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_latents(tmp_path, [(3, 1)] * shards)
    manifest = parse_manifest(Path(url).read_bytes(), url)
    assert manifest.content_hash == content_hash(manifest.shards)
    assert Path(url).read_bytes() == manifest.to_bytes()
    monkeypatch.setattr(sealed, "content_hash", None)
    assert isinstance(load_sealed_manifest(url), Manifest)
