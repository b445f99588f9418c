"""What all ranks of a job do with parts of tensors. Started by `test_shards_ranks.py` under a real launcher:

python ranks_shards.py DIRECTORY mpi|gloo

Every function called `check_...` is one test, run in turn by all ranks; the first failure ends the job.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

if len(sys.argv) > 2 and sys.argv[2] == "mpi":
    import mpi4py.MPI  # noqa: F401  (as the harness does: before torch)

import numpy as np
import torch
from ranks_checkpoint import Checks as Base
from ranks_checkpoint import run_checks
from samples import bits

from harness.checkpoint import Box, Flat, PerRank, Rng, SaveFailed, Shard, State, open_checkpoint
from harness.checkpoint.blocks import Blocks
from harness.errors import DataError

ROWS, COLUMNS = 61, 83
"""Odd sizes: parts are uneven and meet in the middle of blocks."""


def globally(seed: int) -> dict[str, torch.Tensor]:
    """The tensors that ranks hold parts of."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "rows": torch.randn(ROWS, COLUMNS, generator=generator),
        "columns": torch.randn(ROWS, COLUMNS, generator=generator).to(torch.bfloat16),
        "flat": torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64),
        "large": torch.randn(1201, 701, generator=generator),
        "whole": torch.randn(301, 501, generator=generator),
    }


