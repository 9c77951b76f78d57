"""What launchers have told a rank in its environment, and what is taken where they have not."""

from __future__ import annotations

import os
import socket
import sys

from pipeline.cores import available_cores
from pipeline.errors import SetupError
from pipeline.runtime import network

_SETTINGS_OF_FILE = "ACCELERATE_CONFIG_DS_FIELDS"
_RUN_FILES = (
    "mixed_precision",
    "zero_stage",
    "gradient_clipping",
    "gradient_accumulation_steps",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
    "zero3_save_16bit_model",
    "deepspeed_config_file",
)


def prepare() -> None:
    """What a launcher sets, where there is none."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    here = os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])  # as DeepSpeed's launcher calls it
    if os.environ.setdefault("LOCAL_WORLD_SIZE", here) != os.environ["WORLD_SIZE"]:
        network.choose_interface(os.environ["MASTER_ADDR"])
    elif sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here: nothing for the network to see


def threads() -> int:
    """CPU threads of this rank: what the environment says, or its share of the cores."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    share = available_cores() // int(os.environ["LOCAL_WORLD_SIZE"])
    return max(1, int(said) if said.isdecimal() else share)


def refuse_settings() -> None:
    """Raises SetupError where accelerate was told in a file of its own what it would hold against ours."""
    names = os.environ.get(_SETTINGS_OF_FILE, "").split(",")
    if found := [name for name in names if name in _RUN_FILES]:
        raise SetupError(
            f"accelerate's configuration file sets {', '.join(found)}, which the run file decides",
            "leave them out there, as launchers/accelerate/*.yaml do; engine and optimizer of the run file have them",
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
