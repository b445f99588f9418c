"""The tasks on text: language models and word vectors learn, their measures are exact, their files can be read."""

from __future__ import annotations

import lzma
import math
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import config, evaluate, train

from harness.errors import ConfigError, DataError, InputMissing
from harness.order import sample_seeds
from harness.tasks import text as texts
from harness.tasks.charlm import GPT, CharLM, CharRNN, Windows, rotations, turn, write
from harness.tasks.word2vec import SkipGrams, Word2Vec, neighbours, read_words, thin_out, vectors


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_windows_predict_each_held_out_byte_once() -> None:
    task = CharLM(block=16, layers=1, width=8, heads=1, limit=10_000)
    data = task.data("eval")
    before, after = data.batch(np.arange(len(data)), sample_seeds(0, 0, len(data)))
    whole = task.text.numpy().tobytes()
    assert bytes(after.flatten().tolist()) == whole[-task.held_out :]
    assert bytes(before.flatten().tolist()) == whole[-task.held_out - 1 : -1]
    assert 0.045 * len(whole) < task.held_out <= 0.05 * len(whole)


def test_training_windows_move_and_stay_in_the_training_text() -> None:
    data = Windows(torch.arange(103).to(torch.uint8), 1, 99, block=8, shift=True)
    begins = set()
    for visit in range(200):
        before, after = data.batch(np.arange(len(data)), sample_seeds(visit, 0, len(data)))
        assert torch.equal(before[:, 1:], after[:, :-1])
        assert torch.equal(before + 1, after), "the text counts"
        begins |= set(after[:, 0].tolist())
    assert len(data) == 12
    assert begins == set(range(1, 92)), "every place that leaves room for a block, and none that reaches further"


