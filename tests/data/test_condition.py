from __future__ import annotations

import ast
import json
import math
import operator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import condition
from pipeline.data.condition import MAX_DEPTH, MAX_LENGTH, Condition
from pipeline.errors import ConfigError

FIELDS = {
    "n": 1,
    "x": 0.5,
    "s": "cc-by",
    "yes": True,
    "no": False,
    "nothing": None,
    "odd name": 3,
    "a.b": "flat",
    "a": {"b": {"c": [10, {"d": "deep"}]}, "in": 2, "odd name": 4},
    "list": [1, 2],
    "nan": math.nan,
    "inf": math.inf,
    "huge": 10**400,
    "größe": 7,
    "field": 8,
}


@pytest.mark.parametrize(
    "text",
    [
        "n == 1",
        "n == 1.0",
        "n < 2",
        "n <= 1",
        "x > 0.25 and x < 1",
        "0 < x <= 0.5 < n",
        "0.5e0 == x",
        "x > -1",
        "n != 2",
        "s == 'cc-by'",
        's == "cc-by"',
        's in ["cc-by", "cc0"]',
        "s in ['cc0', null, 'cc-by', 3]",
        "s not in ['cc0', 3]",
        "not s in ['cc0']",
        "n in [1]",
        "'a' < s < 'd'",
        "yes",
        "not no",
        "yes == true",
        "no != yes",
        "nothing == null",
        "n != null",
        "list != null",
        "nothing in [null]",
        "n not in [null]",
        "(n > 5 or x < 1) and yes",
        "n > 5 and n > 6 or yes",
        "yes or n > 5 and n > 6",
        "not (n > 5)",
        "not not yes",
        "not n > 5",
        "(n < 2) == true",
        'field("odd name") == 3',
        "field('a.b') == 'flat'",
        "field == 8",
        'a["odd name"] == 4',
        "a.in == 2",
        "a.b.c[0] == 10",
        "a.b.c[1].d == 'deep'",
        'a["b"]["c"][1]["d"] == "deep"',
        "größe == 7",
        "huge > 1e300",
        "huge < inf",
        "missing < 1 or yes",
        "yes or missing < 1",
        "not (missing < 1 and no)",
        "  n\n==\t1 ",
        r"'a\'b\\' != s",
        "1 < 2",
    ],
)
def test_true(text):
    assert Condition(text).holds(FIELDS)


@pytest.mark.parametrize(
    "text",
    [
        "n == 2",
        "n > 1",
        "0 < x < 0.25",
        "s == 'CC-BY'",
        "s in ['cc0']",
        "s not in ['cc-by']",
        "nothing != null",
        "n == null",
        "no",
        "not yes",
        "x > 0.25 and n > 1",
        "n > 1 or x > 1",
        "yes and missing == 1",
    ],
)
def test_false(text):
    assert not Condition(text).holds(FIELDS)


