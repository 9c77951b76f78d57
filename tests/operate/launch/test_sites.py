"""What a cluster wants of every job: found, and checked."""

from __future__ import annotations

import pytest

from pipeline import runfile
from pipeline.config import SiteConfig
from pipeline.errors import ConfigError
from pipeline.operate.launch.sites import find_site


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slurm: {partiton: x}", "slurm.partiton: unknown field"),
        ("slurm: {time: 12:00:00}", "slurm.time: write it in quotes"),
        ('slurm: {time: "1h"}', "slurm.time: no time of SLURM"),
        ('slurm: {partition: "a\\n#SBATCH --uid=0"}', "slurm.partition: Input should be one word"),
        ('slurm: {constraint: "a b"}', "slurm.constraint: Input should be one word"),
        ("slurm: {memory: lots}", "slurm.memory: no memory"),
        ("slurm: {signal_seconds: 0}", "slurm.signal_seconds"),
        ('slurm: {extra: ["--x\\n--y"]}', "slurm.extra.0: write --NAME"),
        ("slurm: {extra: [--array=1-2]}", "slurm.extra.0: --array is set by lathe launch itself"),
        ("slurm: {extra: [--job-n=x]}", "slurm.extra.0: --job-name is set by lathe launch itself; leave --job-n out"),
        ("slurm: {extra: [exclusive]}", "slurm.extra.0: write --NAME"),
        ("slurm_by_command: {encode: {qso: x}}", "slurm_by_command.encode.qso: unknown field"),
        ("environment: {AWS_SECRET_ACCESS_KEY: x}", "AWS_SECRET_ACCESS_KEY: scripts that hold it are kept"),
        ("environment: {A-B: x}", "'A-B' is no name of a variable"),
        ("environment: {DEBUG: yes}", "environment.DEBUG"),
        ("environment: {NODE_RANK: 1}", "NODE_RANK: the launchers set it"),
        ("environment: {PYTHON: x}", "PYTHON: set the field python instead"),
        ("container: {runtime: pyxis}", "container.image: missing"),
        ("modules: [a b]", "modules.0"),
        ("kubernetes: {memory: 16GB}", "kubernetes.memory"),
        ("kubernetes_by_command: {train: {context: x}}", "train.context: it is one for all stages"),
        ("kubernetes_by_command: {export: {cache_size: lots}}", "kubernetes_by_command.export.cache_size"),
    ],
)
def test_a_sites_mistakes_are_told_with_their_field(tmp_path, text, said):
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        find_site(file)
    assert said in caught.value.message
    assert str(file) in caught.value.message


@pytest.mark.parametrize("given", ["~/python", "$HOME/python", "/opt/${VERSION}/python"])
def test_what_a_shell_would_replace_is_no_interpreter(given):
    with pytest.raises(ValueError, match="write the whole path out"):
        SiteConfig.model_validate({"python": given})


def test_where_a_site_is_found(tmp_path):
    assert find_site(None, {"XDG_CONFIG_HOME": str(tmp_path)}) == SiteConfig()
    (tmp_path / "lathe").mkdir()
    for name, partition in (("lathe/site.yaml", "usual"), ("b.yaml", "named"), ("c.yaml", "given")):
        (tmp_path / name).write_text(f"slurm: {{partition: {partition}}}")
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert find_site(None, environment).slurm.partition == "usual"
    environment["LATHE_SITE"] = str(tmp_path / "b.yaml")
    assert find_site(None, environment).slurm.partition == "named"
    assert find_site(tmp_path / "c.yaml", environment).slurm.partition == "given"
    with pytest.raises(ConfigError, match="LATHE_SITE: nix: no such file"):
        find_site(None, {"LATHE_SITE": "nix"})


def test_a_home_that_cannot_be_looked_into_has_no_site():
    assert find_site(None, {"XDG_CONFIG_HOME": "x" * 300}) == SiteConfig()


def test_the_example_site_is_valid():
    example = runfile.load_settings(SiteConfig, "configs/site.example.yaml")
    assert set(example.model_fields_set) == set(SiteConfig.model_fields)
