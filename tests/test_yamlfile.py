"""Reading YAML 1.2 with places, under limits; and writing what is read back equal."""

import math
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import ConfigError, InputMissing
from harness.yamlfile import MAX_BYTES, MAX_DEPTH, Node, dump, merge, parse, read, scalar


def plain(node: Node):
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "f")
    return [str(mistake) for mistake in caught.value.mistakes]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e5", 1e5),
        ("+5", 5),
        ("-0", 0),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.5e3", -500.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("y", "y"),
        ("10m", "10m"),
        ("1:30:00", "1:30:00"),
        ("1_000", "1_000"),
        ("2020-01-01", "2020-01-01"),
        ("0b1", "0b1"),
        ("e5", "e5"),
        (".", "."),
        ("1e", "1e"),
        ("0x", "0x"),
        ("١", "١"),
    ],
)
def test_scalars_of_yaml_1_2(text, value):
    read_back = scalar(text)
    assert read_back == value and type(read_back) is type(value)
    in_file = parse(f"key: {text}", "f").value["key"].value
    assert in_file == value and type(in_file) is type(value)


def test_nan():
    assert math.isnan(scalar(".nan"))


def test_quoted_is_text_and_so_is_what_a_1_1_directive_says():
    assert plain(parse("a: '5'\nb: \"true\"\nc: |\n  1\n", "f")) == {"a": "5", "b": "true", "c": "1\n"}
    assert plain(parse("%YAML 1.1\n---\na: no\nb: 010\n", "f")) == {"a": "no", "b": 10}


def test_explicit_core_tags():
    assert plain(parse("a: !!str 5\nb: !!int 5\nc: ! 5\n", "f")) == {"a": "5", "b": 5, "c": "5"}


def test_places():
    node = parse("a: 1\nb:\n  c:\n    - x\n    - y\n  d: {e: 5,\n      f: 6}\n", "dir/f.yaml")
    b = node.value["b"]
    assert b.place == "dir/f.yaml:2"
    assert [item.place for item in b.value["c"].value] == ["dir/f.yaml:4", "dir/f.yaml:5"]
    assert b.value["d"].value["f"].place == "dir/f.yaml:7"


def test_aliases_are_copies_found_where_they_are_used():
    node = parse("a: &x {b: 1}\nc: *x\n", "f")
    assert plain(node) == {"a": {"b": 1}, "c": {"b": 1}}
    assert node.value["c"].place == "f:2"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1,\nb: 2", "f:2:5: this is not YAML: expected ',' or ']'"),
        ("a: b: c", "f:1:5: this is not YAML: mapping values are not allowed here"),
        ("\ta: 1", "(indent with spaces, not tabs)"),
        ("a: 'x", "f:1:6: this is not YAML: found unexpected end of stream"),
        ("a: 1\nb: \x01", r"f:2: the character '\x01' is not allowed in YAML"),
        ("a: @x", "found character '@' that cannot start any token"),
        ("a: 1\n---\nb: 1", "f:2: one YAML document is allowed, here begins another"),
        ("a: 1\n\na: 2", "f:3: the key 'a' is here twice, first on line 1"),
        ("s: {b: 1, b: 1}", "f:1: the key 'b' is here twice"),
        ("1: x", 'f:1: the key 1 is not text (quote it: "1")'),
        ("true: x", "f:1: the key true is not text"),
        ("? [a]\n: x", "f:1: a key is text, not a list or a mapping"),
        ("? {a: b}\n: x", "f:1: a key is text, not a list or a mapping"),
        (f"{'k' * 201}: x", "a key is longer than 200 characters"),
        ("a: *x", "f:1: *x has no &x above it"),
        ("a: &a [*a]", "f:1: *a has no &a above it"),
        ("a: !foo 1", "f:1: the tag !foo is not supported"),
        ("a: !!set {b: null}", "the tag tag:yaml.org,2002:set is not supported"),
        ("a: !!binary aGk=", "the tag tag:yaml.org,2002:binary is not supported"),
        ("%YAML 9.0\n---\na: 1", "f:1:1: this is not YAML: found incompatible YAML document"),
    ],
)
def test_mistakes_have_their_place(text, told):
    found = mistakes(text)
    assert any(told in line for line in found), found


