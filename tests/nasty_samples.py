"""Nasty samples of a whole image shard, each with what must become of it: captions and keys.

A picture that is used shows a scene: what is stored must be the latent of that scene, upright.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from picture_files import file, quarters
from PIL import Image

from pipeline.data.images import Pixels

HEIGHT, WIDTH = 48, 80


@dataclass(frozen=True)
class Used:
    """A sample that must be encoded."""

    pixels: Pixels  # of its picture, upright, [H, W, 3]
    captions: tuple[str, ...] = ("a cat",)
    lossy: bool = False  # the format, or its way to RGB, moves the pixels by a few levels


Outcome = Used | str | None  # or the reason of the reject; None: such names are no sample's, for webdataset neither


@dataclass(frozen=True)
class Sample:
    """One case: files that stand together in an image shard, and what must become of them."""

    key: str
    files: tuple[tuple[str, bytes], ...]  # names and contents
    outcome: Outcome


SCENE = np.asarray(quarters().resize((WIDTH, HEIGHT), Image.Resampling.NEAREST))
OTHER = np.ascontiguousarray(SCENE[:, ::-1])  # of frames, pages and twins that must not count
PLAIN = Used(SCENE)
_png, _other_png, _jpeg = (
    file(Image.fromarray(SCENE)),
    file(Image.fromarray(OTHER)),
    file(Image.fromarray(SCENE), "JPEG"),
)


def _said(*captions: str) -> Used:
    return Used(SCENE, captions)


_LETTERS = "".join(np.random.default_rng(1).choice(list("abcdefghijklmnopqrstuvwxyz"), 65_536))
_MANY = "Ünïcode, 猫 🐈\u200d⬛, مرحبا \u202e and U+10FFFF \U0010ffff"

_TEXTS: list[tuple[str, bytes | None, bytes | None, Outcome]] = [
    # KEY.txt, KEY.json
    ("no-caption", None, None, "no_caption"),
    ("empty-caption", b"", None, "no_caption"),
    ("blank-caption", b" \r\n\t\xc2\xa0 ", None, "no_caption"),
    ("latin-1", b"caf\xe9", None, "caption_not_utf8"),
    ("utf-16", "a cat".encode("utf-16"), None, "caption_not_utf8"),
    ("a-megabyte", b"cat " * (1 << 18), None, "caption_too_long"),
    ("as-long-as-may-be", _LETTERS.encode(), None, _said(_LETTERS)),
    ("one-letter", b"x", None, "filtered_caption"),
    ("zero-byte", b"a\0cat", None, _said("a\0cat")),
    ("byte-order-mark", b"\xef\xbb\xbfa cat", None, PLAIN),
    ("two-lines", b"a cat\r\non a mat\r\n", None, _said("a cat\r\non a mat")),
    ("every-script", _MANY.encode(), None, _said(_MANY)),
    ("text-before-json", b"a cat", b'{"caption": "a dog"}', PLAIN),
    ("several-captions", None, b'{"caption": ["a cat", " ", 3, null, "two cats "]}', _said("a cat", "two cats")),
    ("too-many-captions", None, json.dumps({"caption": ["a cat"] * 257}).encode(), "too_many_captions"),
    ("json-no-object", None, b'["a cat"]', "metadata_not_json"),
    ("json-broken", b"a cat", b'{"caption": "a cat"', "metadata_not_json"),
    ("json-empty", b"a cat", b"", "metadata_not_json"),
    ("json-deep", b"a cat", b'{"a": ' + b"[" * 100_000, "metadata_not_json"),
    ("json-long-number", b"a cat", b'{"a": ' + b"9" * 5000 + b"}", "metadata_not_json"),
    ("json-nan", None, b'{"caption": "a cat", "similarity": NaN, "width": -Infinity, "height": 1e999}', PLAIN),
    ("json-caption-nan", None, b'{"caption": NaN}', "no_caption"),
    ("json-caption-object", None, b'{"caption": {"en": "a cat"}}', "no_caption"),
    ("json-half-a-character", None, b'{"caption": "\\ud800"}', "caption_not_utf8"),
    ("json-zero-byte", None, b'{"caption": "a\\u0000cat"}', _said("a\0cat")),
    ("json-byte-order-mark", None, b'\xef\xbb\xbf{"caption": "a cat"}', PLAIN),
    ("json-9-mb", b"a cat", b'{"a": "' + b"x" * (9 << 20) + b'"}', "file_too_large"),
]
TEXTS = [
    Sample(
        key,
        (
            (f"{key}.png", _png),
            *(((f"{key}.txt", text),) if text is not None else ()),
            *(((f"{key}.json", about),) if about is not None else ()),
        ),
        outcome,
    )
    for key, text, about, outcome in _TEXTS
]


def sample(key: str, outcome: Outcome = PLAIN) -> Sample:
    """The scene under this key, with its caption."""
    return Sample(key, ((f"{key}.png", _png), (f"{key}.txt", b"a cat")), outcome)


KEYS = [
    *(
        sample(key, "unsafe_key")
        for key in ("../../x", "/etc/x", "a/../x", "a\0b/é", "x\ny", "x\ty", "x\x7fy", "x\udce9", "a\udcff/x")
    ),
    *(
        sample(key)
        for key in (
            "./here",
            "v1.5/a.b/x",
            ".hidden/x",
            "__x",
            "Case",
            "case",
            "a b'c\"$(x) %s;*?&",
            "-rf",
            "é",
            "e\u0301",
            "🐈\u200d⬛",
            "x\u2028y",
            "n" * 150,
            "n" * 300,
            "folder/" * 60 + "x",
            "é" * 500,
        )
    ),
    *(sample(key, "key_too_long") for key in ("k" * 1001, "é" * 501)),
    *(sample(key, None) for key in ("photo.1", "v1.5/photo.final", "._x", "a/.x", "__MACOSX/._x", "__meta__/x", "")),
    Sample("no-picture", (("no-picture.txt", b"a cat"),), "no_image"),
    Sample("mask-alone", (("mask-alone.mask.png", _png), ("mask-alone.txt", b"a cat")), "no_image"),
    Sample(
        "two-pictures",
        (("two-pictures.png", _png), ("two-pictures.jpg", _jpeg), ("two-pictures.txt", b"a cat")),
        "several_images",
    ),
    Sample(
        "member-twice",
        (("member-twice.png", _png), ("member-twice.png", _other_png), ("member-twice.txt", b"a cat")),
        "duplicate_member",
    ),
    Sample(
        "case-twice",
        (("case-twice.png", _png), ("case-twice.PNG", _other_png), ("case-twice.txt", b"a cat")),
        "duplicate_member",
    ),
    sample("comes-back"),
    Sample(
        "others", (("others.txt", b"a cat"), ("others.cls", b"3"), ("others.png", _png), ("README", b"about")), PLAIN
    ),
    Sample("comes-back", (("comes-back.png", _other_png), ("comes-back.txt", b"a dog")), "duplicate_key"),
]
