"""HTML that is escaped by construction: what is not `Html` already becomes text."""

from __future__ import annotations

import base64
import html
from typing import Union

from pipeline.data.images import Pixels, png


class Html(str):
    """Markup, as opposed to text that looks like it."""

    __slots__ = ()


Content = Union[str, Html, None]  # noqa: UP007
Attribute = Union[str, int, float, None]  # noqa: UP007
_VOID = frozenset(["br", "img", "input", "meta", "rect", "line", "path", "circle"])


def tag(name: str, /, *content: Content, **attributes: Attribute) -> Html:
    """An element. None is left out; `class_` is `class`, `data_x` is `data-x`."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{written}>" if name in ("br", "img", "input", "meta") else f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(*content)}</{name}>")


def join(*content: Content) -> Html:
    """Contents one after another; text is escaped, None left out."""
    return Html("".join(c if isinstance(c, Html) else _escaped(c) for c in content if c is not None))


def image(pixels: Pixels, alt: str, scale: int = 2) -> Html:
    """A picture inside the page, each of its pixels `scale` CSS pixels wide."""
    height, width = pixels.shape[:2]
    return tag("img", src=data_url(png(pixels), "png"), alt=alt, width=width * scale, height=height * scale)


def _escaped(text: str) -> str:
    r"""As markup has it; bytes of a name that are no UTF-8, which Python has as halves of characters, as `\udce9`."""
    return html.escape(text.encode("utf-8", "backslashreplace").decode())


def data_url(file: bytes, kind: str) -> str:
    """A picture file of a kind that browsers know, as an address."""
    return f"data:image/{kind};base64,{base64.b64encode(file).decode('ascii')}"
