"""Train a classifier of digits with Horovod; all ranks save it together, and it goes on after any step."""

import argparse
from itertools import islice

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from harness.checkpoint import Manager, State, at_end, every, on_stop


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(8, 16, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(16)
        self.out = torch.nn.Linear(16 * 2 * 2, 10)

    def forward(self, images):
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.norm(self.conv2(x))), 2)
        return self.out(x.flatten(1))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoints", default="checkpoints")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.02)
    args = parser.parse_args()

    hvd.init()
    torch.manual_seed(42)
    torch.set_num_threads(1)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    train = TensorDataset(images, torch.tensor(digits.target))
    sampler = DistributedSampler(train, num_replicas=hvd.size(), rank=hvd.rank())
    loader = DataLoader(train, batch_size=args.batch, sampler=sampler)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr * hvd.size(), momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

    manager = Manager(args.checkpoints, save=every(steps=20) | on_stop() | at_end())
    state = State(model=model, optimizer=optimizer)
    step = manager.restore(state) or 0
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    for epoch in range(step // len(loader), args.epochs):
        sampler.set_epoch(epoch)
        for inputs, targets in islice(loader, step % len(loader), None):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            step += 1
            if manager.step(step, state):
                manager.close()
                return
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
    manager.close()


if __name__ == "__main__":
    main()
