"""Stop anywhere in an epoch, go on with the next sample, on any number of ranks: torch's sampler and a count.

The count says how many samples of the epoch all ranks have used together; it is part of the state. torch's sampler
deals one permutation per epoch out in turn, so that what has been used is a beginning of it, however many ranks there
were, and the rest can be dealt out to any number of ranks: none is lost, none comes twice.

Random numbers that are drawn while training (dropout, augmentation) belong to the state as well: `rng=Rng()`.
A DataLoader draws one of torch's numbers whenever it is begun, so it gets a generator of its own.
"""

import argparse
import json
from pathlib import Path

import horovod.torch as hvd
import torch
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from harness.checkpoint import Manager, Rng, State, every


class Remaining(DistributedSampler):
    """torch's sampler for what is left of an epoch after the first `used` samples, of all ranks together."""

    used = 0

    def __iter__(self):
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        end = self.used + len(self) * self.num_replicas  # as many for every rank: some of the first ones come again
        return iter(torch.cat([order, order])[self.used + self.rank : end : self.num_replicas].tolist())

    def __len__(self):
        return -(-(len(self.dataset) - self.used) // self.num_replicas)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=6, help="of all ranks together")
    parser.add_argument("--stop-after", type=int, default=10**9, help="steps, to be continued by another start")
    args = parser.parse_args()
    hvd.init()
    torch.manual_seed(1)

    ids = torch.arange(60)
    data = TensorDataset(ids, torch.stack([ids / 60, (ids % 7) / 7], 1))
    sampler = Remaining(data, num_replicas=hvd.size(), rank=hvd.rank())
    loader = DataLoader(data, args.batch // hvd.size(), sampler=sampler, generator=torch.Generator())
    model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

    progress = {"epoch": 0, "used": 0}
    manager = Manager(args.directory / "checkpoints", save=every(steps=1), busy="wait")
    state = State(model=model, optimizer=optimizer, progress=progress, rng=Rng(seed=1))
    step = manager.restore(state) or 0
    with (args.directory / f"used-{step}-{hvd.size()}-{hvd.rank()}.json").open("w") as log:
        while progress["epoch"] < args.epochs and step < args.stop_after:
            sampler.set_epoch(progress["epoch"])
            sampler.used = progress["used"]
            for numbers, inputs in loader:
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                optimizer.step()
                step += 1
                progress["used"] += args.batch
                if progress["used"] >= len(data):
                    progress.update(epoch=progress["epoch"] + 1, used=0)
                print(json.dumps([step, numbers.tolist()]), file=log)
                manager.step(step, state)
                if step == args.stop_after:
                    break
    manager.close()
    if hvd.rank() == 0:
        torch.save(model.state_dict(), args.directory / f"model-{step}.pt")


if __name__ == "__main__":
    main()
