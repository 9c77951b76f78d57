"""A small language for conditions on a JSON object's fields, such as `punsafe < 0.1 and license in ["cc-by", null]`.

    or, and, not, ( )          as in Python
    < <= > >= == !=            numbers with numbers, text with text; chains such as 0 < x <= 1; null with == and != only
    in [...], not in [...]     a list of plain values
    name, a.b, a["b"], a[0]    fields; field("odd name") where a name is no word
    1.5, "text", true, null    values as in JSON; 'text' too

What cannot be said is unknown: a missing field, types that do not compare, NaN. Unknown follows Kleene's three-valued
logic, `not` unknown is unknown, and a condition holds only when it is true. `in` alone is more lenient: of a mixed list
such as ["", 0] only the values count that compare, and it is unknown where none does. Nothing is evaluated by Python
itself.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from pipeline.errors import ConfigError

MAX_LENGTH = 4096  # characters
MAX_DEPTH = 32  # of parentheses and `not`


class _Unknown:
    """What a condition cannot say."""


_UNKNOWN = _Unknown()
_Node = Callable[[Mapping[str, Any]], Any]  # a JSON object to a JSON value or _UNKNOWN

_TOKEN = re.compile(
    r"""(?P<number>-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![\w.]))
    |(?P<text>"(?:[^"\\]|\\["'\\])*"|'(?:[^'\\]|\\["'\\])*')
    |(?P<word>[^\W\d]\w*)
    |(?P<sign><=|>=|==|!=|[<>()\[\],.])""",
    re.VERBOSE,
)
_SPACE = re.compile(r"\s*")
_LOGIC = {"and", "or", "not", "in"}
_VALUES = {"true": True, "false": False, "null": None}
_INSTEAD = {
    "True": "true", "False": "false", "None": "null", "AND": "and", "OR": "or", "NOT": "not", "IN": "in",
    "&": "and", "|": "or", "!": "not", "=": "==", "~": "not",
}  # fmt: skip
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


class Condition:
    """A condition, parsed once.

    Args:
        text: see above; at most 4,096 characters, 32 levels deep.
        setting: the run file's field, for messages.

    Raises:
        ConfigError: the text is no condition; names the character where it stops being one.
    """

    def __init__(self, text: str, setting: str = "images.filters.where") -> None:
        self._node = _Parser(text, setting).parse()

    def holds(self, fields: Mapping[str, Any]) -> bool:
        """Whether the condition is true of a JSON object. Raises nothing, whatever the object holds."""
        return self._node(fields) is True


class _Parser:
    """Recursive descent; each method takes one level of precedence, from the loosest."""

    def __init__(self, text: str, setting: str) -> None:
        self._setting = setting
        if len(text) > MAX_LENGTH:
            self._fail(f"has {len(text)} characters, more than {MAX_LENGTH}")
        self._tokens = self._cut(text)
        self._next = 0
        self._depth = 0

    def parse(self) -> _Node:
        node = self._either()
        if self._kind() != "end":
            self._expected("`and`, `or` or the end")
        return node

    def _either(self) -> _Node:
        parts = [self._both()]
        while self._skip("or"):
            parts.append(self._both())
        return parts[0] if len(parts) == 1 else _any(parts)

    def _both(self) -> _Node:
        parts = [self._negation()]
        while self._skip("and"):
            parts.append(self._negation())
        return parts[0] if len(parts) == 1 else _all(parts)

    def _negation(self) -> _Node:
        if not self._skip("not"):
            return self._comparison()
        self._deeper()
        node = _not(self._negation())
        self._depth -= 1
        return node

    def _comparison(self) -> _Node:
        nodes, signs = [self._operand()], list[str]()
        while self._peek() in _COMPARE and self._kind() == "sign":
            signs.append(self._take())
            nodes.append(self._operand())
        if signs:
            return _chain(nodes, signs)
        if self._skip("in"):
            return _member(nodes[0], self._values())
        if self._skip("not"):
            if not self._skip("in"):
                self._expected("`in` after `not`")
            return _not(_member(nodes[0], self._values()))
        return nodes[0]

    def _operand(self) -> _Node:
        if self._skip("("):
            self._deeper()
            node = self._either()
            self._close(")")
            self._depth -= 1
            return node
        word = self._peek()
        if self._kind() == "word" and word not in _LOGIC and word not in _VALUES:
            return _field(self._path())
        value = self._value("a field, a value or `(`")
        return lambda _: value

    def _path(self) -> list[str | int]:
        path: list[str | int] = [self._take()]
        if path == ["field"] and self._skip("("):
            path = [self._text("a name in quotes")]
            self._close(")")
        while True:
            if self._skip("."):
                if self._kind() != "word":
                    self._expected('a name after `.`; odd ones go in brackets: ["odd name"]')
                path.append(self._take())
            elif self._skip("["):
                path.append(self._index())
                self._close("]")
            else:
                return path

    def _index(self) -> str | int:
        if self._kind() == "number" and self._peek().isdigit():
            return int(self._take())
        return self._text("a name in quotes or a whole number")

    def _values(self) -> list[Any]:
        if not self._skip("["):
            self._expected("`[` after `in`")
        values: list[Any] = []
        while not values or self._skip(","):
            values.append(self._value("a value"))
        self._close("]")
        return values

    def _value(self, what: str) -> Any:
        if self._kind() == "text":
            return self._text(what)
        if self._kind() == "word" and self._peek() in _VALUES:
            return _VALUES[self._take()]
        if self._kind() != "number":
            self._expected(what)
        written = self._peek()
        value = int(written) if written.lstrip("-").isdigit() else float(written)
        if value in (math.inf, -math.inf):
            self._expected("a smaller number")
        self._take()
        return value

    def _text(self, what: str) -> str:
        if self._kind() != "text":
            self._expected(what)
        return re.sub(r"\\(.)", r"\1", self._take()[1:-1])

    def _cut(self, text: str) -> list[tuple[str, str, int]]:
        """Tokens as (kind, text, place), the last of kind `end`."""
        tokens: list[tuple[str, str, int]] = []
        at = _SPACE.match(text).end()  # type: ignore[union-attr]
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                hint = _INSTEAD.get(text[at])
                said = "a quote that is not closed" if text[at] in "\"'" else _shown(text[at : at + 1])
                self._fail(f"cannot read {said}{f', write {hint}' if hint else ''}", at)
            word = found.group()
            if found.lastgroup == "word" and word in _INSTEAD:
                self._fail(f"write {_INSTEAD[word]} instead of {word}", at)
            tokens.append((str(found.lastgroup), word, at))
            at = _SPACE.match(text, found.end()).end()  # type: ignore[union-attr]
        return [*tokens, ("end", "", len(text))]

    def _kind(self) -> str:
        return self._tokens[self._next][0]

    def _peek(self) -> str:
        return self._tokens[self._next][1]

    def _take(self) -> str:
        self._next += 1
        return self._tokens[self._next - 1][1]

    def _skip(self, token: str) -> bool:
        """Take the word or sign if it comes next; text in quotes never equals one."""
        if self._peek() != token or self._kind() == "end":
            return False
        self._next += 1
        return True

    def _close(self, bracket: str) -> None:
        if not self._skip(bracket):
            self._expected(f"`{bracket}`")

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._fail(f"is more than {MAX_DEPTH} levels deep", self._tokens[self._next - 1][2])

    def _expected(self, what: str) -> NoReturn:
        kind, token, place = self._tokens[self._next]
        self._fail(f"expected {what}, found {'the end' if kind == 'end' else _shown(token)}", place)

    def _fail(self, what: str, place: int | None = None) -> NoReturn:
        where = "" if place is None else f" (character {place + 1})"
        raise ConfigError(
            f"{self._setting}: {what}{where}",
            'write it like: punsafe < 0.1 and (license in ["cc-by", "cc0"] or field("odd name") == "yes")',
        )


def _shown(token: str) -> str:
    return ascii(token if len(token) <= 24 else token[:24] + "...")


def _any(parts: Sequence[_Node]) -> _Node:
    def node(fields: Mapping[str, Any]) -> Any:
        values = [part(fields) for part in parts]
        if any(value is True for value in values):
            return True
        return False if all(value is False for value in values) else _UNKNOWN

    return node


def _all(parts: Sequence[_Node]) -> _Node:
    def node(fields: Mapping[str, Any]) -> Any:
        values = [part(fields) for part in parts]
        if any(value is False for value in values):
            return False
        return True if all(value is True for value in values) else _UNKNOWN

    return node


def _not(part: _Node) -> _Node:
    def node(fields: Mapping[str, Any]) -> Any:
        value = part(fields)
        return not value if isinstance(value, bool) else _UNKNOWN

    return node


def _chain(nodes: Sequence[_Node], signs: Sequence[str]) -> _Node:
    def pair(left: _Node, sign: str, right: _Node) -> _Node:
        return lambda fields: _compare(left(fields), sign, right(fields))

    pairs = [pair(left, sign, right) for left, sign, right in zip(nodes, signs, nodes[1:], strict=False)]
    return pairs[0] if len(pairs) == 1 else _all(pairs)


def _member(part: _Node, values: Sequence[Any]) -> _Node:
    def node(fields: Mapping[str, Any]) -> Any:
        value = part(fields)
        equal = [_compare(value, "==", other) for other in values]
        if any(same is True for same in equal):
            return True
        return _UNKNOWN if all(same is _UNKNOWN for same in equal) else False

    return node


def _field(path: Sequence[str | int]) -> _Node:
    def node(fields: Mapping[str, Any]) -> Any:
        value: Any = fields
        for step in path:
            known = (
                step in value if isinstance(value, Mapping) else isinstance(value, list) and step in range(len(value))
            )
            if not known:
                return _UNKNOWN
            value = value[step]
        return value

    return node


def _compare(left: Any, sign: str, right: Any) -> Any:
    """True, False or unknown."""
    if isinstance(left, _Unknown) or isinstance(right, _Unknown):
        return _UNKNOWN
    if left is None or right is None:
        same = left is right
        return {"==": same, "!=": not same}.get(sign, _UNKNOWN)
    kinds = {_kind(left), _kind(right)}
    if len(kinds) > 1 or "" in kinds or (kinds == {"bool"} and sign not in {"==", "!="}):
        return _UNKNOWN
    return _COMPARE[sign](left, right)


def _kind(value: Any) -> str:
    """Empty for what compares with nothing: NaN, lists, objects."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, float) and math.isnan(value):
        return ""
    return "number" if isinstance(value, int | float) else "text" if isinstance(value, str) else ""
