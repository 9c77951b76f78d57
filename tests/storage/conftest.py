from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.storage import Store, open_store


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "a/b") if request.param == "folder" else request.getfixturevalue("s3_url"))
