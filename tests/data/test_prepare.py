"""What training does to a batch: posterior samples, scales, dropped captions, all keyed by place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latent_shards import text, write_latents
from support import fingerprint

from pipeline import randomness
from pipeline.data.batch import TowerText
from pipeline.data.manifest import Fingerprint, Tower, load_manifest
from pipeline.data.prepare import Preparation, Scale, read_empty
from pipeline.data.tar import npy_bytes
from pipeline.errors import DataError, StorageError
from pipeline.randomness import Purpose
from pipeline.storage import open_store

B, C, L = 64, 2, 4
MEAN, STD = (0.5, -2.0), (0.25, 3.0)
POSITIONS = torch.arange(B)
TOKENS = {"clip": TowerText(tokens=torch.full((1, L), -1))}
TOWERS = (
    Tower(name="clip_l", tokenizer="t", context_length=L, width=3),
    Tower(name="clip_g", tokenizer="t", context_length=L, width=5, pooled_width=2),
)


def scale(normalisation: Any = "whiten", **changes: float) -> Scale:
    return Scale(normalisation, MEAN, STD, **changes)


def moments(dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return randomness.normal(1, Purpose.NOISE, 0, POSITIONS, (2 * C, 2, 3)).to(dtype)


def cached(padding: str) -> Fingerprint:
    return fingerprint(4, L, text_mode="cached", text_padding=padding, text_towers=TOWERS)


def embeddings(seed: int = 2) -> dict[str, TowerText]:
    """A batch's captions in two towers, the second with a pooled vector."""
    states = {tower.name: torch.from_numpy(np.random.default_rng(seed).random((B, L, tower.width))) for tower in TOWERS}
    mask = torch.ones(B, L, dtype=torch.bool)
    return {
        "clip_l": TowerText(embeddings=states["clip_l"].half(), mask=mask),
        "clip_g": TowerText(embeddings=states["clip_g"].half(), pooled=torch.ones(B, 2).half(), mask=mask),
    }


def marked_empty() -> dict[str, TowerText]:
    """An empty prompt of two tokens that no caption is like."""
    mask = torch.arange(L)[None] < 2
    return {
        "clip_l": TowerText(embeddings=torch.full((1, L, 3), -1.0).half(), mask=mask),
        "clip_g": TowerText(embeddings=torch.full((1, L, 5), -1.0).half(), pooled=torch.zeros(1, 2).half(), mask=mask),
    }


def test_it_is_what_the_trainer_did_before_bit_for_bit() -> None:
    prepare, step, rate = Preparation(7, scale(), TOKENS, caption_dropout=0.3), 11, 0.3
    eps = randomness.normal(7, Purpose.POSTERIOR, step, POSITIONS, (C, 2, 3))
    mean, log_variance = moments().float().chunk(2, 1)
    z = mean + torch.exp(0.5 * log_variance) * eps
    expected = (z - torch.tensor(MEAN).reshape(1, -1, 1, 1)) / torch.tensor(STD).reshape(1, -1, 1, 1)
    assert torch.equal(prepare.latents(moments(), step, POSITIONS), expected)
    tokens = torch.arange(B * L).reshape(B, L)
    drop = randomness.uniform(7, Purpose.CAPTION_DROPOUT, step, POSITIONS, ()) < rate
    found = prepare.text({"clip": TowerText(tokens=tokens)}, step, POSITIONS)["clip"]
    assert torch.equal(found.tokens, torch.where(drop[:, None], -1, tokens))
    assert 0 < int(drop.sum()) < B


@pytest.mark.parametrize("world", [2, 8, 64])
def test_no_rank_changes_what_another_draws(world: int) -> None:
    prepare = Preparation(3, scale(), marked_empty(), caption_dropout=0.5, dropout_by_tower=True)
    whole = prepare.latents(moments(), 5, POSITIONS)
    text_whole = prepare.text(embeddings(), 5, POSITIONS)
    for places in POSITIONS.chunk(world):
        assert torch.equal(prepare.latents(moments()[places], 5, places), whole[places])
        part = {name: one.with_all(lambda tensor, rows=places: tensor[rows]) for name, one in embeddings().items()}
        for name, found in prepare.text(part, 5, places).items():
            assert torch.equal(found.embeddings, text_whole[name].embeddings[places])


def test_scales() -> None:
    def made(kind: Any, **changes: float) -> torch.Tensor:
        return Preparation(3, scale(kind, **changes), TOKENS, posterior="mean").latents(moments(), 0, POSITIONS)

    z = moments().float()[:, :C]
    assert torch.equal(made("none"), z)
    assert torch.equal(made("scaling_factor", scaling_factor=1.5305, shift_factor=0.0609), (z - 0.0609) * 1.5305)
    shift, spread = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (MEAN, STD))
    assert torch.equal(made("whiten"), (z - shift) / spread)
    assert made("whiten").dtype == torch.float32


def test_a_posterior_sample_is_new_at_every_step_and_seed() -> None:
    def drawn(seed: int, step: int) -> torch.Tensor:
        return Preparation(seed, scale("none"), TOKENS).latents(moments(), step, POSITIONS)

    assert torch.equal(drawn(1, 4), drawn(1, 4))
    assert not torch.isclose(drawn(1, 4), drawn(1, 5)).any()
    assert not torch.isclose(drawn(1, 4), drawn(2, 4)).any()


