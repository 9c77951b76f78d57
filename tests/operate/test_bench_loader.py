from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import forked
import numpy as np
import pytest
from loader_process import answer

from pipeline.data.manifest import load_manifest
from pipeline.errors import ConfigError, SetupError
from pipeline.operate.bench.loader import bench, peers, starts
from pipeline.operate.bench.loader.bench import SIZES, LoaderBench, bench_loader, sized
from pipeline.operate.bench.loader.contestant import Contestant
from pipeline.operate.bench.loader.ours import Bench, Work
from pipeline.operate.bench.loader.page import GOALS, page, summary
from pipeline.operate.bench.loader.plan_memory import PlanSizes, write_shards
from pipeline.operate.bench.loader.rates import RateSizes, endpoint, ratios, upload, write_all
from pipeline.operate.bench.loader.rivals import ALONE_ON_S3, APART, HERE, NOT_FROM_S3, TUNED, Rivals, find_rivals
from pipeline.operate.bench.loader.samples import KINDS, NUMBERS, write_latents, write_samples
from pipeline.operate.bench.loader.shuffle import ShuffleSizes, quality
from pipeline.operate.bench.own_environment import own_environment, with_requirements
from pipeline.operate.bench.tables import aligned, markdown
from pipeline.storage import open_store

RATES = RateSizes(samples=1024, per_shard=128, block_samples=8, batch=8, window=2, processes=1)
SHUFFLE = ShuffleSizes(shards=16, per_shard=64, block_samples=4, batch=8, window=4)
PEERS_READ = 512  # samples


class Forked(Contestant):
    """A process of its own that has imported everything before."""

    def __init__(self, name: str, bench: type, work: Any) -> None:
        self.name = name
        self._line, end = forked.pipe()
        self._process = forked.start(answer, bench, work, end, daemon=False)
        end.close()

    def ask(self, command: str) -> dict[str, Any]:
        self._line.send(command)
        found: dict[str, Any] = self._line.recv()
        return found

    def close(self) -> None:
        self._line.close()
        self._process.join(20)
        assert self._process.exitcode == 0


class WebdatasetAlone(Rivals):
    """The first of each kind is a program as users run it; the others are forked, which saves imports of seconds."""

    def __init__(self) -> None:
        super().__init__({"webdataset": Path(sys.executable)})
        self.programs: list[str] = []

    def ours(self, work: Work) -> Contestant:
        return self._one("ours", lambda: Rivals.ours(self, work), lambda: Forked("own loader", Bench, work))

    def peer(self, name: str, **work: Any) -> Contestant:
        asked = peers.Work(name, **work)
        return self._one(name, lambda: Rivals.peer(self, name, **work), lambda: Forked(name, peers.Bench, asked))

    def _one(self, name: str, program: Callable[[], Contestant], forked: Callable[[], Contestant]) -> Contestant:
        if name in self.programs:
            return forked()
        self.programs.append(name)
        return program()


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("text") / "text", "text", RATES, Rivals({}), quiet)


