"""docs/data.md: its scripts run as they stand, alone and under accelerate, and its tables are the code's."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from latent_shards import write_latents

from pipeline.config import LoaderConfig
from pipeline.data import LatentDataset

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
ADDRESS = "s3://bucket/latents/manifest.json"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def run(script: str, folder: Path, *launcher: str) -> str:
    url = write_latents(folder / "latents", [(100, 5), (60, 0)])
    file = folder / "script.py"
    assert ADDRESS in script
    file.write_text(script.replace(ADDRESS, url))
    ran = subprocess.run(
        [sys.executable, *launcher, str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.alone
def test_the_ten_lines_run_as_they_stand(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = next(block for block in blocks(readme) if "LatentDataset(" in block)
    assert script == blocks(PAGE)[0]
    assert len([line for line in script.splitlines() if line.strip()]) <= 10
    assert run(script + "print(batch['step'], sorted(batch))", tmp_path).startswith("8 ")  # 3 epochs of 160 samples


@pytest.mark.ranks
def test_under_accelerate_every_rank_has_its_part(tmp_path: Path) -> None:
    alone, together = blocks(PAGE)[:2]
    loop = """
for batch in dataset:
    line = " ".join(["keys", str(accelerator.process_index), str(batch["step"]), *batch["keys"]])
    print(line + chr(10), end="", flush=True)  # in one piece, since both ranks print
    latents = batch["latents"]
    accelerator.backward((model(latents) - latents).square().mean())
    if batch["step"] == 3:
        break
accelerator.end_training()
"""
    head = alone[: alone.index("dataset =")] + "model = torch.nn.Conv2d(2, 2, 1)\n"
    told = run(head + together + loop, tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    found = {(int(r), int(step)): keys.split() for r, step, keys in re.findall(r"keys (\d) (\d) (.*)", told)}
    with LatentDataset(str(tmp_path / "latents/manifest.json"), global_batch=64) as dataset:
        for step, batch in zip(range(4), dataset, strict=False):
            assert found[0, step] + found[1, step] == batch["keys"]


def test_the_tables_name_every_setting_with_its_default() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", PAGE, re.MULTILINE))
    words = {None: "null", True: "true", False: "false"}
    expected = {
        name: words.get(field.default, str(field.default))
        if isinstance(field.default, bool | None)
        else str(field.default)
        for name, field in LoaderConfig.model_fields.items()
    }
    own = inspect.signature(LatentDataset).parameters
    left_out = {"manifests", "rank", "world_size", "settings"}
    expected |= {name: repr(one.default).replace("'", '"') for name, one in own.items() if name not in left_out}
    assert told == expected
