"""DeepSpeed's own operators, which are compiled at the first use, and the compiler that this and torch.compile need."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from pipeline.config import EngineConfig
from pipeline.errors import SetupError
from pipeline.runtime.deepspeed_config import choose_accelerator

PIN_MEMORY = "pin_memory"
_PROGRAM = "#include <Python.h>\n#include <vector>\nint main_() { return std::vector<int>{1}.front() - 1; }\n"
_COMPILE_SECONDS = 50


def import_deepspeed() -> str:
    """Its release. Raises SetupError where it cannot be imported."""
    choose_accelerator()
    try:
        import deepspeed
    except Exception as error:  # it looks at compilers, drivers and MPI as it is imported
        said = (str(error).strip() or "no more is said").splitlines()[0]
        raise SetupError(
            f"DeepSpeed cannot be imported: {type(error).__name__}: {said}",
            "install it anew for this torch, or set engine.zero_stage=0, which does without",
        ) from error
    return str(deepspeed.__version__)


def pins_natively(config: EngineConfig) -> bool:
    """Whether DeepSpeed's allocator of pinned memory may be loaded, the one operator that such a run may need.

    Offloaded states are updated by our own AdamW, so its CPU Adam is never built.
    """
    offloads = config.offload_optimizer or config.offload_parameters
    return offloads and os.environ.get("DS_PIN_MEMORY_BACKEND") == "native"


def is_built(name: str) -> bool:
    """Whether an operator came with DeepSpeed, or was compiled here before. After `import_deepspeed`."""
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return bool(installed_ops.get(name)) or any(root.glob(f"**/{name}/{name}.so"))


def check_compiler() -> str:
    """Compile a few lines against Python's headers, as operators and torch.compile are; the compiler's path.

    Raises:
        SetupError: there is none, or it fails.
    """
    said = os.environ.get("CXX", "")
    command = shlex.split(said) if said else [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    remedy = "install g++ and Python's headers (apt-get install g++ python3-dev), or load the site's compiler module"
    if not command or (path := shutil.which(command[0])) is None:
        raise SetupError(f"no C++ compiler: {said or 'c++, g++, clang++'} not found in PATH", remedy)
    with tempfile.TemporaryDirectory(prefix="lathe-compiler-") as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(_PROGRAM, encoding="utf-8")
        options = ["-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", str(source), "-o", f"{folder}/probe.so"]
        try:
            done = subprocess.run(
                [path, *command[1:], *options],
                capture_output=True,
                text=True,
                timeout=_COMPILE_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SetupError(f"the C++ compiler {path} does not run: {error}", remedy) from error
    if done.returncode:
        first = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise SetupError(f"the C++ compiler {path} fails: {first}", remedy)
    return path
