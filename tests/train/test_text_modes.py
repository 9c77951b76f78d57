"""The same pictures and captions under every text mode, by a small model like SDXL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from loader_runs import data, load
from small_models import clip, save_clip
from text_modes import LENGTH, TEXTS, encode_all, run_file
from training_run import Run, copy_of, finish

from pipeline.config import ExportConfig, SampleConfig
from pipeline.data import images
from pipeline.data.prepare import Scale
from pipeline.errors import ConfigError, DataError
from pipeline.export.job import export
from pipeline.models import unet
from pipeline.sample import sample
from pipeline.train.compatibility import check_data
from pipeline.train.examples import Example, Examples
from pipeline.train.network import build_network
from pipeline.train.towers import load_towers, towers_of_run, with_hashes

pytestmark = pytest.mark.ranks  # most of them start none, but share what is encoded here with one that does


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("text-modes")


@pytest.fixture(scope="module")
def manifests(place) -> dict[str, str]:
    return encode_all(place)


@pytest.fixture(scope="module")
def seen(place, manifests) -> dict[str, tuple[list[Example], list[list[str]], torch.nn.Module]]:
    """Four steps of each: what the network sees, the samples' keys, and a network of one seed."""
    return {name: examples(place, name, manifests[name]) for name in TEXTS}


def examples(place, name: str, manifest: str, **changes: Any):
    config, datasets = run_file(place, name, manifest, **changes), data(manifest)
    check_data(config, datasets.manifests[0])
    frozen = load_towers(config.text.towers, datasets.manifests[0]) if config.text.mode == "online" else None
    scale = Scale("whiten", datasets.mean, datasets.std)
    made = Examples(config, datasets, scale, torch.device("cpu"), frozen)
    torch.manual_seed(0)
    network = build_network(config, datasets.manifests[0], frozen)
    batches = load(manifest, 4)
    return [made.of(batch, 1.0) for batch in batches], [batch.keys for batch in batches], network


