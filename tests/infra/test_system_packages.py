"""What `make test` gets from apt: what is there is left alone, what fails is told, and nothing fails with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from infra import system_packages

ALL = ("prometheus", "promtool", "pushgateway", "alertmanager", "amtool")
PACKAGE = """#!/bin/sh
# stands for apt-get: a package is a folder's list of programs
echo "$*" >> {log}
case "$*" in
  *download*) for name in prometheus prometheus-pushgateway prometheus-alertmanager; do : > $name.deb; done ;;
esac
exit {code}
"""
OF_SLURM = """#!/bin/sh
# stands for dpkg-deb --extract ARCHIVE ROOT, of SLURM's packages and munge
mkdir -p $3/usr/bin $3/usr/sbin $3/usr/lib/riscv64-linux-gnu/slurm-wlm
for name in bin/sbatch bin/srun bin/scontrol bin/scancel bin/squeue \\
  sbin/munged sbin/slurmctld-wlm sbin/slurmd-wlm sbin/slurmstepd-wlm; do
  echo '#!/bin/sh' > $3/usr/$name && chmod +x $3/usr/$name
done
touch $3/usr/lib/riscv64-linux-gnu/libmunge.so.2.0.0 $3/usr/lib/riscv64-linux-gnu/slurm-wlm/hash_k12.so
ln -sf libmunge.so.2.0.0 $3/usr/lib/riscv64-linux-gnu/libmunge.so.2
"""
UNPACK = """#!/bin/sh
# stands for dpkg-deb --extract ARCHIVE ROOT
mkdir -p $3/usr/bin $3{templates}
for name in prometheus promtool prometheus-pushgateway prometheus-alertmanager amtool; do
  echo '#!/bin/sh' > $3/usr/bin/$name && chmod +x $3/usr/bin/$name
