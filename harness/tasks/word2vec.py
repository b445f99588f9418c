"""Word vectors: skip-gram with negative sampling (Mikolov et al. 2013, arXiv:1310.4546), with sparse gradients.

Text is a file or a folder, text8's one long line included; by default it is the docstrings and comments of the standard
library. Nearest neighbours are printed as it learns; at the end vectors are written in word2vec's text format and for
TensorBoard's projector. One sample is a word of the text with one word from its window and `negatives` random ones.

    task: {name: word2vec, args: {text: text8, min_count: 5, subsample: 1e-4, width: 200}}
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from harness.errors import ConfigError, DataError
from harness.order import Ids, Seeds, sample_seeds, uniform
from harness.rundir import storage_errors
from harness.task import Split, Task
from harness.tasks.text import read_text, standard_prose
from harness.units import Size

HELD_OUT = 0.05
"""Part of the words, at the end of the text, that is evaluated on."""
PROJECTED = 10_000
"""The most frequent words that go to TensorBoard's projector, which runs in a browser."""
PROBES = ("file", "error", "string", "number", "thread", "true")
"""Words whose neighbours are shown for the default text; for other texts, words of some frequencies."""

WORD = re.compile(r"[^\W\d_]+")
Triple = tuple[Tensor, Tensor, Tensor]
"""Centre (samples,), context (samples,), negatives (samples, negatives): word numbers, int64."""


@dataclass(frozen=True)
class Vocabulary:
    """Words by falling frequency, ties by spelling; `counts` int64 (words,)."""

    words: list[str]
    counts: NDArray[np.int64]
    numbers: dict[str, int] = field(repr=False)


def read_words(text: str, *, min_count: int, most: int) -> tuple[Vocabulary, NDArray[np.int32]]:
    """The vocabulary and the text as word numbers; words seen fewer than `min_count` times are left out.

    A word is a run of letters; case is dropped. Raises DataError when no word is left.
    """
    seen: defaultdict[str, int] = defaultdict(count().__next__)  # numbers in the order of appearance
    stream = np.fromiter((seen[match[0]] for match in WORD.finditer(text.lower())), np.int32)
    spelled = list(seen)
    counts = np.bincount(stream, minlength=len(spelled))
    kept = sorted((-int(counts[n]), spelled[n], n) for n in np.flatnonzero(counts >= min_count))[:most]
    if len(kept) < 2:
        raise DataError(
            f"the text has {len(spelled)} different words, of which {len(kept)} occur {min_count} times or more",
            hint="give more text, or a smaller task.args.min_count",
        )
    new = np.full(len(spelled), -1, np.int32)
    new[[n for _, _, n in kept]] = np.arange(len(kept))
    stream = new[stream]
    words = [word for _, word, _ in kept]
    vocabulary = Vocabulary(words, np.array([-c for c, _, _ in kept]), {word: n for n, word in enumerate(words)})
    return vocabulary, stream[stream >= 0]


def thin_out(stream: NDArray[np.int32], counts: NDArray[np.int64], threshold: float) -> NDArray[np.int32]:
    """Leave out frequent words at random, as word2vec.c does: one of frequency f stays with sqrt(t/f) + t/f.

    Which ones is fixed for the text, so that samples can be counted and permuted.
    """
    if threshold <= 0:
        return stream
    ratio = threshold * counts.sum() / counts
    chance = np.sqrt(ratio) + ratio
    parts = []
    for start in range(0, len(stream), 1 << 20):
        part = stream[start : start + (1 << 20)]
        draws = uniform(sample_seeds(0, start, start + len(part)), 1)[:, 0]
        parts.append(part[draws < chance[part]])
    return np.concatenate(parts)


@dataclass(frozen=True)
class SkipGrams:
    """One sample per word of `stream`; its context and negatives are drawn from the sample's seed, anew on each visit.

    Nearer words are drawn more often, as by word2vec.c's random window: distance d with a weight of window + 1 - d.
    """

    stream: Tensor  # int32
    window: int
    negatives: int
    noise: Tensor  # float64 (words,): cumulative chances of being a negative

    def __len__(self) -> int:
        return len(self.stream)

    def batch(self, ids: Ids, seeds: Seeds) -> Triple:
        draws = uniform(seeds, 2 + self.negatives)
        weights = np.cumsum(np.arange(self.window, 0, -1))
        distance = 1 + np.searchsorted(weights, draws[:, 0] * weights[-1], side="right")
        there = ids + np.where(draws[:, 1] < 0.5, -distance, distance)
        outside = (there < 0) | (there >= len(self))
        there = np.clip(np.where(outside, 2 * ids - there, there), 0, len(self) - 1)  # the other side then
        noise = torch.searchsorted(self.noise, torch.from_numpy(draws[:, 2:].copy()), right=True)
        return self.stream[torch.from_numpy(ids)].long(), self.stream[torch.from_numpy(there)].long(), noise