@pytest.mark.parametrize(
    "text",
    [
        "missing",
        "missing == 1",
        "missing != 1",
        "missing == null",
        "missing in [1]",
        "a.missing == 1",
        "n.b == 1",
        "list[2] == 1",
        "list['0'] == 1",
        "a[0] == 1",
        "s[0] == 'c'",
        "n < 'a'",
        "n == 'a'",
        "n != 'a'",
        "yes == 1",
        "yes < true",
        "nothing < 1",
        "s in [1, 2]",
        "n",
        "s",
        "list == 1",
        "a != 1",
        "nan < 1",
        "nan != 1",
        "nan == nan",
        "1 < n < 'a' or missing == 1",
        "no or missing == 1",
        "yes and missing == 1",
    ],
)
def test_unknown_leaves_out_also_under_not(text):
    assert not Condition(text).holds(FIELDS)
    assert not Condition(f"not ({text})").holds(FIELDS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a field, a value or `(`, found the end (character 1)"),
        ("n <", "found the end (character 4)"),
        ("n < 1 1", "expected `and`, `or` or the end, found '1' (character 7)"),
        ("n = 1", "cannot read '=', write == (character 3)"),
        ("n & 1", "write and (character 3)"),
        ("!n", "write not (character 1)"),
        ("n AND s", "write and instead of AND (character 3)"),
        ("n == True", "write true instead of True (character 6)"),
        ("(n == 1", "expected `)`, found the end (character 8)"),
        ("n == 'a", "cannot read a quote that is not closed (character 6)"),
        (r"n == 'a\n'", "cannot read a quote that is not closed (character 6)"),
        ("n in s", "expected `[` after `in`, found 's' (character 6)"),
        ("n in []", "expected a value, found ']' (character 7)"),
        ("n in [1", "expected `]`, found the end (character 8)"),
        ("n in [s]", "expected a value, found 's' (character 7)"),
        ("n not 1", "expected `in` after `not`, found '1' (character 7)"),
        ("a.", "expected a name after `.`"),
        ("a.'b'", "expected a name after `.`"),
        ("a[b]", "expected a name in quotes or a whole number, found 'b' (character 3)"),
        ("a[-1]", "found '-1' (character 3)"),
        ("field(a)", "expected a name in quotes, found 'a' (character 7)"),
        ("1e999 > n", "expected a smaller number, found '1e999' (character 1)"),
        ("n == 1.", "cannot read '1' (character 6)"),
        ("n == 0x10", "cannot read '0' (character 6)"),
        ("n == 1\0", "cannot read '\\x00' (character 7)"),
        ("n == \ud800", "cannot read '\\ud800' (character 6)"),
        ("n == 1 # why", "cannot read '#' (character 8)"),
        ("__import__('os')", "found '(' (character 11)"),
        ("n.__class__ == 1 and [1]", "found '[' (character 22)"),
        ("x" * 5000, "has 5000 characters, more than 4096"),
        ("(" * 2000, "is more than 32 levels deep (character 33)"),
        ("not " * 1000 + "n", "is more than 32 levels deep (character 129)"),
    ],
)
def test_what_is_no_condition_is_told_with_its_place(text, said):
    with pytest.raises(ConfigError) as caught:
        Condition(text)
    assert caught.value.message.startswith("images.filters.where: ")
    assert said in caught.value.message
    assert "punsafe < 0.1" in caught.value.remedy
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200


def test_the_limits_themselves_are_allowed():
    deep = "(" * MAX_DEPTH + "n == 1" + ")" * MAX_DEPTH
    assert Condition(deep).holds(FIELDS)
    long = "n == 1" + " or n == 1" * ((MAX_LENGTH - 6) // 10)
    assert Condition(long.ljust(MAX_LENGTH)).holds(FIELDS)
    assert Condition("n" + " < 9" * 1000).holds(FIELDS) is False
    assert Condition("n < " + "9" * 4000).holds(FIELDS)


PIECES = ["and", "or", "not", "in", "(", ")", "[", "]", ",", ".", "<", "==", "n", "a", "field", "true", "1", "'t'", " "]


@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=40).map(" ".join)))
@settings(max_examples=150)
def test_any_text_is_a_condition_or_a_config_error(text):
    try:
        condition = Condition(text)
    except ConfigError:
        return
    assert condition.holds(FIELDS) in {True, False}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abn"), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from("abn"), JSON, max_size=3))
def test_no_object_makes_it_fail(fields):
    text = "a < 1 and b.a == 'x' or not (n[0] in [1, 'a', null] or a != null) or a.b.n <= b == n"
    assert Condition(text).holds(fields) in {True, False}


# An independent evaluation: trees of tuples, three values as 1, 0 and one half, Kleene's `and` and `or` as min and max.

