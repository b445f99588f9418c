"""What all ranks of a job do together with checkpoints. Started by `test_checkpoint_ranks.py` under a real launcher:

python ranks_checkpoint.py DIRECTORY mpi|gloo

Every function called `check_...` is one test, run in turn by all ranks; the first failure ends the job.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if len(sys.argv) > 2 and sys.argv[2] == "mpi":
    import mpi4py.MPI  # noqa: F401  (as the harness does: before torch)

import torch
from ending import all_or_none
from samples import Net, bits, train

from harness.checkpoint import Horovod, Manager, Mpi, SaveFailed, State, detect, keep_all, open_checkpoint
from harness.checkpoint.comm import Comm
from harness.checkpoint.engines import EngineName
from harness.checkpoint.store import read_manifest
from harness.errors import DataError, InternalError, Unavailable, UsageError


def big_state(seed: int) -> dict[str, Any]:
    """A state of about 3 MB: every rank has blocks to write, and one tensor is most of it."""
    model = Net(seed)
    optimizer = torch.optim.Adam(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "most": torch.randn(701, 997, generator=generator),
        "wide": torch.randn(13, 17, 19, generator=generator, dtype=torch.complex128),
        "half": torch.randn(33_333, generator=generator).to(torch.bfloat16),
        "flags": torch.randint(0, 2, (4099,), generator=generator).bool(),
        "scalar": torch.tensor(float(seed)),
    }
    return {"model": model, "optimizer": optimizer, "tensors": tensors, "extra": {"seed": seed}}


def trained_state(seed: int = 1) -> dict[str, Any]:
    """The same bits in any process: nothing in it depends on the order of a sum."""
    state = big_state(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        for parameter in state["model"].parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state["optimizer"].step()
    state["model"].norm.running_mean.copy_(torch.randn(6, generator=generator))
    return state


def as_bits(state: dict[str, Any]) -> dict[str, Any]:
    return bits({name: item.state_dict() if hasattr(item, "state_dict") else item for name, item in state.items()})


def fails_at(at: int, original: Callable[..., Any], *, late: bool) -> Callable[..., Any]:
    """A function whose call number `at` fails: before it does anything, or `late`, after."""
    calls = itertools.count()

    def call(*args: Any, **options: Any) -> Any:
        fails = next(calls) == at
        result = None if fails and not late else original(*args, **options)
        if fails:
            raise OSError(5, "Input/output error")
        return result

    return call


class Checks:
    """The checks, with what they share."""

    def __init__(self, comm: Comm, root: Path) -> None:
        self.comm, self.root = comm, root
        self.engines: list[EngineName] = ["direct"] if comm.mpi is None else ["direct", "mpio"]
        self.all_engines: list[EngineName] = [*self.engines]
        if comm.mpi is not None:
            self.all_engines.append("mpio-collective")
        self.lines: list[str] = []

    def manager(self, name: str, *, fresh: bool = True, **options: Any) -> Manager:
        directory = self.root / name
        if fresh:
            if self.comm.rank == 0:
                shutil.rmtree(directory, ignore_errors=True)
            self.comm.barrier()
        self.lines = []
        return Manager(
            directory, self.comm, log=self.lines.append, **{"keep": keep_all(), "background": False, **options}
        )

    def everywhere(self, value: Any) -> list[Any]:
        return self.comm.all_gather(value)

    def fails(self, kind: type[Exception], work: Callable[[], Any]) -> str:
        """All ranks raise this, with the same words."""
        try:
            work()
        except kind as error:
            words = self.everywhere(str(error))
        else:
            words = self.everywhere(None)
        assert len(set(words)) == 1 and words[0], words
        return str(words[0])

    def check_comm(self) -> None:
        comm = self.comm
        assert comm.broadcast({"from": comm.rank} if comm.rank == 0 else None) == {"from": 0}
        assert comm.all_gather("x" * comm.rank) == ["x" * rank for rank in range(comm.size)]
        self.fails(InternalError, lambda: comm.all_gather(object() if comm.rank == comm.size - 1 else 1))
        self.fails(InternalError, lambda: comm.broadcast(object() if comm.rank == 0 else None))
        comm.barrier()

    def check_saves_of_all_worlds_and_engines_are_the_same_file(self) -> None:
        original = uuid.uuid4
        uuid.uuid4 = lambda: uuid.UUID(int=7)  # type: ignore[assignment]
        try:
            for engine in self.all_engines:
                manager = self.manager(f"saved-by-{self.comm.size}-{engine}", engine=engine)
                path = manager.save(5, State(**trained_state()))
                if self.comm.rank == 0:
                    single = self.root / "saved-by-1-direct" / path.name / "data.h5"
                    assert single.read_bytes() == (path / "data.h5").read_bytes(), engine
                    with open_checkpoint(path) as checkpoint:
                        assert checkpoint.manifest.world == self.comm.size
                        assert checkpoint.manifest.info["engine"] == engine
                        assert checkpoint.verify() == []
        finally:
            uuid.uuid4 = original

    def check_any_world_restores_what_any_other_saved(self) -> None:
        expected = as_bits(trained_state())
        found = self.comm.broadcast(sorted(path.name for path in self.root.glob("saved-by-*")))
        assert len(found) >= 2  # type: ignore[arg-type]
        for name in found:  # type: ignore[union-attr]
            state = big_state(seed=99)
            assert self.manager(name, fresh=False).restore(State(**state)) == 5
            assert as_bits(state) == expected, name

    def check_training_goes_on(self) -> None:
        straight = trained_state()
        train(straight["model"], straight["optimizer"], range(2, 4))
        for engine in self.engines:
            manager = self.manager("training", engine=engine)
            manager.save(2, State(**trained_state()))
            state = big_state(seed=3)
            manager.restore(State(**state))
            train(state["model"], state["optimizer"], range(2, 4))
            assert as_bits(state) == as_bits(straight)

    def check_horovods_optimizer(self) -> None:
        hvd = sys.modules.get("horovod.torch")
        if hvd is None:
            return  # only the jobs without MPI have Horovod here; the training loop's tests have both

        def make(seed: int) -> dict[str, Any]:
            model = Net(seed)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            return {"model": model, "optimizer": hvd.DistributedOptimizer(optimizer, model.named_parameters())}

        straight = make(1)
        train(straight["model"], straight["optimizer"], range(2))
        manager = self.manager("horovod")
        manager.save(2, State(**straight))
        resumed = make(2)
        assert manager.restore(State(**resumed)) == 2
        assert as_bits(resumed) == as_bits(straight)
        for state in (straight, resumed):
            train(state["model"], state["optimizer"], range(2, 5))
        assert as_bits(resumed) == as_bits(straight)

    def check_buffers_may_differ_and_are_those_of_rank_0(self) -> None:
        for engine in self.engines:
            manager = self.manager("buffers", engine=engine)
            state = trained_state()
            state["model"].norm.running_mean += self.comm.rank
            state["extra"]["rank"] = self.comm.rank
            manager.save(1, State(**state))
            assert not self.lines
            restored = big_state(seed=3)
            manager.restore(State(**restored))
            assert restored["extra"] == {"seed": 1, "rank": 0}
            assert as_bits(restored) == as_bits({**trained_state(), "extra": {"seed": 1, "rank": 0}})

    def check_unequal_replicas_are_found(self) -> None:
        last = self.comm.size - 1
        for engine in self.engines:
            manager = self.manager("unequal", engine=engine)
            state = trained_state()
            if self.comm.rank == last:
                state["tensors"]["most"][5, 5] += 1
                state["optimizer"].state[state["model"].norm.weight]["exp_avg"].zero_()
            manager.save(1, State(**state))
            if self.comm.rank == 0:
                (line,) = self.lines
                assert f"rank {last} differs from rank 0" in line
                assert line.partition(" in ")[2].startswith("optimizer/norm.weight/exp_avg, tensors/most; the copy")
            restored = big_state(seed=3)
            manager.restore(State(**restored))
            assert as_bits(restored) == as_bits(trained_state())
            strict = self.manager("unequal", engine=engine, strict=True)
            message = self.fails(SaveFailed, lambda: strict.save(2, State(**state)))  # noqa: B023
            assert f"rank {last} differs from rank 0 in optimizer/norm.weight/exp_avg" in message
            assert not (self.root / "unequal" / "step-00000002").exists()

    def check_a_failure_on_one_rank_is_told_to_all(self) -> None:
        from harness.checkpoint import collecting, saving, writing

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise OSError(28, "No space left on device", "somewhere")

        def crash(*args: Any, **kwargs: Any) -> Any:
            raise ZeroDivisionError("a bug")

        for engine in self.all_engines:
            manager = self.manager("failure", engine=engine)
            manager.save(1, State(**trained_state()))
            moving = sys.modules[type(manager.engine).__module__]
            places = [
                (collecting, "take", self.comm.size - 1),
                (writing, "wait_for", self.comm.size - 1),
                (moving, "block_digests", self.comm.size - 1),
                (saving.Staging, "fill", 0),
                (writing.commit, "begin", 0),
                (writing.commit, "seal", 0),
                (writing.commit, "publish", 0),
                (writing, "render", 0),
            ]
            for where, name, victim in places:
                for action, words in ((fail, "No space left on device"), (crash, "ZeroDivisionError: a bug")):
                    original = getattr(where, name)
                    if self.comm.rank == victim:
                        setattr(where, name, action)
                    message = self.fails(SaveFailed, partial(manager.save, 2, State(**trained_state(2))))
                    setattr(where, name, original)
                    assert f"rank {victim} on" in message and words in message, message
            left = self.everywhere(sorted(path.name for path in (self.root / "failure").glob("step-*")))
            assert left[0] == ["step-00000001"], left
            state = big_state(seed=3)
            assert manager.restore(State(**state)) == 1
            manager.save(2, State(**trained_state(2)))
            assert manager.restore(State(**state)) == 2
            assert as_bits(state) == as_bits(trained_state(2))

    def check_a_transfer_that_fails_in_the_middle(self) -> None:
        """Of mpio: other ranks are in the same collective transfer, or in later ones, and do not wait for ever."""
        for engine in self.all_engines[1:]:
            manager = self.manager("transfer", engine=engine)
            moving = sys.modules[type(manager.engine).__module__]
            original, calls = moving._move, itertools.count()

            def counted(*args: Any, original: Any = original, calls: Any = calls, **options: Any) -> None:
                next(calls)
                original(*args, **options)

            moving._move = counted
            manager.save(1, State(**trained_state()))
            moving._move = original
            made: Any = self.everywhere(next(calls))
            cases = [(victim, at) for victim in {0, self.comm.size - 1} for at in {0, made[victim] - 1}]
            for name, (victim, at) in itertools.product(("block_digests", "_move"), cases):
                original = getattr(moving, name)
                if self.comm.rank == victim:
                    setattr(moving, name, fails_at(at, original, late=name == "_move"))
                message = self.fails(SaveFailed, partial(manager.save, 2, State(**trained_state(2))))
                setattr(moving, name, original)
                assert f"rank {victim} on" in message and "Input/output error" in message, message
            manager.save(2, State(**trained_state(2)))
            state = big_state(seed=3)
            assert manager.restore(State(**state)) == 2
            assert as_bits(state) == as_bits(trained_state(2))

    def check_ranks_that_disagree(self) -> None:
        manager = self.manager("disagree")
        last = self.comm.size - 1
        state = trained_state()
        message = self.fails(SaveFailed, lambda: manager.save(1 + (self.comm.rank == last), State(**state)))
        assert f"rank 0 saves step 1, rank {last} saves step 2" in message
        if self.comm.rank == last:
            state["tensors"]["odd"] = torch.zeros(3)
        message = self.fails(SaveFailed, lambda: manager.save(1, State(**state)))
        assert f"rank {last} and rank 0 hold different tensors" in message and "tensors/odd: float32[3]" in message
        assert not (self.root / "disagree").exists() or not any((self.root / "disagree").glob("step-*"))

    def check_damage_is_seen_by_all(self) -> None:
        manager = self.manager("damage")
        for step in (1, 2):
            manager.save(step, State(**trained_state(step)))
        path = self.root / "damage" / "step-00000002"
        if self.comm.rank == 0:
            data = bytearray((path / "data.h5").read_bytes())
            data[-5000] ^= 1
            (path / "data.h5").write_bytes(data)
        self.comm.barrier()
        state = big_state(seed=3)
        assert manager.restore(State(**state)) == 1
        assert as_bits(state) == as_bits(trained_state(1))
        if self.comm.rank == 0:
            assert "step-00000002 is passed over" in self.lines[0] and "damaged: tensors/" in self.lines[0]
            assert (path / "damaged.json").exists()

    def check_ways_of_reading(self) -> None:
        import harness.checkpoint.delivery as module

        self.manager("reading").save(1, State(**trained_state()))
        original = module._read_together
        for read in ("exchange", "all"):
            calls: list[int] = []
            module._read_together = lambda *a, calls=calls: (calls.append(1), original(*a))[1]  # type: ignore[misc]
            state = big_state(seed=3)
            assert self.manager("reading", fresh=False, read=read).restore(State(**state)) == 1
            module._read_together = original
            assert as_bits(state) == as_bits(trained_state())
            assert bool(calls) == (read == "exchange" and self.comm.mpi is not None and self.comm.size > 1)
        kept = module.PARCEL, module.one_node
        for near, parcel in ((True, 1000), (False, kept[0]), (False, 1000)):
            module.PARCEL, module.one_node = parcel, lambda mpi, near=near: near  # type: ignore[misc]
            state = big_state(seed=3)
            assert self.manager("reading", fresh=False, read="exchange").restore(State(**state)) == 1
            assert as_bits(state) == as_bits(trained_state())
        module.PARCEL, module.one_node = kept
        message = self.fails(UsageError, lambda: self.manager("reading", fresh=False, read="fast"))
        assert "read='fast' is unknown; it is exchange or all" in message

    def check_each_block_is_read_once(self) -> None:
        """By all ranks together, where they exchange."""
        from harness.checkpoint.blocks import Blocks

        path = self.manager("once").save(1, State(**trained_state()), wait=True)
        layout = read_manifest(path).layout
        original, read = Blocks.read, []

        def counting(self: Blocks, first: int, last: int, buffer: Any) -> list[int]:
            read.append(last - first)
            return original(self, first, last, buffer)

        Blocks.read = counting  # type: ignore[method-assign]
        assert self.manager("once", fresh=False).restore(State(**big_state(seed=3))) == 1
        Blocks.read = original  # type: ignore[method-assign]
        readers = 1 if self.comm.mpi is not None else self.comm.size
        assert sum(self.comm.all_gather(sum(read))) == readers * layout.blocks

    def check_a_rank_that_cannot_read(self) -> None:
        from harness.checkpoint.blocks import Blocks

        manager = self.manager("unreadable")
        for step in (1, 2):
            manager.save(step, State(**trained_state(step)))
        original = Blocks.read
        broken = "step-00000002"

        def failing(self: Blocks, first: int, last: int, buffer: Any) -> list[int]:
            if broken in str(self.path):
                raise OSError(5, "Input/output error")
            return original(self, first, last, buffer)

        if self.comm.rank == self.comm.size - 1:
            Blocks.read = failing  # type: ignore[method-assign]
        state = big_state(seed=3)
        step = manager.restore(State(**state))
        Blocks.read = original  # type: ignore[method-assign]
        assert step == 1 and as_bits(state) == as_bits(trained_state(1))
        assert manager.restore(State(**state)) == 2, "nothing was marked: it may have been the rank's fault"

    def check_a_state_that_does_not_fit(self) -> None:
        manager = self.manager("fit")
        manager.save(1, State(**trained_state()))
        state = trained_state(2)
        if self.comm.rank == self.comm.size - 1:
            state["model"].hidden = torch.nn.Linear(6, 7, bias=False)
        message = self.fails(DataError, lambda: manager.restore(State(**state)))
        assert "model/hidden.weight is float32[7, 6] here and float32[6, 6] in the checkpoint" in message
        assert bits(state["tensors"]) == bits(trained_state(2)["tensors"])

    def check_nothing_there(self) -> None:
        assert self.manager("nothing").restore(State(**big_state(1))) is None

    def check_many_saves(self) -> None:
        state = trained_state()
        for engine in self.engines:
            manager = self.manager("many", engine=engine, keep=None)
            for step in range(25):
                state["extra"]["step"] = step
                manager.save(step, State(**state))
                assert manager.restore(State(**state)) == step and state["extra"]["step"] == step
            manager.close()
            names = self.everywhere(sorted(path.name for path in (self.root / "many").glob("step-*")))
            assert names[0] == ["step-00000022", "step-00000023", "step-00000024"]

    def check_engines(self) -> None:
        if self.comm.mpi is None:
            assert "no MPI between these ranks" in self.fails(Unavailable, lambda: self.manager("x", engine="mpio"))
        assert self.manager("x", engine="auto").engine.name == "direct"


def main(kind: type[Checks]) -> None:
    root, world = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    if world == "gloo":
        import horovod.torch as hvd

        hvd.init()
    comm = detect()
    assert isinstance(comm, Mpi if world == "mpi" else Horovod), comm
    checks = kind(comm, root)
    for name in vars(kind):
        if name.startswith("check_"):
            getattr(checks, name)()
            if comm.rank == 0:
                print(f"{name} ok", flush=True)
    comm.barrier()
    if comm.rank == 0:
        print("all checks passed", flush=True)


def run_checks(kind: type[Checks]) -> None:
    """All of them, on all ranks; the first failure ends the job."""
    all_or_none(lambda: main(kind), mpi=len(sys.argv) > 2 and sys.argv[2] == "mpi")


if __name__ == "__main__":
    run_checks(Checks)