done
touch $3{templates}/default.tmpl $3{templates}/email.tmpl
"""


def script(file: Path, content: str) -> None:
    file.write_text(content)
    file.chmod(0o755)


class Machine:
    """A machine with an apt-get, a dpkg-deb and nothing else of what is looked for."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
        self.bin, self.log, self.templates = place / "bin", place / "log", place / "templates"
        self.bin.mkdir()
        script(self.bin / "apt-get", PACKAGE.format(log=self.log, code=code))
        script(self.bin / "dpkg-deb", UNPACK.format(templates=self.templates))
        for tool in ("mkdir", "chmod", "touch", "ln", "sh"):
            (self.bin / tool).symlink_to(next(p for p in (Path("/bin") / tool, Path("/usr/bin") / tool) if p.exists()))
        fixed = tuple(self.templates / name for name in ("default.tmpl", "email.tmpl"))
        *others, alertmanager = system_packages.UNPACKED["prometheus"]
        servers = (*others, alertmanager._replace(fixed=fixed))
        monkeypatch.setattr(system_packages, "UNPACKED", {"prometheus": servers})
        monkeypatch.setattr(system_packages, "GROUPS", {"prometheus": servers} | system_packages.INSTALLED)
        monkeypatch.setattr(system_packages, "FOLDER", place / "system")
        monkeypatch.setattr(system_packages, "LIBRARIES", place / "system" / "lib")
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setenv("PATH", str(self.bin))

    def asked(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [next(word for word in line.split() if word in ("update", "download", "install")) for line in lines]


def test_servers_are_unpacked_once_and_not_installed(tmp_path, monkeypatch, capsys):
    machine = Machine(tmp_path, monkeypatch)
    assert system_packages.main(["prometheus"]) == 0
    assert machine.asked() == ["update", "download"]
    assert system_packages.missing("prometheus") == []
    assert {system_packages.program(name) is not None for name in ALL} == {True}
    assert (machine.templates / "default.tmpl").exists()
    assert system_packages.main(["prometheus"]) == 0
    assert machine.asked() == ["update", "download"]
    assert "not to be had" not in capsys.readouterr().out


def test_libraries_are_unpacked_beside_the_programs_that_need_them(tmp_path, monkeypatch):
    slurm = system_packages.UNPACKED["slurm"]
    machine = Machine(tmp_path, monkeypatch)
    script(machine.bin / "dpkg-deb", OF_SLURM)
    monkeypatch.setattr(system_packages, "UNPACKED", {"slurm": slurm})
    monkeypatch.setattr(system_packages, "GROUPS", {"slurm": slurm})
    assert system_packages.main(["slurm"]) == 0
    downloaded = machine.log.read_text().splitlines()[-1].split()
    assert {"munge", "slurmctld", "slurmd", "slurm-client"} < set(downloaded)
    assert downloaded.count("libmunge2") == 1
    assert system_packages.missing("slurm") == []
    assert Path(system_packages.program("slurmstepd") or "").name == "slurmstepd-wlm"
    assert (system_packages.LIBRARIES / "slurm-wlm" / "hash_k12.so").exists()
    assert (system_packages.LIBRARIES / "libmunge.so.2").is_symlink()
    assert system_packages.main(["slurm"]) == 0
    assert machine.asked() == ["update", "download"]
    (system_packages.FOLDER / "bin" / "srun").unlink()
    assert system_packages.main(["slurm"]) == 0
    assert system_packages.missing("slurm") == []


def test_what_is_on_the_path_is_taken_without_debians_files(tmp_path, monkeypatch):
    machine = Machine(tmp_path, monkeypatch)
    for name in ALL:
        script(machine.bin / name, "#!/bin/sh\n")
    assert system_packages.main(["prometheus"]) == 0
    assert machine.asked() == []


def test_a_group_that_cannot_be_had_is_in_nobody_elses_way(tmp_path, monkeypatch, capsys):
    slurm = system_packages.UNPACKED["slurm"]
    machine = Machine(tmp_path, monkeypatch)
    code = "$(case $* in *slurm*) echo 100 ;; *) echo 0 ;; esac)"
    script(machine.bin / "apt-get", PACKAGE.format(log=machine.log, code=code))
    both = {"slurm": slurm, **system_packages.UNPACKED}
    monkeypatch.setattr(system_packages, "UNPACKED", both)
    monkeypatch.setattr(system_packages, "GROUPS", both)
    assert system_packages.main([]) == 0
    assert system_packages.missing("prometheus") == []
    assert "not to be had: munged, slurmctld" in capsys.readouterr().out


def test_packages_that_cannot_be_fetched_are_told(tmp_path, monkeypatch, capsys):
    Machine(tmp_path, monkeypatch, code=100)
    assert system_packages.main(["prometheus"]) == 0
    said = capsys.readouterr().out
    assert "not to be had: prometheus, promtool, pushgateway" in said
    assert "apt-get ended with exit code 100" in said


def test_a_machine_without_apt_is_told(tmp_path, monkeypatch, capsys):
    machine = Machine(tmp_path, monkeypatch)
    (machine.bin / "apt-get").unlink()
    assert system_packages.main([]) == 0
    assert "no apt-get here" in capsys.readouterr().out


def test_browsers_are_installed_by_root_alone(tmp_path, monkeypatch, capsys):
    machine = Machine(tmp_path, monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert system_packages.main(["browser"]) == 0
    assert "only root installs packages" in capsys.readouterr().out
    assert machine.asked() == []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert system_packages.main(["browser"]) == 0
    assert machine.asked() == ["update", "install"]


def test_templates_that_cannot_be_put_in_place_count_as_missing(tmp_path, monkeypatch, capsys):
    machine = Machine(tmp_path, monkeypatch)
    machine.templates.write_text("a file where the folder should be")
    assert system_packages.main(["prometheus"]) == 0
    assert "not to be had" in capsys.readouterr().out
    assert system_packages.missing("prometheus")


def test_a_group_that_is_none(capsys):
    assert system_packages.main(["grafana"]) == 2
    assert "no such group" in capsys.readouterr().err
