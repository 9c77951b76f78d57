"""A page as a browser would read it, as far as its markup goes."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "img", "input", "br"}


class Reader(HTMLParser):
    """Elements, attributes and text as a browser would see them; fails on elements that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, name):
        return [attributes for element, attributes in self.elements if element == name]
