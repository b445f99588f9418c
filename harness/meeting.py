"""Ranks of an elastic run meet before they join Horovod, so that nobody waits in there for one that has died.

Horovod 0.28 asks horovodrun for its rank in C++ and connects to the others at once; where one of them dies meanwhile,
as a newcomer may that still imports torch, the others wait for HOROVOD_GLOO_TIMEOUT_SECONDS and then abort. So ranks
ask for themselves. horovodrun's server answers once every rank of the last assignment has asked or is dead, and then
has new ranks for all (horovod/runner/elastic/registration.py); asking once more is always right. In between it keeps
what ranks write, and forgets that with the next assignment. There every rank says that it is here. Rank 0 looks whether
all have come: then they go on, otherwise all ask again, and get an answer when the last has come too, or has died.

    meet()              # a worker that horovodrun has just started; may change its rank and size
    meet(anew=True)     # one that goes on after others have gone or are to come
"""

from __future__ import annotations

import http.client
import os
import sys
import time

from harness.errors import Exit, Unavailable

NAMES = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
"""As HOROVOD_RANK and so on, in the order in which horovodrun answers (`SlotInfo.to_response_string`)."""
PATIENCE = 3.0
"""Seconds that rank 0 waits for the others, and they for rank 0, before they ask again."""
GIVEN_UP = 60.0
"""Seconds after which rank 0, though it has come, has not decided: it is dead."""
_SCOPE = "harness"


def meet(*, anew: bool = False) -> None:
    """Return once all ranks are here, with HOROVOD_RANK and its like in the environment. Collective.

    A worker that horovodrun does not want any more ends here. Raises Unavailable where horovodrun does not answer.
    """
    if anew:
        _ask()
    while not _all_are_here(int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])):
        _ask()


def _ask() -> None:
    """Get this worker's next rank. Waits until all ranks of the last assignment have asked, or are dead."""
    who = f"{os.environ['HOROVOD_HOSTNAME']}:{os.environ['HOROVOD_LOCAL_RANK']}"
    words = (_call("GET", f"rank_and_size/{who}") or "").split(",")
    if words[0] == "-1":
        print("horovodrun goes on without this rank", flush=True)
        sys.stdout.flush()
        os._exit(Exit.STOPPED)
    if len(words) != len(NAMES) or not all(word.isdecimal() for word in words):
        raise Unavailable(f"horovodrun does not say which rank {who} has now")
    os.environ.update({f"HOROVOD_{name}": word for name, word in zip(NAMES, words, strict=True)})


def _all_are_here(rank: int, size: int) -> bool:
    """Whether all go on, as rank 0 decides. Collective: all ranks of an assignment return the same."""
    _call("PUT", f"{_SCOPE}/{rank}", "here")
    until = time.monotonic() + PATIENCE
    if rank == 0:
        missing = set(range(1, size))
        while missing and time.monotonic() < until:
            missing = {one for one in missing if _call("GET", f"{_SCOPE}/{one}") is None}
            time.sleep(0.05 if missing else 0.0)
        _call("PUT", f"{_SCOPE}/decided", "" if missing else "go")
        return not missing
    given_up = time.monotonic() + GIVEN_UP
    while (decided := _call("GET", f"{_SCOPE}/decided")) is None:
        if time.monotonic() > given_up:
            _call("DELETE", f"{_SCOPE}/{rank}")
            return _call("GET", f"{_SCOPE}/decided") == "go"
        if time.monotonic() > until and _call("GET", f"{_SCOPE}/0") is None:
            _call("DELETE", f"{_SCOPE}/{rank}")
            if _call("GET", f"{_SCOPE}/0") is None:
                return False  # and rank 0, when it comes, will miss this one
            _call("PUT", f"{_SCOPE}/{rank}", "here")
        time.sleep(0.05 + 0.002 * size)  # one server answers all
    return decided == "go"


def _call(method: str, path: str, value: str = "") -> str | None:
    """Ask horovodrun's server; None where it has no such thing. No proxy, and no time limit: answers may take hours."""
    address = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])
    for attempt in range(3):
        try:
            connection = http.client.HTTPConnection(*address)
            try:
                connection.request(method, f"/{path}", body=value.encode() if method == "PUT" else None)
                answer = connection.getresponse()
                text = answer.read(1000).decode(errors="replace")
            finally:
                connection.close()
            if answer.status in (200, 404):
                return text if answer.status == 200 else None
            why = f"code {answer.status}"
        except (OSError, http.client.HTTPException) as error:
            why = f"{type(error).__name__}: {error}"
        time.sleep(0.5 * (attempt + 1))
    raise Unavailable(f"horovodrun does not answer at {address[0]}:{address[1]} ({why})")
