"""One rank of `test_data.test_workers_under_mpi`: loader processes beside a process that uses MPI."""

from __future__ import annotations

import os


def main() -> None:
    from harness.data import start_forkserver

    start_forkserver()
    from mpi4py import MPI
    from test_data import Where, load

    from harness.batch import plan_batch
    from harness.order import Order

    comm = MPI.COMM_WORLD
    plan = plan_batch(global_batch=8, ranks=comm.size, micro_batch=2)
    batches = list(load(Where(), workers=2, rank=comm.rank, plan=plan))
    for batch in batches:
        process, parent, initialised = batch.data.tolist()
        assert os.getpid() not in (process, parent)
        assert not initialised
    parts = comm.allgather([number for batch in batches for number in batch.ids.tolist()])
    ids = [number for part in parts for number in part]
    loaders = {int(number) for part in comm.allgather([batch.data[0] for batch in batches]) for number in part}
    assert sorted(ids) == sorted(Order(20, seed=3).ids(0, 48).tolist())
    if comm.rank == 0:
        print(f"rank 0: all {len(ids)} samples, loaded by {len(loaders)} other processes", flush=True)
    comm.Barrier()


if __name__ == "__main__":
    main()
