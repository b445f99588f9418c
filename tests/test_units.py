"""Durations and sizes: what is read, what is refused, and that what is shown has a unit."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from harness.units import BYTES, SECONDS, Duration, Size, duration, show_duration, show_size, size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (90, 90.0),
        (1.5, 1.5),
        ("90", 90.0),
        ("30s", 30.0),
        ("10m", 600.0),
        ("10 min", 600.0),
        ("1.5h", 5400.0),
        ("2d", 172800.0),
        ("100ms", 0.1),
        ("50us", 5e-5),
        ("1e3s", 1000.0),
        (".5h", 1800.0),
        ("1H", 3600.0),
        ("1:30:00", 5400.0),
        ("1-12", 129600.0),
        ("2-03:04:05", 183845.0),
        ("1-0:30", 88200.0),
        ("2:05", 125.0),
        ("0", 0.0),
    ],
)
def test_durations(text, seconds):
    assert duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (1024, 1024),
        ("1024", 1024),
        ("0", 0),
        ("64B", 64),
        ("1k", 1000),
        ("64MB", 64_000_000),
        ("64MiB", 64 << 20),
        ("64mib", 64 << 20),
        ("8 GiB", 8 << 30),
        ("1.5GB", 1_500_000_000),
        ("2T", 2 * 10**12),
        ("1PiB", 1 << 50),
    ],
)
def test_sizes(text, count):
    assert size(text) == count


BAD = [
    "",
    " ",
    "ten",
    "10 parsecs",
    "-5s",
    "-1",
    "1:2:3:4",
    "1:",
    "5s5s",
    "nan",
    "inf",
    "1e999",
    "m",
    "1.2.3s",
    "9" * 41,
]


@pytest.mark.parametrize("text", [*BAD, None, True, [1], {"s": 1}, float("nan"), float("inf"), -1, -0.5, "3MB"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="duration"):
        duration(text)


@pytest.mark.parametrize("text", [*BAD, None, True, [1], {"s": 1}, float("nan"), float("inf"), -1, "3h", "1:30"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="size"):
        size(text)


@given(number=st.integers(0, 10**6), unit=st.sampled_from(sorted(SECONDS)))
def test_every_unit_of_time(number, unit):
    assert duration(f"{number}{unit}") == number * SECONDS[unit]


@given(number=st.integers(0, 10**6), unit=st.sampled_from(sorted(BYTES)))
def test_every_unit_of_size(number, unit):
    assert size(f"{number}{unit}") == number * BYTES[unit]


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_with_a_value_error(text):
    for read in (duration, size):
        try:
            assert read(text) >= 0
        except ValueError as error:
            assert len(str(error)) < 500  # 40 characters, each shown with up to 10, and the sentence


def test_long_hostile_text_is_refused_at_once():
    before = time.perf_counter()
    for read in (duration, size):
        with pytest.raises(ValueError, match="is not a"):
            read("9" * 10**6 + "!")
    assert time.perf_counter() - before < 10


@given(st.floats(0, 1e9))
def test_fields_take_their_own_values_back(seconds):
    assert TypeAdapter(Duration).validate_python(seconds) == seconds
    assert TypeAdapter(Size).validate_python(int(seconds)) == int(seconds)


def test_fields_explain():
    with pytest.raises(ValidationError, match="write it as 30s, 10m, 2h"):
        TypeAdapter(Duration).validate_python("10 parsecs")
    with pytest.raises(ValidationError, match="write it as 64MB or 8GiB"):
        TypeAdapter(Size).validate_python("big")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8 s"),
        (9.94, "9.9 s"),
        (42.4, "42 s"),
        (60, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (360000, "100 h 00 min"),
    ],
)
def test_shown_durations(seconds, text):
    assert show_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (512, "512 B"), (1000, "1.0 kB"), (3_400_000, "3.4 MB"), (1.2e9, "1.2 GB"), (5e15, "5000.0 TB")],
)
def test_shown_sizes(count, text):
    assert show_size(count) == text
