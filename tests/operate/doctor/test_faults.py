"""Each planted fault is found by the check of its name, with a remedy; a healthy set-up passes in silence."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from pipeline.config import TrainConfig
from pipeline.data.datasets import open_datasets
from pipeline.errors import SetupError
from pipeline.operate.doctor import devices, job, machine, memory, room, versions
from pipeline.operate.doctor.devices import Devices, judge
from pipeline.operate.doctor.finding import Doubt, Finding
from pipeline.operate.doctor.world import World, find_world
from pipeline.runfile import dump, load
from pipeline.storage import Lease, open_store
from pipeline.train.checkpoint import COMPLETE, CONFIG, FORMAT_VERSION, RUN, noted, step_name
from pipeline.train.trained_on import files


def failed(found: dict[str, Finding], check: str, said: str, remedy: str) -> None:
    """That check alone has failed, in these words; what rests on it says so."""
    assert found[check].verdict == "fail", found[check]
    assert said in found[check].said
    assert remedy in found[check].remedy
    for other in found.values():
        if other.check != check:
            assert other.verdict == "pass" or (other.verdict, other.said) == (
                "warn",
                f"not looked at, since {check} failed",
            ), other


def all_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


class TestAHealthySetUp:
    def test_of_a_training_passes_and_nothing_stays_behind(self, training, tmp_path, place):
        before = all_files(tmp_path), all_files(place)
        vae = f"{place}/vae"
        found = training(
            "validation.every=5",
            "validation.samples=4",
            "validation.prompts=[a picture]",
            f"validation.autoencoder={vae}",
            f"loader.cache={tmp_path}/new/cache",
            "loader.cache_gib=0.001",
            f"metrics.discovery={tmp_path}/found",
        )
        assert {finding.verdict for finding in found.values()} == {"pass"}, found
        assert not any(finding.remedy for finding in found.values())
        assert (all_files(tmp_path), all_files(place)) == before
        names = "config python packages devices deepspeed batch output manifest latents resume memory disk cache"
        assert set(names.split()) < set(found)
        assert found["batch"].said == "2 ranks x 4 samples x 1 micro batches = global_batch 8"

    def test_of_an_encode_job_too(self, encoding, tmp_path, place):
        before = all_files(tmp_path), all_files(place)
        found = encoding()
        assert {finding.verdict for finding in found.values()} == {"pass"}, found
        assert (all_files(tmp_path), all_files(place)) == before
        assert {"sources", "encoder", "output", "disk", "metrics-port"} < set(found)
        assert not {"batch", "manifest", "memory", "master-port"} & set(found)


class TestTheRunFile:
    def test_a_typo(self, training):
        found = training("optimizer.learning_rat=1")
        failed(found, "config", "optimizer.learning_rat: unknown field", "did you mean 'learning_rate'?")
        assert {"python", "packages", "open-files"} < set(found)

    def test_of_another_command(self):
        found = job.examine_run("configs/demo/sample.yaml", ["root=x"])
        assert (found[0].check, found[0].verdict) == ("config", "fail")
        assert "lathe train" in found[0].remedy

    @pytest.mark.parametrize(
        ("changes", "ranks", "said"),
        [
            ([], 3, "8 samples cannot be shared equally by 3 ranks"),
            (["engine.accumulation=3"], 2, "3 micro batches cannot share the 4 samples"),
            (["engine.world_size=4"], 2, "engine.world_size=4"),
        ],
    )
    def test_ranks_that_do_not_divide_the_batch(self, training, changes, ranks, said):
        failed(training(*changes, ranks=ranks), "batch", said, "set ")

    def test_ranks_by_the_launchers_variables(self, training, monkeypatch):
        monkeypatch.setenv("NODES", "3")
        monkeypatch.setenv("NPROC", "1")
        failed(training(), "batch", "8 samples cannot be shared equally by 3 ranks", "set global_batch to 6 or 9")
        monkeypatch.setenv("NPROC", "0")
        assert training()["ranks"] == Finding(
            "ranks", "fail", "NPROC=0 is no number from 1 on", "set NPROC to a number, or unset it"
        )


@pytest.mark.parametrize(
    ("environment", "gpus", "asked", "configured", "expected"),
    [
        ({}, 0, None, None, World(2, 2)),
        ({}, 8, None, None, World(8, 8)),
        ({"NODES": "4"}, 8, None, None, World(32, 8)),
        ({"NODES": "4", "NPROC": "2"}, 0, None, 6, World(8, 2)),
        ({}, 8, None, 64, World(64, 8)),
        ({"NODES": "16"}, 0, 64, None, World(64, 4)),
        ({}, 0, 64, None, World(64, 2)),
        ({"NPROC": "8"}, 1, 1, None, World(1, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, 4, None, 8, World(8, 4, 5, 1)),
    ],
)
def test_how_many_ranks_there_will_be(environment, gpus, asked, configured, expected):
    assert find_world(environment, gpus=gpus, asked=asked, configured=configured) == expected


class TestPackagesAndDevices:
    def test_a_version_out_of_range(self, training, monkeypatch):
        real = versions.version
        monkeypatch.setattr(versions, "version", lambda name: "2.4.1+cu121" if name == "torch" else real(name))
        failed(training(), "packages", "torch 2.4.1+cu121, and >=2.6 is wanted", "pip install 'torch>=2.6'")

    def test_a_package_that_is_gone(self, monkeypatch):
        def version(name: str) -> str:
            if name == "safetensors":
                raise versions.PackageNotFoundError(name)
            return real(name)

        real = versions.version
        monkeypatch.setattr(versions, "version", version)
        with pytest.raises(SetupError, match="safetensors is not installed"):
            versions.packages()

    def test_another_python(self, training, monkeypatch):
        monkeypatch.setattr(versions.platform, "python_version", lambda: "3.9.2")
        failed(training(), "python", "Python 3.9.2, and Lathe wants >=3.11", "make an environment")

    @pytest.mark.parametrize(
        ("devices", "ranks", "said", "remedy"),
        [
            (Devices(8, 0, ""), 8, "8 GPUs are in this machine, and torch", "built for CUDA"),
            (Devices(8, 0, "CUDA 13.0"), 8, r"\(CUDA 13.0\) sees none", "nvidia-smi"),
            (Devices(4, 4, "CUDA 12.4", (), (("A100", "sm_80", True),) * 4), 8, "8 ranks here, .* 4 GPUs", "NPROC=4"),
            (
                Devices(1, 1, "CUDA 13.0", ("sm_80", "sm_90"), (("V100", "sm_70", False),)),
                1,
                r"no code for V100 \(sm_70\)",
                "sm_70",
            ),
        ],
    )
    def test_gpus_that_torch_cannot_use(self, devices, ranks, said, remedy):
        with pytest.raises(SetupError, match=said) as error:
            judge(devices, World(ranks, ranks))
        assert remedy in error.value.remedy

    def test_gpus_that_it_can(self):
        l40 = Devices(2, 2, "CUDA 12.4", ("sm_80", "sm_86", "sm_90"), (("L40", "sm_89", True),) * 2)
        assert judge(l40, World(2, 2), bfloat16=True) == "2 x L40, CUDA 12.4"
        newer = Devices(1, 1, "CUDA 12.4", ("sm_80", "compute_80"), (("B200", "sm_100", True),))
        assert judge(newer, World(1, 1)) == "1 x B200, CUDA 12.4"
        v100 = Devices(1, 1, "CUDA 12.4", ("sm_70",), (("V100", "sm_70", False),))
        assert isinstance(judge(v100, World(1, 1), bfloat16=True), Doubt)
        assert judge(v100, World(1, 1)) == "1 x V100, CUDA 12.4"

    def test_device_files_are_counted(self, tmp_path):
        (tmp_path / "dev").mkdir()
        for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
            (tmp_path / "dev" / name).touch()
        assert devices.look(tmp_path).in_machine == 2

    def test_no_compiler_in_path(self, training, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        failed(training("engine.compile=true"), "compiler", "no C++ compiler", "install g++")

    def test_a_compiler_that_fails(self, training, monkeypatch, tmp_path):
        program = tmp_path / "c++"
        program.write_text("#!/bin/sh\necho Python.h: No such file >&2\nexit 1\n")
        program.chmod(0o700)
        monkeypatch.setenv("CXX", str(program))
        failed(training("engine.compile=true"), "compiler", "fails: Python.h: No such file", "python3-dev")

    def test_an_operator_of_deepspeeds_that_cannot_be_compiled(self, training, monkeypatch, tmp_path):
        monkeypatch.setenv("DS_PIN_MEMORY_BACKEND", "native")
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
        offloaded = "engine.offload_optimizer=true"
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(tmp_path))
            patch.delenv("CXX", raising=False)
            failed(training(offloaded), "deepspeed", "cannot compile pin_memory: no C++ compiler", "install g++")
            built = tmp_path / "extensions/py311_cpu/pin_memory"
            built.mkdir(parents=True)
            (built / "pin_memory.so").touch()
            assert training(offloaded)["deepspeed"].said.endswith("with pin_memory")
        shutil.rmtree(tmp_path / "extensions")
        if shutil.which("c++"):
            assert training(offloaded)["deepspeed"].said.endswith("can compile pin_memory")

    def test_deepspeed_that_cannot_be_imported(self, training, monkeypatch):
        monkeypatch.setitem(sys.modules, "deepspeed", None)
        found = training()["deepspeed"]
        assert found.verdict == "fail"
        assert "DeepSpeed cannot be imported" in found.said
        assert "engine.zero_stage=0" in found.remedy

    def test_a_tracker_that_is_not_installed(self, training):
        failed(training("metrics.wandb={project: p}"), "trackers", "wandb is not installed", "pip install wandb")


class TestTheNetwork:
    def test_a_port_that_is_taken(self, training, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            monkeypatch.setenv("MASTER_PORT", str(port))
            failed(training(), "master-port", f"MASTER_PORT={port}: Address already in use", "another MASTER_PORT")
            monkeypatch.delenv("MASTER_PORT")
            found = training(f"metrics.port={port}")["metrics-port"]
        assert found.verdict == "warn"
        assert f"{port} of 127.0.0.1 taken (process" in found.said
        assert "metrics.port" in found.remedy
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert training()["master-port"].said == f"{port} is free"

    def test_an_address_of_another_machine(self, training):
        failed(
            training("metrics.host=node..0"), "metrics-port", "it is no name of a machine", "metrics.prometheus=false"
        )
        failed(training("metrics.host=192.0.2.7"), "metrics-port", "metrics.host=192.0.2.7", "metrics.prometheus=false")

    @pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "LATHE_INTERFACE"])
    def test_an_interface_that_is_not_there(self, training, monkeypatch, variable):
        monkeypatch.setenv(variable, "ib7")
        failed(training(), "interface", f"{variable}=ib7: interface ib7 is not there", "lo")
        monkeypatch.setenv(variable, "lo")
        assert training()["interface"].said == f"{variable}=lo"

    @pytest.mark.parametrize("name", ["nowhere.invalid", "node..0", "x" * 300])
    def test_a_master_that_nobody_knows(self, training, monkeypatch, name):
        monkeypatch.setenv("MASTER_ADDR", name)
        failed(training(), "interface", f"MASTER_ADDR={name} cannot be resolved", "first machine")


class TestTheMachine:
    def test_few_open_files(self, training):
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        try:
            with pytest.raises(SetupError, match=r"256 files open .* of 2 ranks each wants 272") as error:
                machine.open_files(2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert error.value.remedy.startswith("ulimit -n ")
        assert training()["open-files"].verdict == "pass"

    def test_a_temporary_folder_that_is_not_there(self, training, monkeypatch, tmp_path):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        failed(training(), "temporary-folder", "temporary files cannot be written", "set TMPDIR")

    def test_another_folder_than_tmpdir_is_used(self, monkeypatch, tmp_path):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
        found = machine.temporary()
        assert isinstance(found, Doubt)
        assert found.said.startswith(f"TMPDIR={tmp_path / 'gone'} cannot be written; {tmp_path} is used")
        monkeypatch.setenv("TMPDIR", f"{tmp_path}/")
        assert isinstance(machine.temporary(), str)

    def test_little_shared_memory(self, tmp_path):
        found = machine.shared_memory(8, on_gpu=True, folder=tmp_path / "none")
        assert isinstance(found, Doubt)
        assert "--shm-size" in found.remedy
        assert isinstance(machine.shared_memory(8, on_gpu=False, folder=tmp_path / "none"), str)

    def test_a_requeue_file_that_cannot_be_written(self, training, monkeypatch, tmp_path):
        monkeypatch.setenv("LATHE_REQUEUE_FILE", str(tmp_path / "gone/requeue.json"))
        failed(training(), "requeue-file", "gone/requeue.json: No such file", "in a folder there is")

    def test_a_requeue_file_that_is_there_stays(self, training, monkeypatch, tmp_path):
        file = tmp_path / "requeue.json"
        file.write_text("asked")
        monkeypatch.setenv("LATHE_REQUEUE_FILE", str(file))
        assert training()["requeue-file"].verdict == "pass"
        assert file.read_text() == "asked"

    def test_a_discovery_folder_that_cannot_be_written(self, training, tmp_path):
        (tmp_path / "file").touch()
        found = training(f"metrics.discovery={tmp_path}/file/found")["discovery"]
        assert (found.verdict, "Not a directory" in found.said) == ("warn", True)

    def test_too_little_memory(self, training, monkeypatch):
        monkeypatch.setattr(memory, "limit_bytes", lambda: 100 << 20)
        failed(training(), "memory", "and 100.0 MiB are there", "engine.zero_stage=3")

    def test_memory_that_others_have(self, training, monkeypatch):
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1 << 20}))
        monkeypatch.setattr(memory, "limit_bytes", lambda: 1 << 40)
        found = training()["memory"]
        assert (found.verdict, "1.0 MiB are free now" in found.said) == ("warn", True)

    def test_a_larger_model_wants_more(self, training, monkeypatch):
        monkeypatch.setattr(memory, "limit_bytes", lambda: 8 << 30)
        large = "unet.block_out_channels=[2048]"
        assert training()["memory"].verdict != "fail"
        assert training(large)["memory"].verdict == "fail"
        assert "engine.accumulation" not in training(large)["memory"].remedy  # activations are not what is asked about


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "lathe-doctor", folder]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounts are refused here")
    yield folder
    subprocess.run(["umount", folder], check=True)


class TestDisks:
    def test_no_room_for_two_checkpoints(self, training, full_disk):
        failed(training(f"output={full_disk}/run"), "disk", "two while one is written", "another disk or on S3")
        (full_disk / "filler").write_bytes(bytes(shutil.disk_usage(full_disk).free))
        found = training(f"output={full_disk}/run")
        failed(found, "output", "no room to write it", "free some disk space")
        assert all_files(full_disk) == [full_disk / "filler"]

    def test_no_room_for_all_that_are_kept(self, training):
        found = training("checkpoint.keep=1000000")["disk"]
        assert (found.verdict, "those that are kept take" in found.said) == ("warn", True)
        assert "checkpoint.keep" in found.remedy

    def test_an_output_that_is_a_file(self, training, tmp_path):
        (tmp_path / "run").touch()
        failed(training(), "output", "run", "a file stands where a folder is needed")

    @pytest.mark.parametrize("field", ["output", "loader.cache", "metrics.discovery"])
    def test_a_name_that_is_too_long(self, training, tmp_path, field):
        check = field.rpartition(".")[2]
        found = training(f"{field}={tmp_path}/{'x' * 300}")[check]
        assert found.verdict == ("warn" if check == "discovery" else "fail")
        assert "File name too long" in found.said
        assert "itself failed" not in found.said
        assert found.remedy

    def test_earlier_checkpoints_stay_until_the_next_one_is_whole(self, training, monkeypatch):
        monkeypatch.setattr(room, "_checkpoint_bytes", lambda output: 1 << 40)
        monkeypatch.setattr(room, "_free", lambda output: 1 << 10)
        failed(training(), "disk", "1.0 KiB free", "another disk or on S3")
        monkeypatch.setattr(room, "_free", lambda output: 1 << 26)
        assert training()["disk"].verdict == "pass"

    def test_a_cache_that_cannot_be(self, training, tmp_path):
        (tmp_path / "file").touch()
        failed(training(f"loader.cache={tmp_path}/file"), "cache", f"loader.cache={tmp_path}/file", "another folder")

    def test_a_cache_that_has_no_room(self, training, tmp_path):
        found = training(f"loader.cache={tmp_path}", "loader.cache_gib=1000000")["cache"]
        assert (found.verdict, "set loader.cache_gib" in found.remedy) == ("warn", True)
        assert not (tmp_path / "lathe-blocks").exists()


def checkpoint_of(file: Path, *changes: str, step: int = 4) -> None:
    """One that is complete, as far as a resumed run looks before it loads tensors."""
    config = load(TrainConfig, str(file), list(changes))
    datasets = open_datasets(config.sources, global_batch=config.global_batch)
    texts = {
        CONFIG: dump(config).encode(),
        **files(datasets, datasets.mean, datasets.std),
        RUN: json.dumps({"format_version": FORMAT_VERSION}).encode(),
    }
    store = open_store(config.output)
    for name, text in texts.items():
        store.write(f"{step_name(step)}/{name}", text)
    marker = {"files": {name: noted(text) for name, text in texts.items()}}
    store.write(f"{step_name(step)}/{COMPLETE}", json.dumps(marker).encode())


class TestLatents:
    def test_no_manifest(self, training, tmp_path):
        failed(training(f"manifest={tmp_path}/manifest.json"), "manifest", "no such file", "check the path")

    def test_a_manifest_that_was_changed_by_hand(self, training, tmp_path, place):
        manifest = (place / "latents/manifest.json").read_text()
        name = json.loads(manifest)["shards"][0]["name"]
        (tmp_path / "manifest.json").write_text(manifest.replace(f'"{name}"', '"other.tar"'))
        failed(training(f"manifest={tmp_path}/manifest.json"), "manifest", "changed by hand", "lathe remove")

    def test_another_text_length(self, training):
        failed(training("text.context_length=16"), "latents", "text.context_length: 16", "text.context_length=8")

    def test_more_levels_than_the_latents_halve(self, training):
        deeper = (
            "unet.block_out_channels=[32,32,32]",
            "unet.down_block_types=[CrossAttnDownBlock2D,CrossAttnDownBlock2D,CrossAttnDownBlock2D]",
            "unet.up_block_types=[CrossAttnUpBlock2D,CrossAttnUpBlock2D,CrossAttnUpBlock2D]",
        )
        failed(training(*deeper), "latents", "unet.block_out_channels", "use fewer levels")

    def test_a_shard_that_was_cut(self, training, tmp_path, place):
        shutil.copytree(place / "latents", tmp_path / "latents")
        shard = tmp_path / "latents/00000.tar"
        shard.write_bytes(shard.read_bytes()[:-512])
        failed(training(f"manifest={tmp_path}/latents/manifest.json"), "shards", "00000.tar has", "copy it again")

    @pytest.mark.parametrize(
        ("name", "said"),
        [("gone", "no such folder"), ("other-vae", "is not the autoencoder that the training latents")],
    )
    def test_another_autoencoder(self, training, place, name, said):
        pictures = ("validation.every=5", "validation.prompts=[a]", f"validation.autoencoder={place}/{name}")
        failed(training(*pictures), "autoencoder", said, "")
        assert training(*pictures)["autoencoder"].remedy

    def test_a_unet_to_begin_with_that_is_not_there(self, training, tmp_path):
        failed(training(f"unet.pretrained={tmp_path}/gone"), "unet", "no such folder", "give a folder")

    def test_a_unet_of_other_latents(self, training, tmp_path):
        pretrained = UNet2DConditionModel(
            in_channels=8,
            out_channels=8,
            block_out_channels=(32,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=4,
            cross_attention_dim=16,
        )
        pretrained.save_config(tmp_path / "unet")
        failed(training(f"unet.pretrained={tmp_path}/unet"), "network", "takes 8 latent channels", "give another UNet")

    def test_a_unet_that_wants_more_of_captions(self, training):
        failed(training("unet.addition_embed_type=text_time"), "network", "pooled text", "set it to null")

    def test_a_run_to_begin_with_that_is_not_there(self, training, tmp_path):
        found = training(f"init_from={{run: {tmp_path}/gone}}")
        assert found["init-from"].verdict == "fail"
        assert found["init-from"].remedy


class TestEarlierSteps:
    def test_are_gone_on_from(self, training, train_file, tmp_path):
        checkpoint_of(train_file)
        assert training()["resume"].said == f"goes on from {tmp_path}/run/{step_name(4)}, of 30 steps"

    def test_of_another_seed(self, training, train_file):
        checkpoint_of(train_file, "seed=3")
        failed(training(), "resume", "seed: 0, but the checkpoint", "set seed=3, or train into another output")

    def test_of_a_run_that_has_finished(self, training, train_file):
        checkpoint_of(train_file, step=30)
        found = training()["resume"]
        assert (found.verdict, "finished already" in found.said) == ("warn", True)

    def test_of_a_run_that_goes_on(self, training, tmp_path):
        held = Lease(open_store(str(tmp_path / "run")))
        held.take()
        try:
            failed(training(), "resume", "is being written to by process", "end that run first")
        finally:
            held.release()

    def test_that_cannot_be_read(self, training, train_file, tmp_path):
        checkpoint_of(train_file)
        damaged = tmp_path / "run" / step_name(4) / CONFIG
        damaged.write_bytes(bytes(len(damaged.read_bytes())))
        failed(training(), "resume", "can be read", "train into another output")


class TestEncoding:
    def test_no_sources(self, encoding, tmp_path):
        (tmp_path / "empty").mkdir()
        found = encoding(f"images.shards={tmp_path}/empty")
        assert found["sources"].verdict == "fail"
        assert found["sources"].remedy

    def test_no_autoencoder(self, encoding, tmp_path):
        failed(encoding(f"autoencoder={tmp_path}/gone"), "encoder", "no such folder", "give a folder")

    def test_a_picture_size_that_it_cannot_have(self, encoding):
        found = encoding("images.buckets=null", "images.resolution=30")
        failed(found, "encoder", "30 is not a multiple of 4", "use 28")

    def test_an_output_that_holds_other_latents(self, encoding, place, tmp_path):
        shutil.copytree(place / "latents", tmp_path / "encoded/32")
        found = encoding()
        failed(found, "encoder", "holds latents that were made otherwise; these differ", "choose another output")
        assert (tmp_path / "encoded/32/encoding.json").read_bytes() == (place / "latents/encoding.json").read_bytes()
