"""Bytes of sharded leaves, from the ranks that hold them to the ranks that write them.

    exchange(layout, plan, holders, parts, comm, staging.view)

A block of the file has one writer, who needs all of its bytes. Which cells meet which blocks, who writes a block and
which of several equal holders sends its bytes: all ranks know all of this (`Holders`, `Dealt`), so that no message says
what is in another one. Shards along the first dimension, and flat ones, have nearly all of their bytes in
blocks of their own.

Memory: two messages of MESSAGE bytes over MPI, twice BUDGET bytes over Horovod. A rank that cannot read its tensors
sends other bytes instead and raises when all is over, so that no other waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from harness.checkpoint.comm import Comm, Horovod
from harness.checkpoint.holders import Holders
from harness.checkpoint.layout import PAGE, Layout, Offsets
from harness.checkpoint.plan import Dealt, Plan
from harness.checkpoint.shards import Box, cuts
from harness.checkpoint.tensors import Bytes, Part
from harness.errors import InternalError

MESSAGE = 8 << 20
"""Bytes of one message between two ranks, at the most."""
BUDGET = 32 << 20
"""Bytes that a rank sends, and those it receives, in one round where all ranks take part in each."""
_TAG = 4117

View = Callable[[int, int], Bytes]
"""(lo, hi) -> memory for these bytes of the file, all of them in one block of this rank."""


class Transfer(NamedTuple):
    """Bytes of a cell within [lo, hi) of the file, all in one block; there may be bytes of other cells between them."""

    cell: int
    lo: int
    hi: int


class Message(NamedTuple):
    """Transfers whose bytes travel together, each with how many of them there are."""

    size: int
    transfers: list[tuple[Transfer, int]]


@dataclass(frozen=True)
class Transfers:
    """What one rank does: `own` stays here; `outgoing` and `incoming` by rank, in the same order on both sides."""

    own: list[Transfer]
    outgoing: dict[int, list[Transfer]]
    incoming: dict[int, list[Transfer]]


def exchange(layout: Layout, plan: Plan, holders: Holders, parts: Mapping[int, Part], comm: Comm, view: View) -> None:
    """Put the sharded leaves' bytes of this rank's blocks in place: its own, and those that others send.

    `plan`: made with these `holders`. `parts`: by leaf index, what this rank holds. `view`: see View. Collective, main
    thread; raises on the rank where something went wrong.
    """
    if plan.dealt is None:
        return
    work = _Work(holders, parts, view)
    transfers = plan_transfers(layout, plan.dealt, holders, comm.rank)
    for transfer in transfers.own:
        work.copy(transfer)
    if comm.size > 1:
        if comm.mpi is not None:
            _over_mpi(transfers, work, comm)
        else:
            _in_rounds(transfers, work, comm)
    for part in parts.values():
        part.release()
    if work.failure is not None:
        raise work.failure


def plan_transfers(layout: Layout, dealt: Dealt, holders: Holders, rank: int) -> Transfers:
    """What `rank` keeps, sends and receives. O(blocks of its cells + cells of its blocks)."""
    mine = holders.cells_of(rank)
    first = (holders.first[mine] - layout.data_start) // layout.block
    last = (holders.end[mine] - 1 - layout.data_start) // layout.block
    cells, blocks = _spread(mine, first, last + 1)
    writer = dealt.writer[blocks]
    own = writer == rank
    send = ~own & ~holders.held(cells, writer)
    send[send] = holders.holder(cells[send], dealt.turn[blocks[send]]) == rank

    wanted = np.flatnonzero(dealt.writer == rank)
    lo = layout.data_start + wanted * layout.block
    needed_blocks, needed = _spread(wanted, *holders.near(lo, lo + layout.block))
    touches = holders.end[needed] > layout.data_start + needed_blocks * layout.block
    needed, needed_blocks = needed[touches], needed_blocks[touches]
    foreign = ~holders.held(needed, np.full_like(needed, rank))
    needed, needed_blocks = needed[foreign], needed_blocks[foreign]
    source = holders.holder(needed, dealt.turn[needed_blocks])

    return Transfers(
        [t for some in _by_rank(layout, holders, cells[own], blocks[own], writer[own]).values() for t in some],
        _by_rank(layout, holders, cells[send], blocks[send], writer[send]),
        _by_rank(layout, holders, needed, needed_blocks, source),
    )


def _spread(keys: Offsets, first: Offsets, end: Offsets) -> tuple[Offsets, Offsets]:
    """Each key with each number of its range [first, end)."""
    counts = end - first
    offsets = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(keys, counts), np.repeat(first, counts) + offsets


def _by_rank(
    layout: Layout, holders: Holders, cells: Offsets, blocks: Offsets, ranks: Offsets
) -> dict[int, list[Transfer]]:
    order = np.lexsort((cells, blocks, ranks))
    cells, blocks, ranks = cells[order], blocks[order], ranks[order]
    start = layout.data_start + blocks * layout.block
    lo = np.maximum(holders.first[cells], start)
    hi = np.minimum(holders.end[cells], start + layout.block)
    found: dict[int, list[Transfer]] = {}
    for rank, *numbers in zip(ranks.tolist(), cells.tolist(), lo.tolist(), hi.tolist(), strict=True):
        found.setdefault(rank, []).append(Transfer(*numbers))
    return found


class _Work:
    """The bytes behind transfers. The first failure is kept until all is over."""

    def __init__(self, holders: Holders, parts: Mapping[int, Part], view: View) -> None:
        self.failure: Exception | None = None
        self._holders, self._parts, self._view = holders, parts, view
        self._boxes: dict[int, tuple[Box, int]] = {}

    def copy(self, transfer: Transfer) -> None:
        """From this rank's own tensor to its own block."""
        try:
            self._place(transfer, self._read(transfer))
        except Exception as error:
            self.failure = self.failure or error

    def pack(self, message: Message, buffer: Bytes) -> None:
        """This rank's bytes into a message to the writer."""
        at = 0
        for transfer, size in message.transfers:
            try:
                buffer[at : at + size] = self._read(transfer)
            except Exception as error:
                self.failure = self.failure or error
            at += size

    def unpack(self, message: Message, buffer: Bytes) -> None:
        """A message of the holder to where its bytes lie in this rank's blocks."""
        at = 0
        for transfer, size in message.transfers:
            try:
                self._place(transfer, buffer[at : at + size])
            except Exception as error:
                self.failure = self.failure or error
            at += size

    def messages(self, transfers: list[Transfer], most: int) -> Iterator[Message]:
        """Transfers as messages of at most `most` bytes: the same ones on both sides."""
        together: list[tuple[Transfer, int]] = []
        total = 0
        for cell, begin, end in transfers:
            for lo in range(begin, end, most):
                transfer = Transfer(cell, lo, min(lo + most, end))
                size = self._size(transfer)
                if together and total + size > most:
                    yield Message(total, together)
                    together, total = [], 0
                if size:
                    together.append((transfer, size))
                    total += size
        if together:
            yield Message(total, together)

    def _find(self, cell: int) -> tuple[Box, int]:
        """The cell's box and where its leaf begins in the file."""
        found = self._boxes.get(cell)
        if found is None:
            if len(self._boxes) > 10_000:
                self._boxes.clear()
            found = self._holders.box(cell), int(self._holders.layout.starts[self._holders.leaf[cell]])
            self._boxes[cell] = found
        return found

    def _size(self, transfer: Transfer) -> int:
        box, base = self._find(transfer.cell)
        if len(box.shape) == 1:
            return transfer.hi - transfer.lo
        return sum(cut.size for cut in cuts(box, transfer.lo - base, transfer.hi - base))

    def _read(self, transfer: Transfer) -> Bytes:
        _, base = self._find(transfer.cell)
        part = self._parts[int(self._holders.leaf[transfer.cell])]
        return part.read(transfer.lo - base, transfer.hi - base)

    def _place(self, transfer: Transfer, data: Bytes) -> None:
        box, base = self._find(transfer.cell)
        target = self._view(transfer.lo, transfer.hi)
        at = 0
        for cut in cuts(box, transfer.lo - base, transfer.hi - base):
            window = target[cut.at : cut.at + math.prod(cut.shape)].reshape(cut.shape)[cut.source]
            window[...] = data[at : at + cut.size].reshape(window.shape)
            at += cut.size


