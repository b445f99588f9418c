"""Language models over bytes: `charlm`, a small GPT, and `rnn`, an LSTM, on the same text and with the same measure.

The last 5 % of the text is held out; its cost in bits per byte is exact (every byte is predicted once) and stands
beside what xz needs for the same bytes.

    task: {name: charlm, args: {text: books/, layers: 6, width: 256, heads: 8, block: 256}}
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.errors import ConfigError
from harness.order import Ids, Seeds
from harness.parallel.groups import ALONE, Group
from harness.parallel.tensor import (
    ColumnLinear,
    RowLinear,
    VocabEmbedding,
    columns,
    cross_entropy,
    dropout_mask,
    whole_logits,
)
from harness.task import Split, Task
from harness.tasks.text import read_text
from harness.units import Size

HELD_OUT = 0.05
"""Part of the text, at its end, that is evaluated on."""

Pair = tuple[Tensor, Tensor]
"""Bytes and the bytes that follow them, both int64 (samples, block)."""


@dataclass(frozen=True)
class Windows:
    """Windows of `block` bytes of text[start:stop], with the byte before the first as context.

    With `shift` (for training) each visit moves a window by 0 to block - 1 bytes, drawn from the sample's seed;
    without, windows lie side by side and every byte from `start` on is predicted exactly once.
    """

    text: Tensor  # uint8; a tensor, as loader processes share tensors' memory
    start: int
    stop: int
    block: int
    shift: bool

    def __len__(self) -> int:
        return (self.stop - self.start) // self.block

    def batch(self, ids: Ids, seeds: Seeds) -> Pair:
        begin = self.start + ids * self.block
        if self.shift:
            moved = begin + (seeds % np.uint64(self.block)).astype(np.int64)
            begin = np.minimum(moved, self.stop - self.block)
        at = torch.from_numpy(begin)[:, None] + torch.arange(-1, self.block)
        window = self.text[at].long()
        return window[:, :-1], window[:, 1:]


class CharLM(Task):
    """A byte-level GPT: pre-norm blocks, rotary positions, causal attention.

    `text` is a file or a folder (None: the standard library's sources), of which at most `limit` bytes are used.
    """

    def __init__(
        self,
        text: str | None = None,
        block: int = 128,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        dropout: float = 0.0,
        limit: Size = 4_000_000,
    ) -> None:
        if min(block, layers, width, heads) < 1:
            raise ConfigError("task.args: block, layers, width and heads are at least 1")
        self.block, self.layers, self.width, self.heads, self.dropout = block, layers, width, heads, dropout
        self.text = torch.frombuffer(bytearray(read_text(text, limit=limit)), dtype=torch.uint8)
        self.held_out = int(len(self.text) * HELD_OUT) // block * block
        if self.held_out == 0:
            raise ConfigError(
                f"the text of {len(self.text)} bytes is too short: 5 % of it must fill a block of {block}",
                hint=f"give at least {math.ceil(block / HELD_OUT)} bytes, or a smaller task.args.block",
            )

    def model(self) -> nn.Module:
        if self.width % (2 * self.heads):
            below = max(self.width // (2 * self.heads), 1) * 2 * self.heads
            raise ConfigError(
                f"task.args.width {self.width} does not divide into pairs for {self.heads} heads",
                hint=f"use width={below} or {below + 2 * self.heads}",
            )
        if self.heads % self.model_group.size:
            raise ConfigError(
                f"parallel.model {self.model_group.size} does not divide task.args.heads {self.heads}",
                hint="each rank has some of the heads",
            )
        return GPT(self.layers, self.width, self.heads, self.dropout)

    def data(self, split: Split) -> Windows:
        boundary = len(self.text) - self.held_out
        if split == "train":
            return Windows(self.text, 1, boundary, self.block, shift=True)
        return Windows(self.text, boundary, len(self.text), self.block, shift=False)

    def sequence(self, model: nn.Module) -> list[nn.Module]:
        return model.layers() if isinstance(model, GPT) else super().sequence(model)

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        before, after = batch
        return cross_entropy(model(before).flatten(0, 1), after.flatten(), self.model_group)

    def summarize(self, model: nn.Module, metrics: Mapping[str, float]) -> Mapping[str, float]:
        return {"bits_per_byte": metrics["loss"] / math.log(2), "xz_bits_per_byte": self.xz_bits_per_byte}

    @cached_property
    def xz_bits_per_byte(self) -> float:
        """What xz -9 makes of the held-out bytes alone. It learns from those; the model has seen only the others."""
        held_out = self.text[-self.held_out :].numpy().tobytes()
        return 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)

    def report(self, model: nn.Module) -> str:
        """A line that the model writes."""
        prompt = self.text[-self.held_out - 64 : -self.held_out].long()
        text = (
            bytes(write(model, prompt, count=100, block=self.block, group=self.model_group))
            .decode(errors="replace")
            .replace("\n", "⏎")
        )
        return "sample: " + "".join(letter if letter.isprintable() and letter != "\ufffd" else "·" for letter in text)


class CharRNN(CharLM):
    """The same with an LSTM or GRU of `layers` layers; each window starts from a zero state."""

    def __init__(
        self,
        text: str | None = None,
        block: int = 128,
        layers: int = 1,
        width: int = 256,
        cell: Literal["lstm", "gru"] = "lstm",
        dropout: float = 0.0,
        limit: Size = 4_000_000,
    ) -> None:
        super().__init__(text, block, layers, width, 1, dropout, limit)
        if cell not in ("lstm", "gru"):
            raise ConfigError(f"task.args.cell is {cell!r}", hint="use lstm or gru")
        self.cell = cell

    def model(self) -> nn.Module:
        return RNN(self.layers, self.width, self.cell, self.dropout)


class GPT(nn.Module):
    """int64 (samples, time) -> logits (samples, time, 256). After Radford et al. 2019 (GPT-2).

    Its layers can be cut over ranks (`parallel/tensor.py`): each then has some of the heads, and some of the logits.
    """

    def __init__(self, layers: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.token = VocabEmbedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = ColumnLinear(width, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attention.out.weight", "shrink.weight"))
                deviation = 0.5 / math.sqrt(parameter.shape[1])
                nn.init.normal_(parameter, std=deviation / math.sqrt(2 * layers) if residual else deviation)
        nn.init.normal_(self.head.weight, std=0.02)  # no opinion at first

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens
        for layer in self.layers():
            x = layer(x)
        return x

    def layers(self) -> list[nn.Module]:
        """In the order in which each takes what the one before returns."""
        return [self.token, *self.blocks, self.norm, self.head]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the mlp's activation is relu squared (So et al. 2021)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.before_attention, self.before_expand = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.expand, self.shrink = ColumnLinear(width, 4 * width), RowLinear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.before_attention(x)))
        expanded = F.relu(self.expand(self.before_expand(x))).square()
        out: Tensor = x + self.dropout(self.shrink(expanded))
        return out


class Attention(nn.Module):
    """Causal self-attention with rotary positions, (samples, time, width) -> the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.of_head, self.dropout = width // heads, dropout
        self.q, self.k, self.v = (ColumnLinear(width, width) for _ in range(3))
        self.out = RowLinear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        turns = rotations(x.shape[1], self.of_head // 2, x.device)
        parts = columns(x, self.q, self.k, self.v)
        q, k, v = (part.view(*part.shape[:2], -1, self.of_head).transpose(1, 2) for part in parts)
        mixed = self.mix(turn(q, turns), turn(k, turns), v)
        joined: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return joined

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k' / sqrt(d)) v over earlier positions; each (samples, heads of this rank, time, d)."""
        if not (self.training and self.dropout):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        chances = (q @ k.transpose(-1, -2) / math.sqrt(self.of_head)).masked_fill(later, -math.inf).softmax(-1)
        return chances * dropout_mask(chances.shape, 1, self.dropout, self.q.group, chances) @ v


def rotations(time: int, pairs: int, device: torch.device) -> Pair:
    """Cosines and sines (time, pairs) of rotary positions: Su et al. 2021, arXiv:2104.09864."""
    speed = 1000.0 ** -(torch.arange(pairs, device=device) / pairs)
    angle = torch.arange(time, device=device)[:, None] * speed
    return angle.cos(), angle.sin()


def turn(x: Tensor, turns: Pair) -> Tensor:
    """Each pair of x (..., time, 2 * pairs) turned by its position's angle: products then know distances only."""
    a, b = x.chunk(2, -1)
    cos, sin = (part.to(x.dtype) for part in turns)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class RNN(nn.Module):
    """int64 (samples, time) -> logits (samples, time, 256)."""

    def __init__(self, layers: int, width: int, cell: str, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        kind = nn.LSTM if cell == "lstm" else nn.GRU
        self.cells = kind(width, width, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.cells(self.token(tokens))
        logits: Tensor = self.head(states)
        return logits


@torch.no_grad()
def write(
    model: nn.Module, prompt: Tensor, *, count: int, block: int, heat: float = 0.7, group: Group = ALONE
) -> list[int]:
    """`count` bytes that follow the int64 vector `prompt`, drawn at temperature `heat`, with a generator of its own.

    Collective in the group that the model is cut over.
    """
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)
    was_training = model.training
    model.eval()
    tokens = prompt.tolist()
    for _ in range(count):
        logits = whole_logits(model(torch.tensor([tokens[-block:]], device=device))[0, -1], group)
        chances = torch.softmax(logits.float().cpu() / heat, dim=0)
        tokens.append(int(torch.multinomial(chances, 1, generator=draw)))
    model.train(was_training)
    return tokens[len(prompt) :]