HALF = 0.5
OPERATORS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
LITERALS = st.one_of(
    st.integers(-3, 3), st.sampled_from([0.5, -1.25, 2.0]), st.sampled_from(["", "a", "b'", 'c"', "ü\\"]), st.booleans()
) | st.just(None)
OPERANDS = st.one_of(
    st.tuples(st.just("literal"), LITERALS),
    st.tuples(st.just("field"), st.sampled_from(["a", "b", "odd name", "gone"])),
)
LEAVES = st.one_of(
    st.tuples(st.just("compare"), OPERANDS, st.sampled_from(sorted(OPERATORS)), OPERANDS),
    st.tuples(st.just("in"), OPERANDS, st.lists(LITERALS, min_size=1, max_size=3)),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.just("not"), inner),
        st.tuples(st.just("and"), inner, inner),
        st.tuples(st.just("or"), inner, inner),
    ),
    max_leaves=12,
)


def literal(value):
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return json.dumps(value)


def written(tree) -> str:
    kind, *parts = tree
    if kind == "literal":
        return literal(parts[0])
    if kind == "field":
        return parts[0] if parts[0].isidentifier() else f'field("{parts[0]}")'
    if kind == "compare":
        return f"{written(parts[0])} {parts[1]} {written(parts[2])}"
    if kind == "in":
        return f"{written(parts[0])} in [{', '.join(map(literal, parts[1]))}]"
    if kind == "not":
        return f"not ({written(parts[0])})"
    return f"({written(parts[0])}) {kind} ({written(parts[1])})"


def compared(left, sign, right) -> float:
    if left == "GONE" or right == "GONE":
        return HALF
    if left is None or right is None:
        return HALF if sign not in {"==", "!="} else float((left is right) == (sign == "=="))
    if isinstance(left, bool) and isinstance(right, bool):
        return HALF if sign not in {"==", "!="} else float(OPERATORS[sign](left, right))
    numbers = all(type(value) in {int, float} for value in (left, right))
    texts = all(type(value) is str for value in (left, right))
    return float(OPERATORS[sign](left, right)) if numbers or texts else HALF


def test_of_a_mixed_list_only_what_compares_counts():
    assert "of a mixed list" in " ".join((condition.__doc__ or "").split())
    for text, outcome in (("n in ['', 1]", True), ("n not in ['', 0]", True), ("n not in ['', 'a']", False)):
        assert Condition(text).holds(FIELDS) is outcome, text


def truth(tree, fields) -> float:
    kind, *parts = tree

    def value(operand):
        return operand[1] if operand[0] == "literal" else fields.get(operand[1], "GONE")

    if kind == "compare":
        return compared(value(parts[0]), parts[1], value(parts[2]))
    if kind == "in":
        same = [compared(value(parts[0]), "==", other) for other in parts[1]]
        return 1.0 if 1.0 in same else 0.0 if 0.0 in same else HALF
    if kind == "not":
        return 1 - truth(parts[0], fields)
    return (min if kind == "and" else max)(truth(parts[0], fields), truth(parts[1], fields))


@given(TREES, st.dictionaries(st.sampled_from(["a", "b", "odd name"]), LITERALS))
@settings(max_examples=150)
def test_it_says_what_an_independent_evaluation_says(tree, fields):
    assert Condition(written(tree)).holds(fields) == (truth(tree, fields) == 1)
    assert Condition(f"not ({written(tree)})").holds(fields) == (truth(tree, fields) == 0)


WORDS = st.lists(st.sampled_from(["a", "b", "not", "and", "or"]), min_size=1, max_size=9)


def python(node: ast.expr, fields) -> bool:
    if isinstance(node, ast.BoolOp):
        values = [python(part, fields) for part in node.values]
        return all(values) if isinstance(node.op, ast.And) else any(values)
    return not python(node.operand, fields) if isinstance(node, ast.UnaryOp) else fields[node.id]


@given(WORDS, st.fixed_dictionaries({"a": st.booleans(), "b": st.booleans()}))
def test_precedence_is_pythons(words, fields):
    text = " ".join(words)
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        with pytest.raises(ConfigError):
            Condition(text)
        return
    assert Condition(text).holds(fields) == python(tree, fields)