class Word2Vec(Task):
    """Skip-gram over the words of `text`. Choose an optimizer that takes sparse gradients: sgd, adagrad, SparseAdam."""

    def __init__(
        self,
        text: str | None = None,
        width: int = 100,
        window: int = 5,
        negatives: int = 5,
        min_count: int = 5,
        subsample: float = 1e-3,
        most_words: int = 100_000,
        limit: Size = 1_000_000_000,
        probes: list[str] | None = None,
    ) -> None:
        if min(width, window, negatives, min_count) < 1:
            raise ConfigError("task.args: width, window, negatives and min_count are at least 1")
        raw = standard_prose(limit=limit) if text is None else read_text(text, limit=limit)
        self.vocabulary, stream = read_words(raw.decode(errors="replace"), min_count=min_count, most=most_words)
        stream = thin_out(stream, self.vocabulary.counts, subsample)
        if len(stream) < 2 / HELD_OUT:
            raise DataError(f"{len(stream)} words are left of the text, too few to hold out 5 %", hint="give more text")
        self.stream = torch.from_numpy(stream)
        self.boundary = len(stream) - int(len(stream) * HELD_OUT)
        self.width, self.window, self.negatives = width, window, negatives
        chances = self.vocabulary.counts**0.75
        self.noise = torch.from_numpy(np.cumsum(chances) / chances.sum())
        self.noise[-1] = 1.0
        known = [word for word in (PROBES if probes is None else probes) if word in self.vocabulary.numbers]
        if text is not None and probes is None:
            known = [self.vocabulary.words[n] for n in (100, 200, 400, 800, 1600) if n < len(self.vocabulary.words)]
        self.probes = known

    def model(self) -> nn.Module:
        # the default, but torch warns until it is said aloud
        torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
        return SkipGram(len(self.vocabulary.words), self.width)

    def data(self, split: Split) -> SkipGrams:
        part = slice(None, self.boundary) if split == "train" else slice(self.boundary, None)
        return SkipGrams(self.stream[part], self.window, self.negatives, self.noise)

    def loss(self, model: nn.Module, batch: Triple) -> Tensor:
        centre, context, negatives = batch
        near, far = model(centre, context, negatives)
        far_cost = F.softplus(far).masked_fill(negatives == context[:, None], 0.0)  # a negative that is none
        return (F.softplus(-near) + far_cost.sum(1)).mean()

    def report(self, model: nn.Module) -> str | None:
        """Each probe with its five nearest neighbours by cosine."""
        if not self.probes:
            return None
        found = neighbours(vectors(model), [self.vocabulary.numbers[word] for word in self.probes], 5)
        return "\n".join(
            f"nearest to {word}: {', '.join(self.vocabulary.words[n] for n in near)}"
            for word, near in zip(self.probes, found, strict=True)
        )

    def export(self, model: nn.Module, directory: Path) -> str:
        """`vectors.txt`, and `tensorboard/` with tensors.tsv, metadata.tsv and projector_config.pbtxt."""
        table = vectors(model).numpy()
        projector = directory / "tensorboard"
        with storage_errors(directory):
            projector.mkdir(exist_ok=True)
            with open(directory / "vectors.txt", "w", encoding="utf-8") as file:
                file.write(f"{len(table)} {self.width}\n")
                named = zip(self.vocabulary.words, table, strict=True)
                _write_rows(file, ((word, *_numbers(row)) for word, row in named), " ")
            with open(projector / "tensors.tsv", "w", encoding="utf-8") as file:
                _write_rows(file, (tuple(_numbers(row)) for row in table[:PROJECTED]), "\t")
            with open(projector / "metadata.tsv", "w", encoding="utf-8") as file:
                file.write("word\tcount\n")
                counts = zip(self.vocabulary.words[:PROJECTED], self.vocabulary.counts[:PROJECTED], strict=True)
                _write_rows(file, ((word, str(number)) for word, number in counts), "\t")
            (projector / "projector_config.pbtxt").write_text(PROJECTOR, encoding="utf-8")
        return f"{len(table)} word vectors: {directory / 'vectors.txt'}; to see them: tensorboard --logdir {projector}"


PROJECTOR = """embeddings {
  tensor_name: "word2vec"
  tensor_path: "tensors.tsv"
  metadata_path: "metadata.tsv"
}
"""


class SkipGram(nn.Module):
    """Two tables of vectors, (words, width); `centre` are the word vectors. Gradients are sparse."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.centre = nn.Embedding(words, width, sparse=True)
        self.context = nn.Embedding(words, width, sparse=True)
        nn.init.uniform_(self.centre.weight, -0.5 / width, 0.5 / width)  # as word2vec.c
        nn.init.zeros_(self.context.weight)

    def forward(self, centre: Tensor, context: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (samples,) of the pairs, and (samples, negatives) of the centres with the negatives."""
        vector = self.centre(centre)
        others = self.context(torch.cat([context[:, None], negatives], 1))
        scores = torch.einsum("sw,sow->so", vector, others)
        return scores[:, 0], scores[:, 1:]


def vectors(model: nn.Module) -> Tensor:
    """The word vectors on the CPU, float32 (words, width)."""
    centre = model.get_submodule("centre")
    assert isinstance(centre, nn.Embedding)
    return centre.weight.detach().float().cpu()


def neighbours(table: Tensor, words: list[int], most: int) -> list[list[int]]:
    """For each word the numbers of the `most` nearest others by cosine, nearest first."""
    unit = F.normalize(table, dim=1)
    likeness = unit[words] @ unit.T
    likeness[torch.arange(len(words)), words] = -2.0
    found: list[list[int]] = likeness.topk(min(most, len(table) - 1), dim=1).indices.tolist()
    return found


def _numbers(row: NDArray[np.float32]) -> Iterator[str]:
    return (f"{number:.6g}" for number in row)


def _write_rows(file: IO[str], rows: Iterable[tuple[str, ...]], separator: str) -> None:
    file.writelines(separator.join(row) + "\n" for row in rows)
