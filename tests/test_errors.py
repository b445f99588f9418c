"""Errors: exit codes as in sysexits.h, and sentences."""

import os

import pytest

from harness import errors
from harness.errors import ConfigError, Exit, HarnessError, Mistake


def test_codes_are_those_of_sysexits():
    named = {Exit.USAGE: os.EX_USAGE, Exit.DATA: os.EX_DATAERR, Exit.NO_INPUT: os.EX_NOINPUT}
    named |= {Exit.UNAVAILABLE: os.EX_UNAVAILABLE, Exit.INTERNAL: os.EX_SOFTWARE, Exit.IO: os.EX_IOERR}
    named |= {Exit.STOPPED: os.EX_TEMPFAIL, Exit.CONFIG: os.EX_CONFIG, Exit.FINISHED: os.EX_OK}
    assert all(int(code) == value for code, value in named.items())


def test_every_class_has_a_code_that_ends_a_run_as_a_failure():
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HarnessError)]
    assert len(classes) >= 9
    assert all(isinstance(kind.code, Exit) and kind.code != Exit.FINISHED for kind in classes)
    own = [kind.code for kind in classes if kind is not HarnessError]
    assert len(set(own)) == len(own)


def test_a_hint_follows_on_its_own_line():
    assert str(HarnessError("it is wrong")) == "it is wrong"
    assert str(HarnessError("it is wrong", hint="do this")) == "it is wrong\n  do this"


@pytest.mark.parametrize(("count", "head"), [(1, "1 mistake in the config:"), (2, "2 mistakes in the config:")])
def test_mistakes_are_all_told(count, head):
    mistakes = [Mistake(f"a.yaml:{line}", "wrong", "right") for line in range(count)]
    lines = str(ConfigError(mistakes)).splitlines()
    assert lines == [head, *(f"  a.yaml:{line}: wrong (right)" for line in range(count))]
