"""What a user writes: a `Task` with three methods. Everything else has a default.

    class Line:
        def model(self):              return torch.nn.Linear(8, 1)
        def data(self, split):        return TensorDataset(x, y)          # split is "train" or "eval"
        def loss(self, model, batch): return ((model(batch[0]) - batch[1]) ** 2).mean()

A task is any class with these methods; deriving from `Task` brings the defaults of the optional ones. `task.args` of
the config are its constructor's keyword arguments.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from harness.errors import ConfigError, Mistake
from harness.named import search_here
from harness.parallel.groups import ALONE, Group

if TYPE_CHECKING:
    import torch

Split = Literal["train", "eval"]

BUILT_IN = {
    "linear": "harness.tasks.linear:Linear",
    "digits": "harness.tasks.digits:Digits",
    "charlm": "harness.tasks.charlm:CharLM",
    "rnn": "harness.tasks.charlm:CharRNN",
    "word2vec": "harness.tasks.word2vec:Word2Vec",
    "resnet": "harness.tasks.resnet:ResNet",
}


class Task:
    """Base with the optional methods; `model`, `data` and `loss` must be given."""

    model_group: Group = ALONE
    """The ranks that share this rank's model (`parallel.model`); known before `model` is called."""

    def model(self) -> torch.nn.Module:
        """A fresh model on the CPU. Called once per rank with the same seed, so all ranks begin equal."""
        raise NotImplementedError

    def data(self, split: Split) -> Any:
        """A map-style data set, or None when there is nothing to evaluate on. `harness.data` has the details."""
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The mean loss over the batch's samples, a scalar. `batch` is on the model's device."""
        raise NotImplementedError

    def sequence(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """The model as layers in sequence, each called with the tensor that the one before returns, for a pipeline.

        By default those of a `Sequential`. Raises ConfigError for another model. Where a task has this method, what a
        layer draws (dropout) depends on seed, step, replica, micro batch and the layer, with and without a pipeline; so
        `loss` should call the model once.
        """
        import torch

        if not isinstance(model, torch.nn.Sequential):
            raise ConfigError(
                f"parallel.pipeline needs a model of layers in sequence, and {type(self).__name__} does not say which",
                hint="write the task's method sequence(model), or return a torch.nn.Sequential from model()",
            )
        return list(model)

    def model_input(self, batch: Any) -> torch.Tensor:
        """What `loss` calls the model with, which the first layer of a pipeline gets; by default the batch's first."""
        first: torch.Tensor = batch[0]
        return first

    def evaluate(self, model: torch.nn.Module, batch: Any) -> Mapping[str, torch.Tensor]:
        """Means over the batch's samples, by name. The harness weighs them by samples and sums over ranks exactly."""
        return {"loss": self.loss(model, batch)}

    def summarize(self, model: torch.nn.Module, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """After an evaluation, on rank 0 (all ranks of its replica): metrics that follow from the exact means."""
        return {}

    def parameters(self, model: torch.nn.Module) -> Iterable[Any]:
        """What the optimizer gets: parameters, or dicts of parameter groups, as for torch optimizers."""
        return model.parameters()

    def report(self, model: torch.nn.Module) -> str | None:
        """A few lines to print after an evaluation, on rank 0 (all ranks of its replica); None prints nothing."""
        return None

    def export(self, model: torch.nn.Module, directory: Path) -> str | None:
        """Write results into the run directory once training has finished, on rank 0 only; returns a line to print."""
        return None


def find_task(name: str) -> type[Any]:
    """The class behind `task.name`, of which the config has checked that it is built in or of the form module:Class.

    The working directory is on the import path, as with `python -m`. Raises ConfigError when it cannot be imported or
    lacks a method.
    """
    target = BUILT_IN.get(name, name)
    module_name, _, attribute = target.partition(":")
    search_here()
    try:
        task = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        if name in BUILT_IN:
            raise ConfigError(
                f"task {name} needs the Python module {error.name}", hint="pip install 'harness[tasks]'"
            ) from error
        raise ConfigError(
            f"task.name {name!r}: there is no module {error.name!r}",
            hint=f"it was looked for on sys.path, with {Path.cwd()} first",
        ) from error
    except AttributeError as error:
        raise ConfigError(f"task.name {name!r}: the module {module_name} has no {attribute}") from error
    except Exception as error:
        raise ConfigError(
            f"task.name {name!r}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
    missing = [method for method in ("model", "data", "loss") if not callable(getattr(task, method, None))]
    if not inspect.isclass(task) or missing:
        raise ConfigError(
            f"task.name {name!r} is not a task: it has no {' and no '.join(missing) or 'constructor'}",
            hint="a task is a class with model(), data(split) and loss(model, batch)",
        )
    return task if issubclass(task, Task) else type(task.__name__, (task, Task), {})


def make_task(name: str, args: Mapping[str, Any]) -> Task:
    """The task object. Raises ConfigError when the constructor does not take these arguments."""
    task = find_task(name)
    try:
        inspect.signature(task).bind(**args)
    except TypeError as error:
        raise ConfigError(
            f"task.args do not fit {name}: {error}", hint=f"it takes {inspect.signature(task)}"
        ) from error
    made: Task = task(**_converted(task, args))
    return made


def _converted(task: type[Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the constructor's annotations have them; what has none is taken as it is.

    Raises ConfigError with all arguments that do not fit.
    """
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    try:
        hints = get_type_hints(task.__init__, include_extras=True)
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can follow
        return dict(args)
    fitting, mistakes = dict(args), []
    for key, value in args.items():
        try:
            fitting[key] = TypeAdapter(hints.get(key, Any)).validate_python(value)
        except PydanticUserError:  # a class that pydantic does not know
            continue
        except ValidationError as error:
            message = "; ".join(part["msg"].removeprefix("Value error, ") for part in error.errors())
            mistakes.append(Mistake(f"task.args.{key}", f"{value!r} does not fit: {message}"))
    if mistakes:
        raise ConfigError(mistakes)
    return fitting