def work(written, **changes) -> Work:
    manifest = str(written.place / "ours" / "manifest.json")
    return Work(**{"manifest": manifest, "samples": 1024, "batch": 8, "window": 2, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_all_read_the_same_samples(kind, tmp_path):
    """Ours and webdataset's own reader give the arrays that were drawn, in shards that `lathe encode` might write."""
    size = write_samples(tmp_path / "samples", kind, 96)
    write_latents(tmp_path / "samples", open_store(f"{tmp_path}/ours"), kind, per_shard=32, block_samples=8)
    fields = {path.stem: np.load(path) for path in (tmp_path / "samples").glob("*.npy")}
    assert size == sum(array[0].nbytes for array in fields.values())
    manifest = load_manifest(f"{tmp_path}/ours/manifest.json")
    assert (manifest.samples("train"), len(manifest.shards)) == (96, 3)
    with Bench(Work(f"{tmp_path}/ours/manifest.json", 96, batch=16, window=4)).opened() as loader:
        for _ in range(6):
            batch = next(loader)
            numbers = [int(key) for key in batch.keys]
            text = batch.text["clip"]
            assert np.array_equal(batch.moments.numpy(), fields["moments"][numbers])
            read = text.embeddings if kind == "text" else text.tokens
            assert np.array_equal(read.numpy(), fields["text" if kind == "text" else "tokens"][numbers])
    (tmp_path / "tars").mkdir()
    theirs = peers.Work("webdataset", str(tmp_path / "samples"), str(tmp_path / "tars"), per_shard=32, batch=16)
    assert peers.write_webdataset(theirs) == [32, 32, 32]
    batches = list(peers.read_webdataset(theirs))
    for name, array in fields.items():
        read = np.concatenate([batch[name].numpy() for batch in batches])
        assert np.array_equal(np.sort(read.reshape(96, -1), axis=0), np.sort(array.reshape(96, -1), axis=0))


def test_an_epoch_that_was_in_memory_already_is_no_measurement(written):
    assert Bench(work(written)).epoch()["samples"] == 1024
    kept = Bench(work(written, batch=64, window=64))
    kept.epoch()
    with pytest.raises(AssertionError, match="take a smaller window"):
        kept.epoch()


def test_ranges_are_the_data_once(written):
    ranges = Bench(work(written, workers=2)).ranges()["ranges"]
    there = sum(shard.bytes for shard in load_manifest(work(written).manifest).shards)
    assert 0.9 * there < sum(end - start for _, start, end in ranges) <= there


def test_every_sample_comes_once(written):
    order = Bench(work(written)).order()["batches"]
    assert sorted(number for batch in order for number in batch) == list(range(1024))


def test_the_fastest_peer_is_one_at_its_own_settings():
    seconds = {"ours": 1.0, "ours_threads": 0.5, "raw": 0.25, "webdataset": 5.0, "litdata": 4.0, "litdata_by_item": 0.8}
    found = ratios(seconds)
    assert (found["ours_over_fastest_peer"], found["ours_over_fastest_tuned"]) == (4.0, 0.8)
    assert found["ours_over_raw"] == 0.25


def test_spread_and_together_of_known_orders():
    rng, shards = np.random.default_rng(0), [50] * 40
    uniform = quality(rng.permutation(2000).reshape(-1, 20).tolist(), shards)
    assert uniform.spread == pytest.approx(1, abs=0.03)
    assert uniform.together == pytest.approx(1, abs=0.1)
    unshuffled = quality(np.arange(2000).reshape(-1, 20).tolist(), shards)
    assert unshuffled.spread == pytest.approx(50 / 2000, rel=0.05)
    assert unshuffled.together > 20
    with pytest.raises(AssertionError, match="no permutation"):
        quality([[0, 0]], [2])


def test_shards_of_the_memory_test_are_read_whole(tmp_path):
    write_shards(tmp_path / "some", 20, PlanSizes(samples=64, block_samples=8))
    done = Bench(Work(f"{tmp_path}/some/manifest.json", 1280, batch=8, window=4, workers=1)).peak()
    assert done["peak_bytes"] > 2**26


def test_a_contestant_tells_why_it_ended():
    program = "import sys; next(sys.stdin); print('boom', file=sys.stderr); sys.exit(3)"
    with (
        Contestant("rival", [sys.executable, "-c", program]) as rival,
        pytest.raises(SetupError, match="rival failed at `epoch`: boom"),
    ):
        rival.ask("epoch")


def test_a_contestant_must_read_every_sample():
    program = 'import sys\nfor _ in sys.stdin: print(\'{"samples": 3, "seconds": 1}\', flush=True)'
    with Contestant("rival", [sys.executable, "-c", program]) as rival:
        assert rival.epoch(3)["seconds"] == 1
        with pytest.raises(AssertionError, match="rival read 3 samples, and there are 4"):
            rival.epoch(4)


def test_answers_are_lines_of_json():
    class Answers:
        def epoch(self) -> dict[str, int]:
            return {"samples": 1}

    said = io.StringIO()
    peers.serve(Answers(), iter(["epoch\n", "epoch\n"]), said)
    assert [json.loads(line) for line in said.getvalue().splitlines()] == [{"samples": 1}] * 2


@pytest.mark.alone
def test_an_environment_is_made_once_with_links(tmp_path):
    requirements, folder = tmp_path / "list.txt", tmp_path / "peers"
    requirements.write_text("")
    programs = own_environment(folder, requirements, ["psutil"])
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    assert (site / "psutil").is_symlink()
    found = subprocess.run(
        [programs / "python", "-c", "import psutil; print(psutil.__version__)"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == version("psutil")
    assert (folder / "pins.txt").read_text() == f"psutil=={version('psutil')}\n"
    (programs / "mine").touch()
    assert own_environment(folder, requirements, ["psutil"]) == programs
    assert (programs / "mine").exists()
    requirements.write_text("# another list\n")
    own_environment(folder, requirements, ["psutil"])
    assert not (programs / "mine").exists()


@pytest.mark.alone
def test_without_a_package_index_it_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SetupError, match=r"the peers cannot be installed: .*pip.* failed: ") as told:
        find_rivals(tmp_path / "peers")
    assert "--no-peers" in told.value.remedy
    assert "\n" not in str(told.value.message)


def test_what_torch_needs_is_linked_with_it():
    found = with_requirements("torch")
    assert {"torch", "typing-extensions", "sympy", "mpmath"} <= set(found)
    assert not {"torchvision", "no-such-package"} & set(with_requirements("torch", "no-such-package"))


def test_sizes_by_name():
    assert sized("standard") == LoaderBench()
    assert sized("small", repeats=9).repeats == 9
    for one in SIZES.values():
        assert one.rates.samples % one.rates.batch == 0
        assert one.shuffle.samples % one.shuffle.batch == 0
        assert all(shards * one.memory.samples % one.memory.batch == 0 for shards in one.memory.shards)
    with pytest.raises(ConfigError, match="--size huge: unknown"):
        sized("huge")


def test_tables():
    rows = [["a", "n"], ["bb", "10"]]
    assert aligned(rows) == "a    n\nbb  10"
    assert markdown(rows) == "| a | n |\n| --- | ---: |\n| bb | 10 |\n"


@pytest.fixture(scope="module")
def result(s3_server):
    """Of the whole benchmark, with webdataset alone, of one kind of samples."""
    url = f"{s3_server.url}/bench-loader"
    open_store(url).write("mine", b"stays")
    memory = PlanSizes((4, 8), samples=256, block_samples=8, batch=8, window=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starts, "RESUMED_AT", (0.0, 0.99))
        patch.setattr(bench, "KINDS", ("text",))
        rivals = WebdatasetAlone()
        found = bench_loader(LoaderBench(2, RATES, SHUFFLE, memory), url, rivals)
    assert set(rivals.programs) == {"ours", "webdataset"}
    assert [entry.name for entry in open_store(url).list()] == ["mine"]
    return json.loads(json.dumps(found, allow_nan=False))


def test_every_figure_follows_from_its_rounds(result):
    for told in (*result["local"]["text"].values(), result["s3"]):
        assert len(told["rounds"]) == 2
        for one in told["rounds"]:
            assert one["ours_over_webdataset"] == pytest.approx(one["webdataset_seconds"] / one["ours_seconds"])
            assert one["ours_over_fastest_peer"] == one["ours_over_webdataset"]
    assert result["local"]["text"]["inprocess"]["median"]["ours_threads_seconds"] > 0
    assert result["s3_over_raw"] == result["s3"]["median"]["ours_over_raw"]
    assert result["s3"]["requests"] > 4
    start = result["start"]["median"]
    assert set(start) == {"0%", "99%"}
    assert 0 < start["0%"]["first_seconds"] < start["0%"]["process_seconds"]
    assert result["resume_over_start"] == start["99%"]["first_seconds"] / start["0%"]["first_seconds"]
    assert result["shuffle"]["held_samples"] == 8 * 12
    assert result["shuffle"]["ours"]["spread"] >= result["shuffle"]["webdataset"]["spread"]
    assert result["peers"]["webdataset"]["versions"]["torch"] == version("torch")


def test_the_page_tells_figures_settings_and_sizes(result):
    text = page(result, "lathe bench loader --size tiny")
    for said in (
        *(f"- {name}: {result[name]:.2f}, to be at least " for name in GOALS),
        f"- start_seconds: {result['start_seconds']:.2f}, to be below 2: ",
        "1,024 samples, shuffled, in batches of 8",
        "(128 samples in each, blocks of 8, window 2)",
        "| 99% |",
        "- samples: shuffle(1000)",
        f"| webdataset | {version('webdataset')} |",
        "\nlathe bench loader --size tiny\n",
    ):
        assert said in text.replace("\n  ", " ")
    assert "{" not in text
    missed = {**result, "inprocess_over_fastest_peer": 4.9, "start_seconds": 2.0}
    assert page(missed, "").count("MISSED") == summary(missed).count("MISSED") >= 2


@pytest.fixture(scope="module")
def everyone(pytestconfig):
    """All peers, most of them in an environment of their own in pytest's cache."""
    return find_rivals(Path(pytestconfig.cache.mkdir("bench-peers")))


@pytest.mark.tools
def test_the_peers_have_our_torch(everyone):
    about = everyone.about()
    assert set(about) == {*HERE, *APART}
    assert {one["versions"]["torch"] for one in about.values()} == {version("torch")}


class ReadHere(NamedTuple):
    """What a peer wrote and read on the local disk."""

    samples: str
    place: Path
    shards: list[int]
    batches: list[list[int]]


@pytest.fixture(scope="module")
def read_here(everyone, tmp_path_factory) -> Callable[[str], ReadHere]:
    """Of each peer once, by one process: importing one takes seconds."""
    folder = tmp_path_factory.mktemp("peers")
    write_samples(folder / "samples", NUMBERS, PEERS_READ)
    moments = np.random.default_rng(0).standard_normal((PEERS_READ, 8, 4, 4)).astype(np.float16)
    np.save(folder / "samples" / "moments.npy", moments)

    @functools.cache
    def told(name: str) -> ReadHere:
        samples, place = str(folder / "samples"), folder / name
        per_shard = 1024 if name == "mosaicml" else 64  # it counts in bytes
        with everyone.peer(name, samples=samples, place=str(place), per_shard=per_shard, workers=1) as peer:
            shards = peer.ask("write")["shards"]
            assert peer.epoch(PEERS_READ)["seconds"] > 0
            return ReadHere(samples, place, shards, peer.ask("order")["batches"])

    return told


@pytest.mark.tools
@pytest.mark.parametrize("name", ["torch_files", "mosaicml", "litdata"])
def test_peers_read_every_sample(read_here, name):
    told = read_here(name)
    assert sum(told.shards) == PEERS_READ
    assert len(told.shards) > 4
    assert sorted(number for batch in told.batches for number in batch) == list(range(PEERS_READ))


@pytest.mark.tools
def test_mosaicml_is_asked_for_its_order(read_here):
    told = read_here("mosaicml")
    assert quality(told.batches, told.shards).spread > 0.5


READ_TWICE = """
import json, sys
import peers
for work in json.loads(sys.argv[1]):
    bench = peers.Bench(peers.Work(**work))
    epochs = [bench.epoch() for _ in range(2)]
    streams = getattr(bench._loader.dataset, "streams", [])
    clients = [str(stream._downloader._s3_client) for stream in streams]
    print("told", json.dumps([work["peer"], clients, epochs]))
    bench.close()
"""


@pytest.mark.tools
@pytest.mark.parametrize("name", ["mosaicml", "litdata"])
def test_peers_read_every_sample_from_s3(everyone, read_here, name, s3_url):
    """mosaicml's workers inherit no connection.

    Two that share one read each other's answers: wrong bytes, `IndexError`, or waits of a minute.
    """
    there = read_here(name)
    assert name not in NOT_FROM_S3
    upload(there.place, open_store(s3_url))
    works = [
        {
            "peer": one,
            "samples": there.samples,
            "place": s3_url,
            "workers": 0 if one in ALONE_ON_S3 else 2,
            "endpoint": endpoint(),
        }
        for one in (name, *(tuned for tuned in TUNED if tuned.startswith(name)))
    ]
    ran = subprocess.run(
        [everyone.pythons[name], "-c", READ_TWICE, json.dumps(works)],
        cwd=Path(peers.__file__).parent,
        check=True,
        capture_output=True,
        text=True,
    )
    told = [json.loads(line.removeprefix("told")) for line in ran.stdout.splitlines() if line.startswith("told")]
    assert [one for one, _, _ in told] == [work["peer"] for work in works]
    for _, clients, epochs in told:
        assert clients == (["None"] if name == "mosaicml" else [])
        assert [epoch["samples"] for epoch in epochs] == [PEERS_READ] * 2
        assert min(epoch["first_seconds"] for epoch in epochs) > 0
