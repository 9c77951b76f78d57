"""Run files and pipelines become stages, which must fit together."""

from __future__ import annotations

import pytest
import yaml

from pipeline import runfile
from pipeline.errors import ConfigError
from pipeline.operate.launch import submissions
from pipeline.operate.launch.stages import read_pipeline


def problem(*arguments: str, **sizes: int) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_pipeline(arguments, **sizes)
    return caught.value


def test_a_pipeline_gives_each_stage_its_run_file_with_root_and_fields(place):
    pipeline = read_pipeline(
        ["pipe line.yaml", "root=s3://b/x", "learn.seed=3", "export.guidance=5", "stages.learn.nodes=2"]
    )
    encode, learn, export = pipeline.stages
    assert (encode.name, encode.command, encode.tasks, encode.at_once) == ("encode", "encode", 8, 3)
    assert (learn.name, learn.command, learn.nodes) == ("learn", "train", 2)
    assert encode.config.output == "s3://b/x/latents"
    assert (learn.config.steps, learn.config.seed, learn.config.optimizer.learning_rate) == (7, 3, 0.5)
    assert export.config.guidance == 5
    assert pipeline.name == "pipe-line"
    assert [(one.name, one.tasks, one.finalizes) for one in pipeline.with_finalizers().stages] == [
        ("encode", 8, False),
        ("encode-finalize", 1, True),
        ("learn", 1, False),
        ("export", 1, False),
    ]
    assert [(one.nodes, one.tasks, one.at_once) for one in pipeline.on_one_machine(2).stages] == [
        (1, 2, 2),
        (1, 1, 1),
        (1, 1, 1),
    ]


def test_run_files_in_a_row_are_a_pipeline_and_one_alone_too(place):
    encode, train = read_pipeline(
        ["encode.yaml", "train.yaml", "root=x", "train.steps=3"], tasks=4, at_once=9, nodes=2
    ).stages
    assert (encode.config.output, train.config.output, train.config.steps) == ("x/latents", "x/run", 3)
    assert (encode.tasks, encode.at_once, train.nodes) == (4, 4, 2)
    (alone,) = read_pipeline(["train.yaml", "unet.norm_num_groups=8", "train.steps=5"]).stages
    assert (alone.config.unet.norm_num_groups, alone.config.steps) == (8, 5)
    again = read_pipeline(["export.yaml", "export.yaml", "export-2.output=other"])
    assert [(one.name, one.config.output) for one in again.stages] == [("export", "r/export"), ("export-2", "other")]


@pytest.mark.parametrize(
    ("arguments", "sizes", "said"),
    [
        (["root=x"], {}, "no run file is given"),
        (["nix.yaml"], {}, "nix.yaml: no such file"),
        (["pipe line.yaml", "train.steps=1"], {}, "train.steps=1: pipe line.yaml has no stage train"),
        (["pipe line.yaml", "learn.stesp=1"], {}, "stesp: unknown field"),
        (["pipe line.yaml", "export.yaml"], {}, "a pipeline beside other files"),
        (["pipe line.yaml", "stages.learn.config=pipe line.yaml"], {}, "stage learn: pipe line.yaml is a pipeline"),
        (["pipe line.yaml", "stages.export.nodes=2"], {}, "stage export: nodes: 2, but lathe export runs alone"),
        (["pipe line.yaml", "stages.learn.tasks=2"], {}, "stage learn: tasks: 2, but lathe train runs alone"),
        (["pipe line.yaml", "stages.learn.at_once=2"], {}, "stage learn: at_once: 2, but lathe train runs alone"),
        (["pipe line.yaml", "stages.learn.nodse=2"], {}, "stages.learn.nodse: unknown field"),
        (["pipe line.yaml", "stages.learn.slurm={partitoin: x}"], {}, "stages.learn.slurm.partitoin: unknown field"),
        (["pipe line.yaml", "stages.Learn={config: x}"], {}, "stages.Learn"),
        (["export.yaml"], {"nodes": 2}, "--nodes: there is no stage that it is of"),
        (
            ["encode.yaml", "train.yaml", "train.root=y"],
            {},
            "stage train: manifest: y/latents/manifest.json, but stage encode writes r/latents/manifest.json",
        ),
        (["train.yaml", "export.yaml", "export.run=x"], {}, "stage export: run: x, but stage train writes r/run"),
        (["encode.yaml", "encode.yaml"], {}, "stages encode and encode-2 both write to"),
        (
            ["encode.yaml", "train.yaml", "encode.text.context_length=9"],
            {},
            "stage train: text.context_length: 77, but stage encode stores captions with text.context_length=9",
        ),
        (
            ["encode.yaml", "train.yaml", "encode.text.mode=online", "encode.text.towers=[{name: a, model: ViT-B-32}]"],
            {},
            "stage train: text.mode: joint, but stage encode stores captions with text.mode=online",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_before_anything_starts(place, arguments, sizes, said):
    assert said in problem(*arguments, **sizes).message


def test_a_value_may_be_longer_than_names_of_files_are(place):
    (stage,) = read_pipeline(["export.yaml", f"output={'x' * 300}"]).stages
    assert stage.config.output == "x" * 300  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="no such submission"):
        submissions.find("x" * 300)
    (place / "pipeline.yaml").write_text(yaml.safe_dump({"job": "launch", "stages": {"a": {"config": "y" * 300}}}))
    with pytest.raises(ConfigError, match="yyy"):
        read_pipeline(["pipeline.yaml"])


def test_names_begin_with_a_letter_whatever_the_file_is_called(place):
    for name, tidy in (("512px", "run-512px"), ("_a B", "a-b"), ("-", "run"), ("a" * 30, "a" * 14)):
        (place / f"{name}.yaml").write_bytes((place / "train.yaml").read_bytes())
        assert read_pipeline([f"./{name}.yaml"]).name == tidy


@pytest.mark.parametrize("name", ["submission", "a-finalize"])
def test_stages_have_no_names_of_files_that_are_there_already(place, name):
    tree = {"job": "launch", "stages": {"a": {"config": "encode.yaml", "tasks": 2}, name: {"config": "export.yaml"}}}
    (place / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=f"{name} is a name that lathe launch uses itself"):
        read_pipeline(["pipeline.yaml"])


def test_typos_are_told_with_the_right_name(place):
    assert problem("pipe line.yaml", "stages.learn.slurm={partitoin: x}").remedy == "did you mean 'partition'?"
    assert "encode, learn, export" in problem("pipe line.yaml", "train.steps=1").remedy


def test_a_checkpoint_and_a_resolution_of_what_is_written_are_read_too(place):
    read_pipeline(["train.yaml", "export.yaml", "export.run=r/run/step-00000100"])
    read_pipeline(["train.yaml", "export.yaml", f"export.run={place}/r/run/"])
    several = "encode.images.resolution=[32, 64]"
    read_pipeline(["encode.yaml", "train.yaml", several, "train.manifest=r/latents/64/manifest.json"])
    assert "writes r/latents/64/manifest.json" in problem("encode.yaml", "train.yaml", several).message


@pytest.mark.parametrize("value", ["2026-11-31", "0b_", "[" * 500])
def test_what_is_no_yaml_after_all(place, value):
    with pytest.raises(ConfigError):
        runfile.load_any("export.yaml", [f"output={value}"])
    (place / "export.yaml").write_text(f"job: export\noutput: {value}\n")
    with pytest.raises(ConfigError):
        runfile.load_any("export.yaml")