def _over_mpi(transfers: Transfers, work: _Work, comm: Comm) -> None:
    """In step k each rank sends to the k-th rank after it and receives from the k-th before it, where there is need.

    Nobody waits for ever: of the ranks in the earliest step, each is waited for by nobody who is not in it or before.
    """
    mpi: Any = comm.mpi
    sending, receiving = np.empty(0, np.uint8), np.empty(0, np.uint8)
    for step in range(1, comm.size):
        to, source = (comm.rank + step) % comm.size, (comm.rank - step) % comm.size
        outgoing = work.messages(transfers.outgoing.get(to, []), MESSAGE)
        incoming = work.messages(transfers.incoming.get(source, []), MESSAGE)
        while True:
            out, into = next(outgoing, None), next(incoming, None)
            if out is None and into is None:
                break
            requests = []
            if into is not None:
                receiving = _room(receiving, into.size)
                requests.append(mpi.Irecv(receiving[: into.size], source=source, tag=_TAG))
            if out is not None:
                sending = _room(sending, out.size)
                work.pack(out, sending)
                requests.append(mpi.Isend(sending[: out.size], dest=to, tag=_TAG))
            for request in requests:
                request.Wait()
            if into is not None:
                work.unpack(into, receiving)


def _in_rounds(transfers: Transfers, work: _Work, comm: Comm) -> None:
    """Rounds in which all ranks send one message to each other, until all messages are sent."""
    if not isinstance(comm, Horovod):
        raise InternalError(f"sharded tensors cannot be saved over {type(comm).__name__}")
    most = max(PAGE, BUDGET // comm.size)
    outgoing = [list(work.messages(transfers.outgoing.get(rank, []), most)) for rank in range(comm.size)]
    incoming = [list(work.messages(transfers.incoming.get(rank, []), most)) for rank in range(comm.size)]
    rounds: list[Any] = comm.all_gather(max(map(len, outgoing)))
    for number in range(max(rounds)):
        out = [messages[number] if number < len(messages) else _NOTHING for messages in outgoing]
        data = np.zeros(sum(message.size for message in out), np.uint8)
        for message, part in zip(out, np.split(data, np.cumsum([message.size for message in out])[:-1]), strict=True):
            work.pack(message, part)
        for source, part in enumerate(comm.all_to_all(data, [message.size for message in out])):
            if number < len(incoming[source]):
                work.unpack(incoming[source][number], part)


def _room(memory: Bytes, size: int) -> Bytes:
    return memory if len(memory) >= size else np.empty(size, np.uint8)


_NOTHING = Message(0, [])