def test_online_and_cached_captions_give_the_same_losses(seen):
    (online, keys, network), (cached, same_keys, same_network) = seen["online"], seen["cached"]
    assert keys == same_keys
    assert len({example.noisy.shape for example in online}) > 1
    for now, before in zip(online, cached, strict=True):
        losses = [
            float((net(*e.inputs) - e.target).square().mean().detach())
            for net, e in ((network, now), (same_network, before))
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        torch.testing.assert_close(now.text, before.text.float(), atol=2e-3, rtol=1e-3)
        assert now.text.shape == (8, LENGTH, 32 + 48)
        assert now.pooled.shape == (8, 24)


def test_trimmed_captions_are_the_whole_ones_behind_a_mask(seen):
    (whole, keys, network), (trimmed, same_keys, _) = seen["cached"], seen["trimmed"]
    assert keys == same_keys
    for full, short in zip(whole, trimmed, strict=True):
        assert full.mask is None
        assert not short.mask.all()
        assert not short.text[~short.mask].any()
        expected = network(*full._replace(mask=short.mask).inputs)
        torch.testing.assert_close(network(*short.inputs), expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(network(*full.inputs), expected, atol=1e-5)


def test_sizes_are_those_of_the_pictures_and_every_parameter_learns(seen):
    (first, *_), _, network = seen["cached"]
    height, width = (8 * side // 2 for side in first.noisy.shape[2:])  # the autoencoder makes a picture 4 times smaller
    assert first.time_ids[:, 4:].tolist() == [[height, width]] * 8
    network(*first.inputs).square().mean().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    shifted = first._replace(time_ids=first.time_ids + 8)
    assert not torch.allclose(network(*first.inputs), network(*shifted.inputs), atol=1e-5)


@pytest.mark.parametrize("name", TEXTS)
def test_dropped_captions_are_the_empty_prompt_as_the_towers_read_it(place, manifests, name):
    some, *_ = examples(place, name, manifests[name], objective={"caption_dropout": 0.999})
    empty = towers_of_run(run_file(place, name, manifests[name]), data(manifests[name]).manifests[0], towers_of(place))(
        [""]
    )
    for example in some:
        shown = example.text.float() if example.mask is None else example.text[:, :2].float()
        expected = empty.text if example.mask is None else empty.text[:, :2]
        torch.testing.assert_close(shown, expected.expand_as(shown), atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(example.pooled.float(), empty.pooled.expand(8, -1), atol=2e-3, rtol=1e-3)


def towers_of(place, **changes):
    config = run_file(place, "online", "m")
    return [tower.model_copy(update=changes) for tower in config.text.towers]


def test_micro_batches_keep_what_there_is_not(seen):
    (example, *_), *_ = seen["cached"]
    halves = list(example.chunks(2))
    assert [half.mask for half in halves] == [None, None]
    torch.testing.assert_close(torch.cat([half.pooled for half in halves]), example.pooled)


def test_towers_that_are_not_the_captions_are_refused(place, manifests, tmp_path):
    online, cached = (data(manifests[name]).manifests[0] for name in ("online", "cached"))
    first, second = towers_of(place)
    with pytest.raises(
        ConfigError, match=r"^text\.towers: clip_l, but the latents' captions are for clip_l and clip_g\n"
    ):
        load_towers([first], online)
    with pytest.raises(ConfigError, match=r"tower clip_l .* differ\n") as error:
        load_towers([first.model_copy(update={"pad": "zero"}), second], online)
    assert "tokenizer differ" in error.value.message
    swapped = first.model_copy(update={"model": second.model})
    with pytest.raises(ConfigError, match=r"tower clip_l .*weights, width differ\n"):
        load_towers([swapped, second], cached)
    load_towers([swapped, second], online)  # token ids are alike for both: the run's own checkpoints know the weights
    with pytest.raises(ConfigError, match=r"tower clip_g .*layer, final_norm differ\n"):
        load_towers([first, second.model_copy(update={"layer": "last", "final_norm": True})], cached)
    pinned = with_hashes(run_file(place, "online", "m"), load_towers([first, second], online))
    assert all(tower.sha256 for tower in pinned.text.towers)
    with pytest.raises(DataError, match=r"^text tower clip_l: .* has other weights than were asked for"):
        towers_of_run(pinned, online, [swapped, second])
    with pytest.raises(ConfigError, match=r"^towers: tower clip_l has layer=last, and the run .* layer=penultimate\n"):
        towers_of_run(pinned, online, [first.model_copy(update={"layer": "last"}), second])
    towers_of_run(pinned, online, [second, first])
    with pytest.raises(ConfigError, match=r"^towers: the run was trained on stored embeddings .*\n.*encoded"):
        towers_of_run(run_file(place, "cached", "m"), cached, [])


def test_sizes_without_pooled_text_are_refused(place, manifests):
    manifest = data(manifests["online"]).manifests[0]
    config = run_file(place, "online", manifests["online"])
    without = config.text.towers[0].model_copy(update={"name": "a"})
    mark = manifest.fingerprint
    single = mark.model_copy(update={"text_towers": (mark.text_towers[0].model_copy(update={"name": "a"}),)})
    one = manifest.model_copy(update={"fingerprint": single})
    with pytest.raises(ConfigError, match=r"^unet\.addition_embed_type: text_time .* has one\n") as error:
        build_network(config, one, load_towers([without], one))
    assert "\n" not in error.value.message


@pytest.fixture(scope="module")
def settings(place, tmp_path_factory) -> dict[str, Any]:
    """What runs have in common: they start from one UNet in diffusers' format."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("pretrained")
    unet.build(run_file(place, "cached", "m").unet, 4, 8, 80, 24).save_pretrained(folder / "unet")
    changes = run_file(place, "cached", "m", unet={"pretrained": str(folder)})
    return changes.model_dump(mode="json", exclude={"manifest", "output"}, exclude_unset=True)


@pytest.fixture(scope="module")
def trained(manifests, settings, tmp_path_factory) -> Run:
    """On two ranks in ZeRO-3, with stored embeddings, in two micro batches."""
    run = Run(tmp_path_factory.mktemp("cached"), manifests["cached"], **settings)
    run.said = finish(run.start("engine.zero_stage=3", "engine.accumulation=2"))
    return run


def test_a_model_like_sdxl_trains_on_stored_embeddings_and_goes_on_in_zero_1(trained, tmp_path):
    assert re.search(r"parameters  UNet [\d.]+ M, cached text\n", trained.said)
    assert "of 4x8x8 and shapes like it, 3 in all" in trained.said
    later = copy_of(trained, tmp_path, 4)
    later.file.write_text(trained.file.read_text().replace(str(trained.output), str(later.output)))
    assert "going on from" in finish(later.start("engine.zero_stage=1"))
    assert later.losses() == pytest.approx(trained.losses(), rel=1e-4)


def test_frozen_towers_that_run_give_the_same_training_and_pictures(place, trained, manifests, settings, tmp_path):
    text = run_file(place, "online", "m").text.model_dump(mode="json", exclude_unset=True)
    online = Run(tmp_path, manifests["online"], **{**settings, "text": text})
    assert "online text" in finish(online.start("engine.zero_stage=0", ranks=1))
    assert online.losses() == pytest.approx(trained.losses(), rel=1e-4)
    assert (online.output / "step-00000008" / "config.yaml").read_text().count("sha256: ") == 2

    how = {"autoencoder": str(place / "vae"), "prompts": ["a picture", "", "of another"], "steps": 4, "guidance": 3.0}
    found = []
    for run, towers in ((online, []), (trained, towers_of(place))):
        config = SampleConfig(run=str(run.output), output=f"{run.output}/pictures", towers=towers, **how)
        assert sample(config).pictures == 3
        found.append([images.decode(file.read_bytes()) for file in sorted(Path(config.output).glob("0*.png"))])
    np.testing.assert_allclose(np.stack(found[0]).astype(int), np.stack(found[1]).astype(int), atol=2)
    with pytest.raises(ConfigError, match="stored embeddings"):
        sample(SampleConfig(run=str(trained.output), output=str(tmp_path / "none"), **how))

    save_clip(tmp_path / "other", clip(5, quick_gelu=True), quick_gelu=True)
    moved = f"text.towers.0.model={tmp_path / 'other'}"
    said = finish(online.start("engine.zero_stage=0", "steps=9", moved, ranks=1), ConfigError.exit_code)
    assert "text.towers.0.sha256" in said


def test_a_run_on_stored_embeddings_is_exported_as_stable_diffusion_xl(place, trained, tmp_path):
    config = ExportConfig(
        run=str(trained.output), autoencoder=str(place / "vae"), output=str(tmp_path), towers=towers_of(place)
    )
    export(config)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a picture", num_inference_steps=2).images[0].size == (32, 32)
