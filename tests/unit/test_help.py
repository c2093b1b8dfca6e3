"""--help is the manual: every command and flag says what it is, in lines that fit a terminal of 80 columns."""

import argparse
import re

import pytest

from hpc_lbsgd import cli
from hpc_lbsgd.bench.simulate import command
from hpc_lbsgd.theory import simulate


def walk(parser, parent=None):
    """(command, the line that its parent's list has for it), all the way down."""
    yield parser, parent
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            lines = {choice.dest: choice.help for choice in action._choices_actions}
            assert lines.keys() == action.choices.keys(), f"{parser.prog}: a command without a line"
            for name, found in action.choices.items():
                yield from walk(found, lines[name])


COMMANDS = list(walk(cli.parser()))


@pytest.mark.parametrize("parser, line", COMMANDS, ids=[p.prog for p, _ in COMMANDS])
def test_each_command_and_each_flag_says_what_it_is(parser, line, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = parser.format_help()
    assert [part for part in text.splitlines() if len(part) > 80] == []
    assert line is None or parser.description.lower() == f"{line}.".lower()
    flags = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]
    assert [a.dest for a in flags if not a.help] == []
    silent = [
        a.dest for a in flags if a.default not in (None, False, [], argparse.SUPPRESS) and "default" not in a.help
    ]
    assert silent == [], "a default that help does not say"
    assert "==SUPPRESS==" not in text


def test_exit_codes_are_said_once():
    said = [p.prog for p, _ in COMMANDS if re.search(r"exit codes", p.format_help(), re.I)]
    assert said == ["hpc-lbsgd"]


def test_examples_are_commands():
    examples = [p.epilog.removeprefix("Example: hpc-lbsgd ") for p, line in COMMANDS if line and p.epilog]
    assert len(examples) > 5
    for example in examples:
        cli.parser().parse_args(example.split())


def test_a_prediction_offers_the_algorithms_that_theory_has():
    assert command.ALGORITHMS == simulate.ALGORITHMS
