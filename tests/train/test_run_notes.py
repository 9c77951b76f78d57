"""What a run notes of its starts."""

from __future__ import annotations

import json

import pytest
import torch

from pipeline import runfile
from pipeline.config import FirstStageConfig
from pipeline.errors import StorageError
from pipeline.storage import open_store
from pipeline.train import run_notes
from pipeline.train.run_notes import RUN_FILE, STARTS, note_start, read_starts

CONFIG = FirstStageConfig.model_validate({"output": "out", "images": {"shards": "images", "resolution": 64}})
CPU = torch.device("cpu")


def test_each_start_is_noted_with_versions_and_hardware(tmp_path):
    store = open_store(str(tmp_path))
    assert read_starts(store) == []
    for step in (0, 40):
        note_start(store, CONFIG, CPU, step=step, world_size=2)
    first, second = read_starts(store)
    assert (first["step"], second["step"], second["world_size"], second["device"]) == (0, 40, 2, "cpu")
    assert second["versions"].keys() >= {"lathe", "python", "torch"}
    assert second["hardware"]["cores"] >= 1
    assert len(store.read(STARTS).splitlines()) == 4
    assert runfile.load(FirstStageConfig, str(tmp_path / RUN_FILE)) == CONFIG


def test_only_the_last_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(run_notes, "_KEPT", 2)
    store = open_store(str(tmp_path))
    for step in range(4):
        note_start(store, CONFIG, CPU, step=step)
    assert [start["step"] for start in read_starts(store)] == [2, 3]


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff", b"[" * 100_000])
def test_notes_that_cannot_be_understood_are_begun_anew_and_it_is_said(tmp_path, content, capsys):
    store = open_store(str(tmp_path))
    store.write(STARTS, content)
    note_start(store, CONFIG, CPU, step=7)
    assert [start["step"] for start in json.loads(store.read(STARTS))] == [7]
    assert capsys.readouterr().err == f"{tmp_path}/starts.json is damaged: the starts before this one are lost\n"


def test_a_store_that_refuses_stops_no_training(tmp_path, monkeypatch, capsys):
    store = open_store(str(tmp_path))

    def refuse(*_: object) -> None:
        raise StorageError("the disk is full", "make room")

    monkeypatch.setattr(type(store), "write", refuse)
    note_start(store, CONFIG, CPU, step=0)
    assert capsys.readouterr().err == "this start could not be noted: the disk is full\n"
