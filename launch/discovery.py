"""The command that tells an elastic run its hosts, tried once before anything is made; afterwards horovodrun asks it.

try_discovery("./hosts.sh --partition gpu", ranks=4)     # a note, or None, or an error in a sentence
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from harness.errors import InputMissing, Unavailable
from launch.nodelist import MAX_TEXT, host_of, merge, shorten

PATIENCE = 30.0
"""Seconds that the command may take."""
_NOT_STARTED = (126, 127)
"""A shell's codes for a command that is not executable, or not there."""


def try_discovery(command: str, ranks: int, environ: Mapping[str, str]) -> str | None:
    """Run the command by a shell, as horovodrun does, and read what it prints.

    Returns a note where it lists fewer slots than ranks, for which horovodrun then waits. Raises InputMissing where
    the command is missing or not executable, Unavailable where it fails or prints other things than hosts.
    """
    who = f"the discovery command {shorten(command)}"
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE,
            env=dict(environ),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{who} gave no answer within {PATIENCE:.0f} s", hint="it is asked every second") from error
    if done.returncode:
        said = done.stderr[-MAX_TEXT:].decode(errors="replace").strip().splitlines()
        why = f": {said[-1][:300]}" if said else ""
        if done.returncode in _NOT_STARTED:
            raise InputMissing(f"{who} is missing or not executable{why}", hint="give an executable file by its path")
        raise Unavailable(f"{who} failed with code {done.returncode}{why}")
    lines = [line for line in done.stdout[:MAX_TEXT].decode(errors="replace").splitlines() if line.strip()]
    try:
        for line in lines:
            if ":" not in line:
                raise ValueError(f"{shorten(line)!r} names no slots")
        slots = sum(host.slots for host in merge(host_of(line, "host:slots") for line in lines))
    except ValueError as error:
        raise Unavailable(f"{who} does not print hosts: {error}", hint="a line host:slots for each host") from error
    return None if slots >= ranks else f"{who} lists {slots} slots now: horovodrun waits until there are {ranks}"