def test_bits_per_byte_are_those_of_the_held_out_text() -> None:
    """An untrained model with a bias for what it has counted: its cost is the cross entropy worked out by hand."""
    task = CharLM(block=16, layers=1, width=8, heads=1, limit=20_000)
    counts = np.bincount(task.text[: -task.held_out].numpy(), minlength=256) + 1.0

    class Counted(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(np.log(counts)).expand(*tokens.shape, 256)

    held_out = task.text[-task.held_out :].numpy()
    expected = -np.log2(counts[held_out] / counts.sum()).mean()
    found = evaluate(task, Counted(), ranks=3, batch=7)
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    xz = lzma.compress(held_out.tobytes(), preset=9)
    assert found["xz_bits_per_byte"] == pytest.approx(8 * len(xz) / len(held_out))
    assert lzma.decompress(xz) == held_out.tobytes()


@pytest.mark.parametrize("model", ["charlm", "lstm", "gru"])
def test_language_models_learn_and_write(model: str, tmp_path: Path) -> None:
    """A text of numbered lines: what follows is nearly certain, xz knows it too."""
    (tmp_path / "text").write_text("".join(f"line {n % 10} of ten lines\n" for n in range(3000)))
    args = {"text": str(tmp_path / "text"), "block": 32, "width": 48}
    task = CharLM(**args, layers=1, heads=4) if model == "charlm" else CharRNN(**args, cell=model)  # type: ignore[arg-type]
    settings = config("rnn", "train.steps=120", "optim.lr=1e-2")
    net, losses = train(task, settings)
    assert losses[0] == pytest.approx(math.log(256), abs=0.3), "it begins with no opinion"
    found = evaluate(task, net)
    assert found["bits_per_byte"] < 0.5
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
    assert "of ten lines⏎line" in task.report(net)
    assert task.report(net) == task.report(net)


def test_a_sample_does_not_upset_the_terminal() -> None:
    """An untrained model writes any bytes, escape sequences among them."""
    task = CharLM(block=16, layers=1, width=8, heads=1, limit=10_000)
    torch.manual_seed(0)
    written = task.report(task.model())
    assert written.startswith("sample: ")
    assert len(written) > 50
    assert written.isprintable()


def test_attention_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = GPT(layers=2, width=16, heads=2, dropout=0.0)
    tokens = torch.randint(256, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 256
    assert torch.allclose(model(tokens)[:, :7], model(changed)[:, :7], atol=1e-6)
    assert not torch.allclose(model(tokens)[:, 7:], model(changed)[:, 7:], atol=1e-3)


def test_attention_knows_distances_only() -> None:
    """Rotary positions: the product of a turned query and key is the same wherever the two stand."""
    torch.manual_seed(0)
    query, key = torch.randn(8), torch.randn(8)
    turns = rotations(40, 4, torch.device("cpu"))
    products = turn(query.expand(40, 8), turns) @ turn(key.expand(40, 8), turns).T
    for distance in (0, 1, 7):
        along = torch.diagonal(products, -distance)
        assert torch.allclose(along, along[0].expand_as(along), atol=1e-4)
    assert torch.diagonal(products).mean() == pytest.approx(float(query @ key), abs=1e-4)
    assert products[5, 0] != pytest.approx(float(products[0, 0]), abs=1e-3)


def test_writing_leaves_the_global_generator_and_the_mode_alone() -> None:
    model = GPT(layers=1, width=8, heads=1, dropout=0.5)
    before = torch.get_rng_state()
    assert len(write(model, torch.tensor([65, 66]), count=20, block=8)) == 20
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_language_model_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)width 10 does not divide into pairs for 3 heads.*width=6 or 12"):
        CharLM(width=10, heads=3).model()
    with pytest.raises(ConfigError, match="at least 1"):
        CharLM(layers=0)
    with pytest.raises(ConfigError, match="use lstm or gru"):
        CharRNN(cell="gpt")  # type: ignore[arg-type]
    with pytest.raises(InputMissing, match="no such file or folder"):
        CharLM(text=str(tmp_path / "gone"))
    (tmp_path / "short").write_text("too short")
    with pytest.raises(ConfigError, match="give at least 2560 bytes"):
        CharLM(text=str(tmp_path / "short"))


def test_folders_are_read_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "deep/c.txt", ".hidden", ".git/x", "test/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"<{name}>")
    found = texts.read_text(str(tmp_path), limit=1000)
    assert sorted(found.decode().strip("<>").split("><")) == ["a.txt", "b.txt", "deep/c.txt", "test/d.txt"]
    assert texts.read_text(str(tmp_path), limit=9) == found[:9]
    assert texts.read_text(str(tmp_path / "a.txt"), limit=100) == b"<a.txt>"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no text"):
        texts.read_text(str(tmp_path / "empty"), limit=10)


def test_the_standard_library_is_enough_text() -> None:
    found = texts.read_text(None, limit=4_000_000)
    assert len(found) == 4_000_000
    assert found == texts.read_text(None, limit=4_000_000)
    assert b"import " in found
    files = [path.relative_to(texts.standard_library()) for path in texts._files(texts.standard_library(), ".py")]
    assert not {part for path in files for part in path.parts} & {"site-packages", "test", "tests", "encodings"}


def test_prose_is_docstrings_and_comments() -> None:
    source = b'"""Module."""\n# one comment\nx = "no prose"\nif x:\n    def f():\n        """Of f."""\n'
    source += b"        ## two\n        return 1\nclass A:\n    async def g(self):\n        'Of g.'\n"
    assert set(texts.prose(source).split("\n")) - {""} == {"Module.", "one comment", "Of f.", "two", "Of g."}
    assert texts.prose(b"def broken(:") == ""


def test_words_are_counted() -> None:
    vocabulary, stream = read_words("The cat, the DOG; the cat's tail! 42 dog rare", min_count=2, most=10)
    assert vocabulary.words == ["the", "cat", "dog"], "by frequency, then spelling"
    assert vocabulary.counts.tolist() == [3, 2, 2]
    assert [vocabulary.words[n] for n in stream] == ["the", "cat", "the", "dog", "the", "cat", "dog"]
    assert read_words("b b a a c", min_count=1, most=2)[0].words == ["a", "b"]
    with pytest.raises(DataError, match="has 3 different words, of which 0 occur 2 times"):
        read_words("one two three", min_count=2, most=10)


def test_frequent_words_are_thinned_out() -> None:
    """The share that stays is word2vec's sqrt(t/f) + t/f."""
    stream = np.tile(np.array([0] * 90 + [1] * 10, np.int32), 2000)
    counts = np.bincount(stream)
    kept = np.bincount(thin_out(stream, counts, 0.01)) / counts
    for share, frequency in zip(kept, (0.9, 0.1), strict=True):
        assert share == pytest.approx(math.sqrt(0.01 / frequency) + 0.01 / frequency, abs=0.01)
    assert thin_out(stream, counts, 0.0) is stream


def test_skip_grams_are_drawn_as_word2vec_draws_them() -> None:
    noise = np.array([0.5, 0.8, 0.9, 1.0])
    data = SkipGrams(torch.arange(1000, dtype=torch.int32), window=3, negatives=4, noise=torch.from_numpy(noise))
    ids = np.repeat(np.arange(1000), 20)
    centre, context, negatives = data.batch(ids, sample_seeds(0, 0, len(ids)))
    distance = (context - centre).numpy()
    assert np.array_equal(centre.numpy(), ids)
    assert set(distance.tolist()) == {-3, -2, -1, 1, 2, 3}
    shares = np.bincount(np.abs(distance))[1:] / len(ids)
    assert np.allclose(shares, [3 / 6, 2 / 6, 1 / 6], atol=0.015)
    assert abs((distance > 0).mean() - 0.5) < 0.015
    drawn = np.bincount(negatives.flatten().numpy()) / negatives.numel()
    assert np.allclose(drawn, np.diff(noise, prepend=0), atol=0.01)
    tiny = SkipGrams(torch.arange(2, dtype=torch.int32), window=5, negatives=1, noise=torch.ones(1))
    assert set(tiny.batch(np.arange(2).repeat(50), sample_seeds(0, 0, 100))[1].tolist()) <= {0, 1}


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> tuple[Word2Vec, Any, list[float]]:
    """Text on two topics, in text8's form of one long line: words of a topic come together, 13 words each."""
    random = np.random.Generator(np.random.Philox(5))
    letters = [string.ascii_lowercase[:13], string.ascii_lowercase[13:]]
    runs = [letters[n % 2] for n in range(600)]
    words = ["word" + run[random.integers(13)] for run in runs for _ in range(20)]
    path = tmp_path_factory.mktemp("topics") / "text8"
    path.write_text(" ".join(words))
    torch.set_num_threads(1)
    task = Word2Vec(text=str(path), width=16, subsample=0.0, probes=["worda", "wordz", "unknown"])
    model, losses = train(task, config("word2vec", "train.global_batch=256", "optim.lr=2e-2", "train.epochs=6"))
    return task, model, losses


def test_word_vectors_tell_topics_apart(topics: tuple[Word2Vec, Any, list[float]]) -> None:
    task, model, losses = topics
    assert losses[0] == pytest.approx(6 * math.log(2), rel=0.05), "five negatives, no opinion"
    assert evaluate(task, model)["loss"] < 0.9 * losses[0]
    table = vectors(model)
    for number, word in enumerate(task.vocabulary.words):
        near = [task.vocabulary.words[n] for n in neighbours(table, [number], 12)[0]]
        assert word not in near
        assert all((other[-1] < "n") == (word[-1] < "n") for other in near), (word, near)
    lines = task.report(model).splitlines()
    assert [line.split(":")[0] for line in lines] == ["nearest to worda", "nearest to wordz"]


def test_gradients_are_sparse(topics: tuple[Word2Vec, Any, list[float]]) -> None:
    task, model, _ = topics
    batch = task.data("train").batch(np.arange(3), sample_seeds(0, 0, 3))
    model.zero_grad()
    task.loss(model, batch).backward()
    assert all(parameter.grad.is_sparse for parameter in model.parameters())


def test_a_negative_that_is_the_context_does_not_count() -> None:
    task = Word2Vec(limit=50_000)
    model = task.model()
    torch.nn.init.normal_(model.context.weight)
    centre, context = torch.tensor([1]), torch.tensor([2])
    with_itself = task.loss(model, (centre, context, torch.tensor([[2, 3]])))
    assert with_itself.item() == pytest.approx(task.loss(model, (centre, context, torch.tensor([[3]]))).item())


def test_exported_vectors_can_be_read(topics: tuple[Word2Vec, Any, list[float]], tmp_path: Path) -> None:
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    task, model, _ = topics
    assert "26 word vectors" in task.export(model, tmp_path)
    head, *rows = (tmp_path / "vectors.txt").read_text().splitlines()
    assert head == "26 16"
    assert [row.split(" ")[0] for row in rows] == task.vocabulary.words
    table = np.array([[float(number) for number in row.split(" ")[1:]] for row in rows])
    assert np.allclose(table, vectors(model).numpy(), rtol=1e-5, atol=1e-8)

    parsed = text_format.Parse((tmp_path / "tensorboard" / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = parsed.embeddings
    assert np.allclose(np.loadtxt(tmp_path / "tensorboard" / embedding.tensor_path, delimiter="\t"), table)
    names = (tmp_path / "tensorboard" / embedding.metadata_path).read_text().splitlines()
    assert names[0] == "word\tcount"
    assert [line.split("\t") for line in names[1:]] == [
        [word, str(count)] for word, count in zip(task.vocabulary.words, task.vocabulary.counts, strict=True)
    ]
    task.export(model, tmp_path)  # once more, as a run that goes on does


def test_the_projector_finds_the_vectors(topics: tuple[Word2Vec, Any, list[float]], tmp_path: Path) -> None:
    """By TensorBoard's own plugin, as `tensorboard --logdir RUN/tensorboard` would serve them."""
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
    from werkzeug.test import Client

    task, model, _ = topics
    task.export(model, tmp_path)
    logdir = str(tmp_path / "tensorboard")
    plugin = ProjectorPlugin(TBContext(logdir=logdir, multiplexer=EventMultiplexer(), data_provider=None))

    def get(path: str) -> Any:
        serve = plugin.get_plugin_apps()[path.split("?")[0]]
        return Client(serve).get(path)

    assert get("/runs").json == ["."]
    info = get("/info?run=.").json
    assert info["embeddings"][0]["tensorName"] == "word2vec"
    assert get("/metadata?run=.&name=word2vec&num_rows=3").text.splitlines()[0] == "word\tcount"
    served = np.frombuffer(get("/tensor?run=.&name=word2vec").data, "<f4").reshape(26, 16)
    assert np.allclose(served, vectors(model).numpy(), rtol=1e-4, atol=1e-6)


def test_word2vec_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Word2Vec(negatives=0)
    (tmp_path / "short").write_text("one two one two " * 2)
    with pytest.raises(DataError, match="8 words are left of the text"):
        Word2Vec(text=str(tmp_path / "short"), min_count=1, subsample=0.0)