def test_captions_are_dropped_at_the_rate_that_was_asked_for() -> None:
    many = torch.arange(100_000)
    drop = Preparation(0, scale(), TOKENS, caption_dropout=0.1).dropped(3, many)["clip"]
    assert abs(float(drop.double().mean()) - 0.1) < 5 * (0.09 / 1e5) ** 0.5


def test_a_caption_is_dropped_for_all_towers_or_for_each_alone() -> None:
    many = torch.arange(100_000)
    whole = Preparation(0, scale(), marked_empty(), caption_dropout=0.5).dropped(3, many)
    assert torch.equal(whole["clip_l"], whole["clip_g"])
    apart = Preparation(0, scale(), marked_empty(), caption_dropout=0.5, dropout_by_tower=True).dropped(3, many)
    assert torch.equal(apart["clip_l"], whole["clip_l"])
    assert abs(float((apart["clip_l"] & apart["clip_g"]).double().mean()) - 0.25) < 0.01


def test_a_dropped_embedding_goes_with_its_pooled_vector_and_mask() -> None:
    prepare = Preparation(0, scale(), marked_empty(), caption_dropout=0.5)
    drop = prepare.dropped(9, POSITIONS)["clip_g"]
    found, given = prepare.text(embeddings(), 9, POSITIONS)["clip_g"], embeddings()["clip_g"]
    assert (found.embeddings[drop] == -1).all()
    assert (found.pooled[drop] == 0).all()
    assert (found.mask[drop].sum(1) == 2).all()
    for name in ("embeddings", "pooled", "mask"):
        assert torch.equal(getattr(found, name)[~drop], getattr(given, name)[~drop])
    assert found.embeddings.dtype == torch.float16
    assert found.tokens is None


def test_without_dropout_nothing_is_touched() -> None:
    given = embeddings()
    found = Preparation(0, scale(), marked_empty()).text(given, 0, POSITIONS)
    assert all(found[name] is given[name] for name in given)


def empty_of(folder: Path, mark: Fingerprint) -> dict[str, TowerText]:
    url = write_latents(folder, [(3, 0)], fingerprint=mark)
    return read_empty(open_store(str(folder)), load_manifest(url))


def test_the_empty_prompt_of_token_ids(tmp_path: Path) -> None:
    mark = fingerprint(4, L)
    found = empty_of(tmp_path, mark)["clip"]
    stored = text("the empty prompt", 0, mark)["tokens.clip"]
    assert found.tokens.tolist() == [stored.tolist()]
    assert found.tokens.dtype == torch.int64


@pytest.mark.parametrize("padding", ["full", "trimmed"])
def test_the_empty_prompt_of_embeddings(tmp_path: Path, padding: str) -> None:
    found, stored = empty_of(tmp_path, cached(padding)), text("the empty prompt", 0, cached(padding))
    for tower in TOWERS:
        one, states = found[tower.name], torch.from_numpy(stored[f"text.{tower.name}"])
        assert one.embeddings.shape == (1, L, tower.width)
        assert torch.equal(one.embeddings[0, : len(states)], states)
        assert not one.embeddings[0, len(states) :].any()
        assert (one.mask is None) == (padding == "full")
        assert padding == "full" or one.mask.tolist() == [[i < len(states) for i in range(L)]]
    assert found["clip_l"].pooled is None
    assert found["clip_g"].pooled.tolist() == [stored["pooled.clip_g"].tolist()]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (npy_bytes(np.zeros(L + 1, np.uint16)), r"is uint16 \[5\], the manifest says uint16 \[4\]"),
        (npy_bytes(np.zeros(L, np.int64)), r"is int64 \[4\], the manifest says uint16 \[4\]"),
        (b"not an array", "could not be read"),
    ],
)
def test_a_wrong_file_of_the_empty_prompt_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    url = write_latents(tmp_path, [(3, 0)])
    (tmp_path / "empty.tokens.clip.npy").write_bytes(content)
    with pytest.raises(DataError, match=rf"empty\.tokens\.clip\.npy.* {said}") as error:
        read_empty(open_store(str(tmp_path)), load_manifest(url))
    assert "lathe encode" in error.value.remedy


@pytest.mark.parametrize("tokens", [0, L + 1])
def test_a_trimmed_empty_prompt_has_one_token_at_least_and_no_more_than_fit(tmp_path: Path, tokens: int) -> None:
    url = write_latents(tmp_path, [(3, 0)], fingerprint=cached("trimmed"))
    (tmp_path / "empty.text.clip_l.npy").write_bytes(npy_bytes(np.zeros((tokens, 3), np.float16)))
    said = rf"is float16 \[{tokens}, 3\], the manifest says float16 \[4, 3\] or fewer tokens"
    with pytest.raises(DataError, match=said):
        read_empty(open_store(str(tmp_path)), load_manifest(url))


def test_a_missing_file_of_the_empty_prompt_is_named(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(3, 0)])
    (tmp_path / "empty.tokens.clip.npy").unlink()
    with pytest.raises(StorageError, match=r"empty\.tokens\.clip\.npy"):
        read_empty(open_store(str(tmp_path)), load_manifest(url))