def test_several_mistakes_are_told_at_once():
    assert len(mistakes("a: 1\na: 2\n3: x\nb: !foo 1\nc: *d\n")) == 4


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!!python/module:os"])
def test_no_tag_makes_an_object(tag):
    assert "is not supported" in mistakes(f"a: {tag} [echo]")[0]


def test_depth_has_a_limit():
    levels = MAX_DEPTH - 1  # the mapping is one
    assert parse("a: " + "[" * (levels - 1) + "1" + "]" * (levels - 1), "f")
    for text in ("a: " + "[" * levels + "1" + "]" * levels, "[" * 10**5, "- " * 10**5, "? " * 10**5, "{a: " * 10**5):
        assert "nested more than 50 levels deep" in mistakes(text)[0]


def test_an_alias_bomb_is_refused_at_once():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 10) + "]" for n in range(1, 40)]
    before = time.perf_counter()
    assert "more than 20000 values (aliases counted in full)" in mistakes("\n".join(lines))[0]
    assert time.perf_counter() - before < 5


def test_files(tmp_path):
    file = tmp_path / "f.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert plain(read(file)) == {"a": 1}
    for empty in ("", "# only a comment\n", "---\n", "null\n"):
        file.write_text(empty)
        assert plain(read(file)) == {}
    for text in ("- a\n", "text\n", "5\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"f.yaml:1: a config file is a mapping"):
            read(file)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputMissing, match=r"nowhere\.yaml cannot be read: No such file"):
        read(tmp_path / "nowhere.yaml")
    with pytest.raises(InputMissing, match="cannot be read: Is a directory"):
        read(tmp_path)
    with pytest.raises(InputMissing, match="cannot be read"):
        read(tmp_path / "a\0b")
    file = tmp_path / "f.yaml"
    file.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(ConfigError, match=r"f.yaml:2: this is not text in UTF-8"):
        read(file)
    file.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="is larger than 1 MiB"):
        read(file)


def test_an_endless_file_is_refused():
    code = (
        "from pathlib import Path; from harness.yamlfile import read; import resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "try: read(Path('/dev/zero'))\nexcept Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ConfigError /dev/zero is larger than 1 MiB" in done.stdout, done.stderr


def test_merge():
    below = parse("a: {b: 1, c: [1, 2]}\nd: 5\ne: {f: 1}", "below")
    above = parse("\n\na: {c: [3], g: 2}\nd: {x: 1}\ne: null", "above")
    merged = merge(below, above)
    assert plain(merged) == {"a": {"b": 1, "c": [3], "g": 2}, "d": {"x": 1}, "e": None}
    places = {key: node.place for key, node in merged.value["a"].value.items()}
    assert places == {"b": "below:1", "c": "above:3", "g": "above:3"}
    assert plain(below) == {"a": {"b": 1, "c": [1, 2]}, "d": 5, "e": {"f": 1}}, "merge changed its argument"


ODD = [
    "no",
    "null",
    "~",
    "",
    " ",
    "5",
    "-.5e3",
    "+.inf",
    "0o7",
    "0x1",
    "1_0",
    "a: b",
    "# c",
    "- x",
    "*a",
    "&a",
    "!t",
    "%",
]
ODD += [
    "`",
    "'",
    '"',
    "\\",
    "\t",
    "\r\n",
    "\x85",
    "\u2028",
    "\ufeff",
    "\x00",
    "\x7f",
    "😀",
    "a #b",
    "a:",
    "...",
    "---",
    "=",
    "<<",
]
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(ODD)
SCALARS = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))


@given(st.dictionaries(TEXT, VALUES, max_size=5))
def test_what_is_written_is_read_back_equal(value):
    read_back = plain(parse(dump(value), "f")) or {}
    assert read_back == value
    assert repr(read_back) == repr(value), "the order or a type differs"


@given(VALUES)
def test_what_is_written_on_one_line_is_read_back_equal(value):
    text = dump(value, inline=True)
    assert "\n" not in text
    assert repr(plain(parse(text, "f"))) == repr(value)


@given(st.text(max_size=60) | st.text("[]{}:,-?&*!|>'\"%@`# \n\tab1", max_size=60))
def test_any_text_is_read_or_refused_in_sentences(text):
    try:
        parse(text, "f")
    except ConfigError as error:
        assert error.mistakes
