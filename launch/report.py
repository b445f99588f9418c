"""How a run ended, told to a person: one root cause and what to do next, from what the ranks left behind.

Order of evidence: the ranks' error files, then the status rank 0 wrote, then the launcher's exit code. Pure but for
reading nothing itself: it is given the error files, the status and the code.

    ending = judge(errors, status, attempt=3, returncode=137, noise=[...])
    print(ending.text); sys.exit(ending.code)
"""

from __future__ import annotations

import re
import signal
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import Exit
from harness.rundir import CONSEQUENCES

_SIGNALLED = re.compile(r"process rank (\d+) with PID \d+ on node (\S+) exited on signal (\d+)")
_SRUN = re.compile(
    r"srun: error: (\S+): tasks? (\d+)[\d,-]*: (?:Exited with exit code (\d{1,3})|(.+?)(?: \(core dumped\))?)$"
)
_SIGNAL_NAMES = {signal.strsignal(number): int(number) for number in signal.valid_signals()}
_HYDRA = re.compile(r"EXIT STRING: .*\(signal (\d{1,2})\)")
_MOST = 20_000


@dataclass(frozen=True)
class Ending:
    """The code to exit with, and the lines to print ("" when there is nothing to say)."""

    code: int
    state: str
    """finished, stopped or failed"""
    text: str
    rank: int | None = None
    """The rank that is the root cause, where one is known."""


def judge(
    errors: Sequence[Mapping[str, Any]],
    status: Mapping[str, Any],
    *,
    attempt: int,
    returncode: int,
    noise: Sequence[str] = (),
    killed: str | None = None,
) -> Ending:
    """Classify an end. `returncode` is the launcher's, negative for a signal; `killed` says why we ended the ranks."""
    own = status if status.get("attempt") == attempt else {}
    if errors:
        cause = min(errors, key=lambda error: str(error.get("type")) in CONSEQUENCES)  # the first by time otherwise
        return Ending(_code(cause), "failed", _told(cause, len(errors)), _number(cause.get("rank")))
    state, code = own.get("state"), shell_code(returncode)
    if state in ("finished", "stopped"):
        late = f"note: the ranks ended with code {code} after the run had {state}" if code not in (0, 75) else ""
        return Ending(Exit.FINISHED if state == "finished" else Exit.STOPPED, str(state), late)
    if code == Exit.STOPPED:
        return Ending(code, "stopped", "")
    if killed is not None:
        return Ending(code if code else int(Exit.CRASH), "failed", f"error: {killed}")
    if code == 0:
        return Ending(Exit.INTERNAL, "failed", "error: the ranks ended without an error, but the run did not finish")
    return _lost(code, returncode, own, noise)


def shell_code(returncode: int) -> int:
    """A process's return code as a shell gives it: signal n is 128 + n."""
    return 128 - returncode if returncode < 0 else returncode


def _told(error: Mapping[str, Any], count: int) -> str:
    message = _text(error.get("message"))
    if error.get("sentence"):
        hint = error.get("hint")
        return f"error: {message}" + (f"\n  {_text(hint)}" if hint else "")
    head = f"error: rank {error.get('rank')} of {error.get('size')} on {error.get('host')} failed"
    if error.get("step") is not None:
        head += f" at step {error['step']}"
    if error.get("section"):
        head += f" in {error['section']}"
    lines = [head, f"  {error.get('type')}: {textwrap.indent(message, '  ').strip()}"]
    if trace := _text(error.get("traceback")).rstrip():
        lines += ["", textwrap.indent(trace, "  ")]
    if count > 1:
        others = count - 1
        lines += ["", f"{others} other {'rank' if others == 1 else 'ranks'} failed after it"]
    return "\n".join(lines)


def _lost(code: int, returncode: int, status: Mapping[str, Any], noise: Sequence[str]) -> Ending:
    """No rank said anything: the launcher's words are all there is."""
    where = f", last seen at step {status['step']}" if status.get("step") is not None else ""
    for line in noise:
        if match := _SIGNALLED.search(line):
            number = int(match[3])
            text = f"error: rank {match[1]} on {match[2]} was ended by {_signal(number)}{where}"
            return Ending(code, "failed", text + _reason(number), int(match[1]))
        if match := _SRUN.match(line):  # its own code is that of the ranks it then killed; the first is the cause
            number = _SIGNAL_NAMES.get(match[4], 0)
            if number:
                text = f"error: rank {match[2]} on {match[1]} was ended by {_signal(number)}{where}"
                return Ending(128 + number, "failed", text + _reason(number), int(match[2]))
            if match[3] and int(match[3]):
                text = f"error: rank {match[2]} on {match[1]} ended with code {match[3]}{where}"
                return Ending(int(match[3]), "failed", f"{text} and left no error report", int(match[2]))
        if match := _HYDRA.search(line):  # MPICH's launcher then returns the bare number of the signal
            returncode = code = 128 + int(match[1])
    if returncode < 0:
        head = f"error: the launcher was ended by {_signal(-returncode)}{where}{_reason(-returncode)}"
    elif code > 128:
        head = f"error: the ranks were ended by {_signal(code - 128)}{where}{_reason(code - 128)}"
    else:
        head = f"error: the ranks ended with code {code}{where}; none of them left an error report"
    said = [f"  | {line}" for line in noise[-20:]]
    return Ending(code, "failed", "\n".join([head, *(["the launcher said:"] if said else []), *said]))


def _reason(number: int) -> str:
    if number == signal.SIGKILL:
        return "\n  often the system's answer to too little memory: see `dmesg`, or under Slurm `sacct -j JOB -o State`"
    if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT):
        return "\n  a crash in native code; `harness check` finds mismatched libraries"
    return ""


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _code(error: Mapping[str, Any]) -> int:
    code = _number(error.get("code"))
    return code if code is not None and 0 < code < 256 else int(Exit.CRASH)


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _MOST else f"{text[: _MOST // 2]}\n...\n{text[-_MOST // 2 :]}"
