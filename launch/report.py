"""How a run ended, told to a person: one root cause and what to do next, from what the ranks left behind.

Order of evidence: the ranks' error files, then the status rank 0 wrote, then heartbeats and the launcher's words, and
its exit code last. Pure: it is given what the ranks left and reads nothing itself.

    ending = judge(errors, status, attempt=3, returncode=137, noise=[...])
    print(ending.text); sys.exit(ending.code)
"""

from __future__ import annotations

import re
import signal
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import Exit
from harness.heartbeat import Heartbeat, last_seen
from harness.rundir import CONSEQUENCES
from launch.stall import Stall, explain

if TYPE_CHECKING:
    from launch.watch import Hang

Kind = Literal["finished", "stopped", "user", "crash", "hang", "memory", "lost", "io", "interrupted"]
"""user: only a person can mend it (config, input, installation, corrupt data); lost: a host is gone."""
USER = (Exit.USAGE, Exit.DATA, Exit.NO_INPUT, Exit.UNAVAILABLE, Exit.CONFIG)
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")

_SIGNALLED = re.compile(r"process rank (\d+) with PID \d+ on node (\S+) exited on signal (\d+)")
_SRUN = re.compile(
    r"srun: error: (\S+): tasks? (\d+)[\d,-]*: (?:Exited with exit code (\d{1,3})|(.+?)(?: \(core dumped\))?)$"
)
_SIGNAL_NAMES = {signal.strsignal(number): int(number) for number in signal.valid_signals()}
_HYDRA = re.compile(r"EXIT STRING: .*\(signal (\d{1,2})\)")
_LOST = (  # words of Open MPI, Slurm and Hydra for a host that is gone; the group is its name
    re.compile(r"Remote daemon: \[\[\d+,\d+\],\d+\] on node (\S+)"),
    re.compile(r"srun: error: Node failure on (\S+)"),
    re.compile(r"slurmstepd(?:-\S+)?: error: .*CANCELLED AT .*DUE TO NODE FAILURE()"),
    re.compile(r"\[mpiexec@\S+\] control_cb \(.*\): assert \(!closed\) failed()"),  # the connection to a proxy
    re.compile(r"ORTE (?:has lost communication with a remote daemon|was unable to reliably start)()"),
)
_UNREACHED = (  # and of ssh and horovodrun for one where nothing could be started
    re.compile(r"^ssh: (?:connect to host|Could not resolve hostname) ([^\s:]+)"),
    re.compile(r"^ssh not successful for host (\S+):"),
    re.compile(r"^Launching horovod task function was not successful:()|: Timed out waiting for tasks to start"),
)
ENDED = re.compile(r"Process (\d{1,9}) exit with status code (\d{1,3})\.")
"""What horovodrun says of a rank, by the number it began with, and its code as a shell gives it."""
_MEMORY = re.compile(r"(?i)oom[-_ ]kill|out[ -]of[ -]memory")
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
    kind: Kind = "crash"
    host: str | None = None
    """The host that is gone, where one is known."""

    @property
    def cause(self) -> str:
        """The first line, to be put into a table."""
        first = next((line for line in self.text.splitlines() if line.strip()), self.state)
        return first.removeprefix("error: ")


def judge(
    errors: Sequence[Mapping[str, Any]],
    status: Mapping[str, Any],
    *,
    attempt: int,
    returncode: int,
    noise: Sequence[str] = (),
    killed: str | None = None,
    hang: Hang | None = None,
    heartbeats: Mapping[int, Heartbeat] | None = None,
    memory: bool = False,
    elastic: bool = False,
    stall: Stall | None = None,
) -> Ending:
    """Classify an end. `returncode` is the launcher's, negative for a signal; `killed` says why we ended the ranks.

    `hang`: what the supervisor saw; `memory`: the system ended a process for lack of memory meanwhile; `stall`: what
    Horovod said last, which explains a hang; `elastic`: the run may have survived that ranks failed.
    """
    ending = _judge(errors, status, attempt, returncode, noise, killed, hang, heartbeats or {}, memory, elastic, stall)
    if stall is None or ending.kind != "hang" or stall.fatal:
        return ending
    return replace(ending, text=f"{ending.text}\n  {explain(stall, heartbeats or {})}")


