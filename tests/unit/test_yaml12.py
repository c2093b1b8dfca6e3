"""Recipes and site files as text: YAML 1.2's words, nothing that runs or grows, and every fault by line."""

import math
import time

import pytest
import yaml

from hpc_lbsgd import yaml12
from hpc_lbsgd.errors import RequestError

# What YAML 1.2 (core schema, section 10.3.2) makes of a plain word; many of them are something else in YAML 1.1
WORDS = {
    "true": True, "True": True, "FALSE": False, "null": None, "~": None, "": None,
    "off": "off", "on": "on", "yes": "yes", "No": "No", "y": "y",
    "17": 17, "-17": -17, "+1": 1, "017": 17, "08": 8, "0o17": 15, "0x1F": 31,
    "1e-4": 1e-4, "1.0e-4": 1e-4, "1E3": 1000.0, "5.": 5.0, ".5": 0.5, "-.5": -0.5, ".inf": math.inf,
    "-.INF": -math.inf,
    "1:30": "1:30", "1:30:00": "1:30:00", "2024-01-01": "2024-01-01", "1_000": "1_000", "0b11": "0b11", "-0o7": "-0o7",
    "0o8": "0o8", "nan": "nan", "inf": "inf", "1e": "1e", ".": ".", "<<": "<<", "=": "=", "1.2.3": "1.2.3",
}  # fmt: skip


@pytest.mark.parametrize("text", WORDS)
def test_words_are_those_of_yaml_1_2(text):
    value = yaml12.parse(text, "here")
    assert value == WORDS[text] and type(value) is type(WORDS[text])
    assert yaml12.parse(f"a: {text}", "here") == {"a": WORDS[text]}
    assert yaml12.parse(f'"{text}"', "here") == text


def test_not_a_number():
    assert math.isnan(yaml12.parse(".nan", "here"))


@pytest.mark.parametrize("word", [w for w in WORDS if w] + ["a: b", "a #b", "", " ", "plain", "1.0e+3", "é", "a\nb"])
def test_what_is_written_reads_the_same_everywhere(word):
    """Also by readers that know YAML 1.1 only, such as those of most clusters' tools."""
    text = yaml12.dump({"a": word, "b": [word]})
    assert yaml12.parse(text, "here") == yaml.safe_load(text) == {"a": word, "b": [word]}


@pytest.mark.parametrize("value", [True, False, None, 0, 17, -5, 1e-8, 1e16, 0.1, 1.0, 1e300, math.inf])
def test_numbers_that_are_written_read_the_same_everywhere(value):
    text = yaml12.dump({"a": value})
    for found in (yaml12.parse(text, "here")["a"], yaml.safe_load(text)["a"]):
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3", "here: line 5: key c is there twice, first in line 3"),
        ("{a: 1, a: 1}", "here: line 1: key a is there twice, first in line 1"),
        ('{a: 1, "a": 1}', "key a is there twice"),
        ("a: 1\n1: 2", "here: line 2: key 1: a key is a word"),
        ("true: 2", "here: line 1: key true: a key is a word"),
        ("[a]: 2", "here: line 1: a key is a word"),
        ("a: &x 1\nb: *x", "here: line 1: anchors, aliases and tags (&, *, !) are not read; write the value out"),
        ("a: !!python/object/apply:os.system [touch pwned]", "line 1: anchors, aliases and tags"),
        ("a: !!int yes", "line 1: anchors, aliases and tags"),
        ("a: [1,", "here: not YAML: line 1: "),
        ("a: 1\nb: c: d", "here: not YAML: line 2: mapping values are not allowed here"),
        ("a: 1\n---\nb: 1", "here: not YAML: line 2: "),
        ("a: \x00", "here: not YAML: unacceptable character"),
        ("a: " + 100_000 * "[", "here: nested too deep"),
        ("a: " + 5_000 * "1", "here: line 1: a number of 5000 digits"),
    ],
)  # fmt: skip
def test_refused_by_line_and_in_one_sentence(text, said):
    start = time.monotonic()
    with pytest.raises(RequestError) as caught:
        yaml12.parse(text, "here")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - start < 30


def test_laughs_do_not_multiply():
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(RequestError, match="anchors, aliases and tags"):
        yaml12.parse("\n".join(lines), "here")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(RequestError, match="here: no text .not UTF-8."):
        yaml12.mapping_of(tmp_path / "latin.yaml", "here")
    with pytest.raises(RequestError, match="here: no such file"):
        yaml12.mapping_of(tmp_path / "none.yaml", "here")
    with pytest.raises(RequestError, match="here: a folder, not a file"):
        yaml12.mapping_of(tmp_path, "here")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RequestError, match="here: expected keys and values, found list"):
        yaml12.mapping_of(tmp_path / "list.yaml", "here")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert yaml12.mapping_of(tmp_path / "empty.yaml", "here") == {}
