"""Metrics for TensorBoard (the extra `harness[tensorboard]`)."""

from __future__ import annotations

from pathlib import Path

from harness.errors import Unavailable
from harness.sinks import Record


class TensorBoard:
    """Every number of a record as a scalar `kind/name` at the record's step."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise Unavailable(
                "log.tensorboard needs the Python package tensorboard", hint="pip install 'harness[tensorboard]'"
            ) from error
        self.writer = SummaryWriter(str(directory))

    def record(self, record: Record) -> None:
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                self.writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        self.writer.close()