def _judge(
    errors: Sequence[Mapping[str, Any]],
    status: Mapping[str, Any],
    attempt: int,
    returncode: int,
    noise: Sequence[str],
    killed: str | None,
    hang: Hang | None,
    heartbeats: Mapping[int, Heartbeat],
    memory: bool,
    elastic: bool,
    stall: Stall | None,
) -> Ending:
    own = status if status.get("attempt") == attempt else {}
    if elastic and own.get("state") in ("finished", "stopped"):
        errors = ()
    real = [error for error in errors if str(error.get("type")) not in CONSEQUENCES]
    if hang is not None and not real:
        return Ending(int(Exit.CRASH), "failed", f"error: {hang.text}", hang.rank, _hung(hang), _gone(hang))
    over, code = own.get("state") in ("finished", "stopped"), shell_code(returncode)
    gave_up = stall is not None and stall.fatal and not elastic
    if stall is not None and gave_up and not real and not over and returncode:  # the ranks say: it has shut down
        text = f"error: {explain(stall, heartbeats)}, and was told to give up (horovod.stall_stop)"
        return Ending(int(Exit.CRASH), "failed", text, min(stall.missing), "hang")
    if returncode < 0 and killed is None and not real and not over:  # what ranks say of it comes from that
        return _silent(code, returncode, own, noise, heartbeats, memory, elastic)
    lost = _lost_host(noise, (*_LOST, *_UNREACHED))
    if errors and (real or lost is None):
        cause = (real or errors)[0]  # the first by time
        kind = _kind(cause)
        return Ending(_code(cause), "failed", _told(cause, len(errors)), _number(cause.get("rank")), kind)
    state = own.get("state")
    if state in ("finished", "stopped"):
        ended = {int(found[2]) for line in noise if (found := ENDED.match(line))}  # its own code is then 1
        well = code in (0, Exit.STOPPED) or Exit.STOPPED in ended
        late = "" if well else f"note: the ranks ended with code {code} after the run had {state}"
        if state == "finished":
            return Ending(Exit.FINISHED, "finished", late, kind="finished")
        return Ending(Exit.STOPPED, "stopped", late, kind="stopped")
    if code == Exit.STOPPED:
        return Ending(code, "stopped", "", kind="stopped")
    if lost is not None:
        reached = bool(heartbeats) or _lost_host(noise, _UNREACHED) is None
        return _of_lost_host(lost, heartbeats) if reached else _of_unreached_host(lost)
    if killed is not None and not (memory and code == 128 + signal.SIGKILL):
        return Ending(int(Exit.CRASH), "failed", f"error: {killed}")  # not the code that our signal has made
    if code == 0:
        return Ending(Exit.INTERNAL, "failed", "error: the ranks ended without an error, but the run did not finish")
    return _silent(code, returncode, own, noise, heartbeats, memory, elastic)


def shell_code(returncode: int) -> int:
    """A process's return code as a shell gives it: signal n is 128 + n."""
    return 128 - returncode if returncode < 0 else returncode


def _told(error: Mapping[str, Any], count: int) -> str:
    message = _text(error.get("message"))
    if error.get("sentence"):
        hint = error.get("hint")
        return f"error: {message}" + (f"\n  {_text(hint)}" if hint else "")
    head = f"error: rank {error.get('rank')} of {error.get('size')} on {error.get('host')}"
    if error.get("kind") == "hang":
        return f"{head} hangs: {message}"
    head += " failed"
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


def _hung(hang: Hang) -> Kind:
    return "lost" if hang.lost else "hang"


def _gone(hang: Hang) -> str | None:
    return hang.host if hang.lost else None


def _lost_host(noise: Sequence[str], words: Sequence[re.Pattern[str]]) -> str | None:
    """The name of a host that the launcher has lost, "" where it does not say which; None where it lost none."""
    found = [match[1] or "" for line in noise for pattern in words if (match := pattern.search(line))]
    return max(found, key=bool) if found else None


def _of_lost_host(host: str, heartbeats: Mapping[int, Heartbeat]) -> Ending:
    there = [one for one in heartbeats.values() if host and one.host.split(".")[0] == host.split(".")[0]]
    text = f"error: the host {host} is gone" if host else "error: the launcher has lost a host"
    if there:
        text += f"; rank {there[0].rank} of {there[0].size} on it was {last_seen(there[0])}"
    return Ending(int(Exit.CRASH), "failed", text, there[0].rank if there else None, "lost", host or None)


def _of_unreached_host(host: str) -> Ending:
    text = f"error: the host {host} cannot be reached" if host else "error: a host cannot be reached"
    text += f"\n  `ssh {host or 'HOST'} true` must work without a question, from the host that starts the ranks"
    return Ending(int(Exit.CRASH), "failed", text, kind="lost", host=host or None)