def marks(length: int, size: int) -> list[int]:
    """Where parts begin and end: uneven, and the last one of three or more is empty."""
    inner = [length * (3 * rank + 1) // (3 * size) for rank in range(1, size)]
    return [0, *(inner if size < 3 else [*inner[:-1], length]), length]


def regions(rank: int, size: int, turned: bool) -> dict[str, Box | Flat]:
    """What this rank has; `turned`: along other dimensions."""
    rows, columns = marks(ROWS, size), marks(COLUMNS, size)
    large = marks(701, size) if turned else marks(1201, size)
    at = [large[rank], large[rank + 1] - large[rank]]
    by_rows = Box((ROWS, COLUMNS), (rows[rank], 0), (rows[rank + 1] - rows[rank], COLUMNS))
    by_columns = Box((ROWS, COLUMNS), (0, columns[rank]), (ROWS, columns[rank + 1] - columns[rank]))
    flat = marks(ROWS * COLUMNS, size)
    return {
        "rows": by_columns if turned else by_rows,
        "columns": by_rows if turned else by_columns,
        "flat": by_columns if turned else Flat((ROWS, COLUMNS), flat[rank], flat[rank + 1]),
        "large": Box((1201, 701), (0, at[0]), (1201, at[1])) if turned else Box((1201, 701), (at[0], 0), (at[1], 701)),
    }


def part(tensor: torch.Tensor, region: Box | Flat) -> torch.Tensor:
    if isinstance(region, Flat):
        return tensor.reshape(-1)[region.lo : region.hi].clone()
    window = tuple(slice(at, at + n) for at, n in zip(region.start, region.count, strict=True))
    return tensor[window].clone()


def parts(seed: int, rank: int, size: int, turned: bool = False) -> dict[str, Any]:
    here = regions(rank, size, turned)
    return {
        name: Shard(part(tensor, here[name]), here[name]) if name in here else tensor
        for name, tensor in globally(seed).items()
    }


def as_bits(tensors: dict[str, Any]) -> Any:
    return bits({name: item.tensor if isinstance(item, Shard) else item for name, item in tensors.items()})


class Layer(torch.nn.Module):
    """`columns` of the output features of a linear layer, and all of a norm."""

    def __init__(self, seed: int, columns: slice) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(96, 64, generator=generator)
        self.split = torch.nn.Linear(64, 1)
        self.split.weight = torch.nn.Parameter(weight[columns].clone())
        self.split.bias = torch.nn.Parameter(torch.randn(96, generator=generator)[columns].clone())
        self.norm = torch.nn.LayerNorm(64)
        self.register_buffer("seen", torch.randn(96, generator=generator)[columns].clone())


def layer(seed: int, rank: int, size: int) -> dict[str, Any]:
    """A State's entries with this rank's part of a layer, after two steps whose gradients do not depend on the size."""
    columns = slice(96 * rank // size, 96 * (rank + 1) // size)
    model = Layer(seed, columns)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        for name, parameter in model.named_parameters():
            gradient = torch.randn((96 if "split" in name else 64, *parameter.shape[1:]), generator=generator)
            parameter.grad = gradient[columns] if "split" in name else gradient
        optimizer.step()
    count = columns.stop - columns.start
    shards = {
        "split.weight": Box((96, 64), (columns.start, 0), (count, 64)),
        "split.bias": Box((96,), (columns.start,), (count,)),
        "seen": Flat((96,), columns.start, columns.stop),
    }
    return {"model": model, "optimizer": optimizer, "shards": shards}


def slices(seed: int, rank: int, size: int, steps: int) -> dict[str, Any]:
    """A sharded optimizer (ZeRO): whole parameters in the model, and an optimizer of flat slices of them."""
    model = Layer(seed, slice(0, 96))
    shards, named = {}, []
    for name, parameter in model.named_parameters():
        edges = marks(parameter.numel(), size)
        shards[f"optimizer.{name}"] = Flat(tuple(parameter.shape), edges[rank], edges[rank + 1])
        flat = parameter.detach().reshape(-1)
        named.append((name, torch.nn.Parameter(flat[edges[rank] : edges[rank + 1]].clone())))
    optimizer = torch.optim.AdamW(named, lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for (name, own), parameter in zip(named, model.parameters(), strict=True):
            region = shards[f"optimizer.{name}"]
            own.grad = torch.randn(parameter.shape, generator=generator).reshape(-1)[region.lo : region.hi].clone()
        optimizer.step()
    return {"model": model, "optimizer": optimizer, "shards": shards}


def unsharded(seed: int, steps: int) -> dict[str, Any]:
    """The same optimizer with whole parameters."""
    model = Layer(seed, slice(0, 96))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


def state_bits(state: dict[str, Any]) -> Any:
    return bits({"model": state["model"].state_dict(), "optimizer": state["optimizer"].state_dict()["state"]})


def _fail(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("a bug")


class Checks(Base):
    """The checks, with what they share."""

    def check_parts_make_the_file_of_whole_tensors(self) -> None:
        rank, size = self.comm.rank, self.comm.size
        for engine in self.engines:
            manager = self.manager(f"parts-by-{size}-{engine}", engine=engine)
            path = manager.save(5, State(tensors=parts(1, rank, size)))
            manager.close()
            if rank == 0:
                single = self.root / "whole-by-1" / path.name
                with open_checkpoint(path) as mine, open_checkpoint(single) as whole:
                    assert mine.verify() == []
                    assert mine.metadata("tensors/columns").placement == "sharded"
                    for name in globally(1):
                        assert (mine.read(f"tensors/{name}") == whole.read(f"tensors/{name}")).all(), name
                    start = mine.manifest.layout.data_start
                    assert start == whole.manifest.layout.data_start
                assert (path / "data.h5").read_bytes()[start:] == (single / "data.h5").read_bytes()[start:], engine

    def check_any_parts_are_restored_from_any_others(self) -> None:
        rank, size = self.comm.rank, self.comm.size
        found: Any = self.comm.broadcast(sorted(path.name for path in self.root.glob("*-by-*")))
        assert len(found) >= 2
        for name in found:
            for turned in (False, True):
                state = parts(99, rank, size, turned)
                manager = self.manager(name, fresh=False, read="exchange" if turned else "all")
                assert manager.restore(State(tensors=state)) == 5
                assert as_bits(state) == as_bits(parts(1, rank, size, turned)), (name, turned)
            whole = globally(99)
            assert manager.restore(State(tensors=whole)) == 5
            assert bits(whole) == bits(globally(1)), name

    def check_each_byte_is_read_once(self) -> None:
        """Also where parts meet in a block, on as many ranks as saved it or on others."""
        rank, size = self.comm.rank, self.comm.size
        if self.comm.mpi is None:
            return
        found: Any = self.comm.broadcast(sorted(path.name for path in self.root.glob("*-by-*")))
        original, counts = Blocks.read, [0]

        def read(blocks: Blocks, first: int, last: int, buffer: Any) -> list[int]:
            counts.append(last - first)
            return original(blocks, first, last, buffer)

        for name in found:
            for turned in (False, True):
                state = parts(99, rank, size, turned)
                manager = self.manager(name, fresh=False, read="exchange")
                Blocks.read, counts[:] = read, [0]  # type: ignore[assignment,method-assign]
                manager.restore(State(tensors=state))
                Blocks.read = original  # type: ignore[method-assign]
                assert as_bits(state) == as_bits(parts(1, rank, size, turned)), (name, turned)
                with open_checkpoint(self.root / name / "step-00000005") as checkpoint:
                    assert sum(self.everywhere(sum(counts))) == checkpoint.manifest.layout.blocks, (name, turned)

    def check_parts_of_a_module_and_its_optimizer(self) -> None:
        rank, size = self.comm.rank, self.comm.size
        saved = layer(1, rank, size)
        manager = self.manager(f"layer-of-{size}")
        manager.save(3, State(**saved))
        manager.close()
        found: Any = self.comm.broadcast(sorted(path.name for path in self.root.glob("layer-of-*")))
        for name in found:
            state = layer(99, rank, size)
            assert self.manager(name, fresh=False).restore(State(**state)) == 3
            assert state_bits(state) == state_bits(saved), name

    def check_a_sharded_optimizer(self) -> None:
        rank, size = self.comm.rank, self.comm.size
        saved = slices(1, rank, size, steps=2)
        manager = self.manager(f"slices-of-{size}")
        manager.save(3, State(**saved))
        manager.close()
        found: Any = self.comm.broadcast(sorted(path.name for path in self.root.glob("slices-of-*")))
        for name in found:
            state = slices(99, rank, size, steps=0)
            assert self.manager(name, fresh=False).restore(State(**state)) == 3
            assert state_bits(state) == state_bits(saved), name
            whole = unsharded(99, steps=1)
            assert self.manager(name, fresh=False).restore(State(**whole)) == 3
            expected = unsharded(1, steps=2)
            assert bits(whole["optimizer"].state_dict()["state"]) == bits(expected["optimizer"].state_dict()["state"])

    def check_what_is_per_rank(self) -> None:
        rank, size = self.comm.rank, self.comm.size

        def own(seed: int) -> dict[str, Any]:
            generator = np.random.default_rng([seed, rank])
            value = {
                "position": 100 * seed + rank,
                "loss": {"mean": rank / 7, "known": rank % 2 == 0},
                "order": torch.arange(50) * seed + rank,
                "noise": generator.random((3, 5)),
            }
            return {"sampler": PerRank(value), "rng": Rng(data=generator, seed=seed)}

        manager = self.manager(f"per-rank-of-{size}")
        saved = own(1)
        manager.save(2, State(**saved))
        manager.close()
        expected = saved["rng"]._own["data"].get().tolist()
        found: Any = self.comm.broadcast(sorted(path.name for path in self.root.glob("per-rank-of-*")))
        for name in found:
            state = own(9)
            before = own(9)["sampler"].value
            manager = self.manager(name, fresh=False)
            assert manager.restore(State(**state)) == 2
            same = name == f"per-rank-of-{size}"
            value = state["sampler"].value
            assert repr(value) == repr(saved["sampler"].value if same else before), (name, value)
            assert type(value["position"]) is int and type(value["loss"]["known"]) is bool
            if same:
                assert state["rng"]._own["data"].get().tolist() == expected
                empty = PerRank({})
                manager.restore(State(sampler=empty, rng=Rng()))
                assert repr(empty.value["order"]) == repr(saved["sampler"].value["order"])
                assert empty.value["loss"] == saved["sampler"].value["loss"]
            elif rank == 0:
                told = "\n".join(self.lines)
                assert f"sampler was saved by {name[12:]} ranks, each its own, and these are {size}: it stays" in told
                assert "start anew from their seed" in told
            drawn = self.everywhere(state["rng"]._own["data"].get().tolist())
            assert len({str(words) for words in drawn}) == size, "no two ranks draw the same"

    def check_copies_of_parts(self) -> None:
        """Replicas of a model that is split along columns: rank = halves * replica + half."""
        rank, size = self.comm.rank, self.comm.size
        halves = max(1, size // 2)
        part_of = regions(rank % halves, halves, turned=True)
        for engine in self.all_engines:
            manager = self.manager("copies", engine=engine)
            state = {name: Shard(part(globally(1)[name], region), region) for name, region in part_of.items()}
            manager.save(1, State(tensors=state))
            assert not self.lines
            restored = globally(99)
            del restored["whole"]
            manager.restore(State(tensors=restored))
            assert bits(restored) == bits({name: globally(1)[name] for name in part_of}), engine
            manager.close()
            # What the replicas have in common they read together.
            manager = self.manager("copies", fresh=False, read="exchange")
            rows = regions(rank % halves, halves, turned=False)
            mine = {name: Shard(part(globally(99)[name], region), region) for name, region in rows.items()}
            manager.restore(State(tensors=mine))
            assert as_bits(mine) == bits({name: part(globally(1)[name], region) for name, region in rows.items()})
            manager.close()
            manager = self.manager("copies", engine=engine)
            if rank == size - 1:
                state["large"].tensor[5, 5] += 1
                state["columns"].tensor.zero_()
            for step in (1, 2):  # the second one does not compare
                manager.save(step, State(tensors=state))
                assert manager.restore(State(tensors=restored)) == step
                assert bits(restored) == bits({name: globally(1)[name] for name in part_of}), engine
            assert manager.restore(State(tensors=state)) == 2
            assert as_bits(state) == bits({name: part(globally(1)[name], region) for name, region in part_of.items()})
            if rank == 0:
                (line,) = self.lines
                assert f"rank {size - 1} differs from the first rank with the same part in tensors/" in line, line
                assert "tensors/columns" in line and "tensors/large" in line and "rows" not in line
            manager.close()

    def check_a_rank_that_cannot_copy_keeps_nobody_waiting(self) -> None:
        import harness.checkpoint.saving as module

        rank, size = self.comm.rank, self.comm.size
        for background in (False, True):
            manager = self.manager("cannot", background=background)
            state = parts(1, rank, size)
            manager.save(1, State(tensors=state), wait=True)
            for where, name, victim in (
                (module.Staging, "fill", size - 1),
                (module.Staging, "view", 0),
                (module.Part, "read", 0),
            ):
                original = getattr(where, name)
                if rank == victim:
                    setattr(where, name, _fail)
                message = self.fails(SaveFailed, partial(manager.save, 2, State(tensors=state), wait=True))
                setattr(where, name, original)
                assert f"rank {victim} on" in message and "ZeroDivisionError: a bug" in message, message
            manager.save(2, State(tensors=state), wait=True)
            restored = globally(99)
            assert manager.restore(State(tensors=restored)) == 2
            assert bits(restored) == bits(globally(1))
            manager.close()

    def check_lazy_saves(self) -> None:
        rank, size = self.comm.rank, self.comm.size
        manager = self.manager("lazy", background=True, lazy=True)
        saved = layer(1, rank, size)
        expected = state_bits(saved)
        manager.save(1, State(**saved))
        saved["optimizer"].step()  # waits
        manager.wait()
        state = layer(99, rank, size)
        assert manager.restore(State(**state)) == 1
        assert state_bits(state) == expected
        manager.close()

    def check_parts_may_change_between_saves(self) -> None:
        rank, size = self.comm.rank, self.comm.size
        manager = self.manager("changing")
        for step, turned in enumerate((False, True, True, False), start=1):
            manager.save(step, State(tensors=parts(step, rank, size, turned)))
            state = globally(99)
            assert manager.restore(State(tensors=state)) == step
            assert bits(state) == bits(globally(step))
        manager.close()

    def check_parts_that_do_not_fit_together(self) -> None:
        rank, size = self.comm.rank, self.comm.size
        manager = self.manager("unfit")
        if size == 1:
            return
        state = parts(1, rank, size)
        if rank == size - 1:
            state["rows"] = Shard(torch.zeros(1, COLUMNS), Box((ROWS, COLUMNS), (0, 0), (1, COLUMNS)))
        message = self.fails(SaveFailed, partial(manager.save, 1, State(tensors=state)))
        words = f"of tensors/rows: float32[{ROWS}, {COLUMNS}] is in different parts of rank 0 and rank {size - 1}"
        assert words in message, message
        if rank == size - 1:
            state["rows"] = Shard(torch.zeros(0, 7), Box((ROWS, 7), (0, 0), (0, 7)))
        message = self.fails(SaveFailed, partial(manager.save, 1, State(tensors=state)))
        assert f"rank {size - 1} and rank 0 hold different tensors" in message and "tensors/rows" in message
        manager.save(1, State(tensors=parts(1, rank, size)))
        whole = globally(1)
        whole["flat"] = whole["flat"][1:]
        assert "tensors/flat is float64[60, 83] here" in self.fails(
            DataError, lambda: manager.restore(State(tensors=whole))
        )
        manager.close()


if __name__ == "__main__":
    run_checks(Checks)