def _silent(
    code: int,
    returncode: int,
    status: Mapping[str, Any],
    noise: Sequence[str],
    heartbeats: Mapping[int, Heartbeat],
    memory: bool,
    elastic: bool,
) -> Ending:
    """No rank said anything: the launcher's words are all there is, and where each rank was before."""

    def where(rank: int | None = None) -> str:
        if rank is not None and rank in heartbeats:
            return f", {last_seen(heartbeats[rank])}"
        return f", last seen at step {status['step']}" if status.get("step") is not None else ""

    def killed(number: int) -> tuple[Kind, str]:
        short = memory or any(_MEMORY.search(line) for line in noise)
        if number == signal.SIGKILL and short:
            return "memory", "\n  the system ran out of memory: fewer ranks per host, a smaller train.micro_batch"
        return "crash", _reason(number)

    for line in noise:
        if match := _SIGNALLED.search(line):
            rank, number = int(match[1]), int(match[3])
            kind, why = killed(number)
            text = f"error: rank {rank} on {match[2]} was ended by {signal_name(number)}{where(rank)}"
            return Ending(code, "failed", text + why, rank, kind)
        if match := _SRUN.match(line):  # its own code is that of the ranks it then killed; the first is the cause
            rank, number = int(match[2]), _SIGNAL_NAMES.get(match[4], 0)
            if number:
                kind, why = killed(number)
                text = f"error: rank {rank} on {match[1]} was ended by {signal_name(number)}{where(rank)}"
                return Ending(128 + number, "failed", text + why, rank, kind)
            if match[4] and _MEMORY.search(match[4]):
                text = f"error: rank {rank} on {match[1]} was ended for lack of memory{where(rank)}"
                return Ending(128 + signal.SIGKILL, "failed", text, rank, "memory")
            if match[3] and int(match[3]):
                text = f"error: rank {rank} on {match[1]} ended with code {match[3]}{where(rank)}"
                code = int(match[3])
                return Ending(code, "failed", f"{text} and left no error report", rank, _kind_of_code(code))
        if match := _HYDRA.search(line):  # MPICH's launcher then returns the bare number of the signal
            returncode = code = 128 + int(match[1])
    ended = [found for line in noise if (found := ENDED.match(line)) and int(found[2]) not in (0, Exit.STOPPED)]
    if ended:  # the first one has ended the others, but for an elastic run, which has survived all but the last
        rank, code = int(ended[-1 if elastic else 0][1]), int(ended[-1 if elastic else 0][2])
        kind, why = killed(code - 128) if code > 128 else (_kind_of_code(code), " and left no error report")
        host = f" on {heartbeats[rank].host}" if rank in heartbeats else ""
        how = f"was ended by {signal_name(code - 128)}" if code > 128 else f"ended with code {code}"
        return Ending(code, "failed", f"error: rank {rank}{host} {how}{where(rank)}{why}", rank, kind)
    kind = _kind_of_code(code)
    if returncode < 0:
        head = f"error: the launcher was ended by {signal_name(-returncode)}{where()}{_reason(-returncode)}"
    elif code - 128 in signal.valid_signals():
        kind, why = killed(code - 128)
        head = f"error: the ranks were ended by {signal_name(code - 128)}{where()}{why}"
    else:
        meaning = " (a file could not be read or written)" if kind == "io" else ""
        head = f"error: the ranks ended with code {code}{meaning}{where()}; none of them left an error report"
    said = [f"  | {line}" for line in noise[-20:]]
    return Ending(code, "failed", "\n".join([head, *(["the launcher said:"] if said else []), *said]), kind=kind)


def _kind(error: Mapping[str, Any]) -> Kind:
    if error.get("kind") == "hang":
        return "hang"
    if str(error.get("type")) in OUT_OF_MEMORY:
        return "memory"
    return _kind_of_code(_code(error))


def _kind_of_code(code: int) -> Kind:
    return "user" if code in USER else "io" if code == Exit.IO else "memory" if code == 253 else "crash"


def _reason(number: int) -> str:
    if number == signal.SIGKILL:
        return "\n  often the system's answer to too little memory: see `dmesg`, or under Slurm `sacct -j JOB -o State`"
    if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT):
        return "\n  a crash in native code; `harness check` finds mismatched libraries"
    return ""


def signal_name(number: int) -> str:
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
