"""The schema of a run: every field typed, documented and checked. What is not here: reading files (`resolve.py`).

A field's description is what `harness schema` hands to editors and what an error message quotes. Values are frozen;
a `Config` read back from its own dump is equal to it, so the frozen config of a run directory re-runs the run.

>>> run = {"name": "x", "task": {"name": "linear"}, "train": {"steps": 1, "global_batch": 8}}
>>> Config.model_validate(run).optim.name
'adamw'
"""
# ruff: noqa: RUF012  # pydantic copies mutable defaults

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from harness.parallel.combinations import check_parallel
from harness.parallel.settings import Parallel
from harness.section import (
    Count,
    Fraction,
    KeepRule,
    NonNegative,
    OptimizerName,
    Positive,
    PositiveFloat,
    Section,
    TaskName,
)
from harness.units import Duration, Size


class Task(Section):
    """What is trained."""

    name: TaskName
    """A built-in task (linear, digits, charlm, rnn, word2vec, resnet) or your own as `package.module:Class`."""
    args: dict[str, Any] = {}
    """Keyword arguments for the task's constructor."""


class Data(Section):
    """How samples reach a rank."""

    workers: Count = 0
    """Loader processes per rank; 0 loads in the training process. They never fork an MPI process."""
    prefetch: Positive = 2
    """Batches each worker prepares ahead."""
    shuffle: bool = True
    """One seeded permutation of all samples per epoch; false: in order."""
    block: Positive = 1
    """Samples shuffled together as one contiguous block, so that a file is read in long runs; 1 shuffles samples."""
    partition: str | None = None
    """A file of `harness data partition`: each rank reads only its part of the samples; unset: all read everywhere."""


class Train(Section):
    """How long, in what batches, in what precision."""

    steps: Positive | None = None
    """Optimizer steps in all. Give this or `epochs`."""
    epochs: PositiveFloat | None = None
    """Passes over the training data. Give this or `steps`."""
    global_batch: Positive
    """Samples per optimizer step over all ranks; the same on any number of ranks."""
    micro_batch: Positive | None = None
    """The most samples a rank takes at once; the rest of its share is accumulated. Unset: its whole share."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16: autocast over fp32 parameters. fp16: autocast and a gradient scaler, GPU only."""
    clip_norm: PositiveFloat | None = None
    """Scale the averaged gradient down to this L2 norm."""
    clip_value: PositiveFloat | None = None
    """Limit every element of the averaged gradient to this absolute value."""
    nonfinite: Literal["stop", "skip", "ignore"] = "stop"
    """A loss or gradient that is not finite, on any rank: stop the run, skip the step, or do not look."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the parameters, used for evaluation; unset: none."""
    deterministic: bool = True
    """The same run twice gives the same bits: deterministic kernels."""

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs" + (", not both (null takes one back)" if self.steps else ""))
        return self


class Optim(Section):
    """The optimizer."""

    name: OptimizerName = "adamw"
    """gd, sgd, momentum, nesterov, adagrad, rmsprop, adam, adamw, or any torch optimizer as `module:Class`."""
    lr: PositiveFloat = 1e-3
    """Learning rate at the peak of the schedule, for a global batch of `base_batch` when `lr_scaling` is on."""
    momentum: Fraction | None = None
    """For momentum, nesterov (0.9 when unset) and rmsprop (0)."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] | None = None
    """For adam and adamw ((0.9, 0.999) when unset)."""
    eps: PositiveFloat | None = None
    """Added to denominators; the optimizer's own default when unset."""
    weight_decay: NonNegative = 0.0
    """Decoupled for adamw, added to the gradient for the others."""
    args: dict[str, Any] = {}
    """More keyword arguments for the optimizer's constructor."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the learning rate follows the global batch: times (global_batch / base_batch), its root, or not at all."""
    base_batch: Positive = 256
    """The global batch for which `lr` is meant."""


class Schedule(Section):
    """The learning rate over steps, as a factor of `optim.lr`."""

    name: Literal["constant", "linear", "cosine", "step", "inverse_sqrt"] = "constant"
    """constant; linear, cosine: from 1 to `final`; step: times `gamma` each `every`; inverse_sqrt: 1/sqrt(step)."""
    warmup: Count = 0
    """Steps over which the factor first rises linearly from 0 to 1."""
    final: Fraction = 0.0
    """The factor at the last step of linear and cosine."""
    every: Positive | None = None
    """For step: the period, in steps."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """For step: what the factor is multiplied with."""

    @model_validator(mode="after")
    def _period(self) -> Schedule:
        if self.name == "step" and self.every is None:
            raise ValueError("schedule step needs every: the number of steps between two reductions")
        return self


class EarlyStop(Section):
    """End the run when a metric of the evaluation stops improving."""

    metric: str = "loss"
    """Name of the metric, without `eval/`."""
    mode: Literal["min", "max"] = "min"
    """Whether lower or higher is better."""
    patience: Positive = 3
    """Evaluations in a row without improvement before the run ends."""
    min_delta: NonNegative = 0.0
    """The least change that counts as improvement."""


class Eval(Section):
    """Evaluation on held-out data, on all ranks, with exact sums and counts."""

    every: Positive | None = None
    """Steps between evaluations; unset: at the end only."""
    batch: Positive | None = None
    """Samples a rank evaluates at once; unset: the micro batch."""
    stop: EarlyStop | None = None
    """Early stopping; unset: never."""


class Horovod(Section):
    """Horovod's settings; unset ones keep Horovod's defaults."""

    op: Literal["average", "sum", "adasum"] = "average"
    """How gradients of ranks are combined."""
    compression: Literal["none", "fp16"] = "none"
    """Gradients travel as fp16."""
    predivide: PositiveFloat | None = None
    """The average is divided by this before the sum and by ranks / this after; unset: all before, which costs least."""
    bucket: Annotated[Size, Field(gt=0)] = 25 * 2**20
    """Size of the buffers in which gradients travel; each leaves when it is full, while the backward pass goes on."""
    sparse_as_dense: bool = False
    """Turn sparse gradients into dense ones before they travel."""
    fusion: Size | None = None
    """HOROVOD_FUSION_THRESHOLD: what is ready is packed into buffers of this size; 0, if unset: not, buckets are."""
    cycle_time: Duration | None = None
    """HOROVOD_CYCLE_TIME: how often Horovod looks for gradients that all ranks have ready (1ms)."""
    cache_capacity: Count | None = None
    """HOROVOD_CACHE_CAPACITY: tensors whose readiness is told by one bit (1024)."""
    autotune: bool = False
    """HOROVOD_AUTOTUNE: try settings while training; the log goes to the run directory."""
    timeline: bool = False
    """Write Horovod's timeline, for chrome://tracing, into the run directory."""
    stall_warn: Duration | None = None
    """After how long Horovod names ranks that have not come to an operation; 0 turns the check off. Unset: 60s, or a
    quarter of watchdog.step or watchdog.data, so that it is told before the run is ended."""
    stall_stop: Duration = 0.0
    """After how long such a stall ends the run; 0 never: the watchdog does."""


class Checkpoint(Section):
    """Checkpoints of the run, in `<run_dir>/checkpoints`."""

    every: Positive | None = None
    """Steps between checkpoints; unset: `interval` alone counts, and one is made at the end and on a stop."""
    interval: Duration | None = None
    """Time between checkpoints, as 15m, looked at every `log.every` steps; comes beside `every`."""
    keep: KeepRule = "last 3"
    """Which are kept, as rules: `last 3 | every 1000 | best accuracy 2 max`. Tagged ones are, in any case."""
    mode: Literal["background", "lazy", "wait"] = "background"
    """Training goes on once the state is copied; lazy: the next update waits for that; wait: until it is durable."""
    busy: Literal["skip", "wait"] = "skip"
    """What a checkpoint does that is due while the one before is still being written."""
    engine: Literal["auto", "direct", "mpio", "mpio-collective"] = "auto"
    """How bytes reach the file: plain positioned writes, MPI-IO, or whichever fits here."""
    timeout: Duration = 600.0
    """How long a save waits for a rank before it names it and is given up."""
    check_replicas: Count = 10
    """At the first checkpoint and every n-th: are all ranks' parameters and optimizer states the same? 0: never."""
    strict: bool = False
    """Where they are not: an error and no checkpoint, instead of rank 0's copy and a warning."""
    buffers: Literal["rank0", "average"] = "rank0"
    """What becomes of statistics that differ between ranks (batch normalization), at each save and evaluation."""
    resume: bool = True
    """Go on from the newest valid checkpoint of the run directory; false: refuse to start where there is one."""


class Log(Section):
    """What is told while it trains."""

    every: Positive = 10
    """Steps between metric lines; each costs one small collective. Requests to stop or to save do not wait for them."""
    tensorboard: bool = False
    """Write TensorBoard events to `<run_dir>/tensorboard` (needs the extra `harness[tensorboard]`)."""


class Stop(Section):
    """What makes a run save its state and stop, with exit code 75: a signal, the clock, or `harness stop`."""

    signals: list[Literal["TERM", "INT", "USR1", "USR2"]] = ["TERM", "INT", "USR1", "USR2"]
    """Signals to any rank. Not USR1 where NCCL is used."""
    time: Duration | None = None
    """Stop so long after the start, as 1h; an allocation's end counts in any case."""
    margin: Duration = 30.0
    """How long before that, besides what the time between two questions and a save have been seen to take."""

    @model_validator(mode="after")
    def _room(self) -> Stop:
        if self.time is not None and self.time <= self.margin:
            raise ValueError(
                f"time ({self.time:g} s) is not longer than margin ({self.margin:g} s): the run would stop at once"
            )
        return self


class Watchdog(Section):
    """How long a rank may stay in one place before it counts as hung, and the run is ended; 0: for ever."""

    start: Duration = 600.0
    """Until the first step: MPI and Horovod come up, the task is built."""
    data: Duration = 600.0
    """For one batch of data."""
    step: Duration = 600.0
    """For each part of a step: forward and backward, communication, update."""
    evaluation: Duration = 1800.0
    """For an evaluation, and for what follows the last step."""
    save: Duration = 1800.0
    """For reading a checkpoint, and for what training waits for when one is written."""
    silence: Duration = 120.0
    """How long a rank may be stopped (by SIGSTOP or a debugger)."""


class Restart(Section):
    """How `harness run` starts a run again that has failed; never after a mistake of the user or a wish to stop."""

    most: Count = 0
    """Restarts in a row without progress; a new checkpoint, or a step further than ever, begins a new row."""
    backoff: Duration = 10.0
    """Wait before the second restart of a row; the first comes at once, each further one waits twice as long."""
    longest: Duration = 300.0
    """The longest wait."""
    min_ranks: Positive | None = None
    """Go on with fewer ranks, at least so many, where a host is gone; unset: only with all (launch.elastic: with 1)."""


class Launch(Section):
    """How ranks are started. The command line's `-n`, `-H`, `--hostfile` and `--launcher` come before these."""

    launcher: Literal["auto", "mpirun", "horovodrun", "srun", "local"] = "auto"
    """auto: srun inside a Slurm allocation whose srun starts MPI, else mpirun; local: one rank, no launcher."""
    ranks: Positive | None = None
    """Ranks in all; unset: one per GPU, or 1 without GPUs; in an allocation, all its slots."""
    hosts: str | None = None
    """Hosts and slots as `a:2,b:2`."""
    hostfile: str | None = None
    """A file with a line `host slots=N` per host."""
    elastic: bool = False
    """Ranks come and go while the run trains (horovodrun over Gloo): a rank that dies is dropped with its host."""
    max_ranks: Positive | None = None
    """elastic: the most ranks; unset: `ranks`."""
    discover: str | None = None
    """elastic: a command that prints lines `host:slots`, asked every second; unset: the file `hosts` of the run."""
    threads: Positive | None = None
    """CPU threads per rank (OMP_NUM_THREADS); unset: the node's cores divided by its ranks."""
    bind: Literal["none", "core", "socket"] = "none"
    """What mpirun or srun binds a rank to. none lets Horovod's thread have a core of its own."""
    interfaces: str | None = None
    """Network interfaces for TCP, by name, as `eth0,ib0`; unset: all but loopback and container bridges."""
    mpi_flags: list[str] = []
    """More arguments for mpirun or srun, before the program."""
    env: dict[str, str] = {}
    """Environment variables for the ranks."""
    export: list[str] = []
    """Names of variables handed on to ranks on other hosts, besides those that Horovod, MPI and Python need."""
    mpi_io: Literal["auto", "romio", "ompio"] = "auto"
    """Open MPI's MPI-IO component; auto: ROMIO under Open MPI 4, whose own one can hang with HDF5."""


class Slurm(Section):
    """The job that `harness submit` asks Slurm for; `harness show` prints its script."""

    nodes: Positive = 1
    """Nodes of the job."""
    ranks_per_node: Positive | None = None
    """Tasks per node; unset: `launch.ranks` spread evenly over the nodes."""
    cpus_per_rank: Positive | None = None
    """Cores per task; repeated on srun, which does not inherit it in some versions of Slurm."""
    gpus_per_node: Count | None = None
    """GPUs per node."""
    time: Duration = 3600.0
    """Time limit of the job."""
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Node features, as for sbatch."""
    memory: str | None = None
    """Memory per node, as for sbatch --mem: 64G, or 0 for all."""
    signal: Literal["USR1", "USR2", "TERM"] = "USR2"
    """The signal sent before the time limit. Not USR1 where NCCL is used."""
    margin: Duration = 120.0
    """How long before the time limit the signal is sent. Slurm may be a minute early."""
    requeue: bool = False
    """When the time limit or a preemption has stopped the run, put the job back into the queue, to go on there."""
    mpi: str = "pmix"
    """srun --mpi=..., when srun is the launcher."""
    modules: list[str] = []
    """Environment modules to load."""
    setup: list[str] = []
    """Shell lines that run on the first node before the job starts."""
    extra: dict[str, str | int | None] = {}
    """More sbatch options by their long name: `{reservation: maint, exclusive: null, array: 0-7%2}`."""


class Config(Section):
    """A run of Harness."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)
    """Name of the run: letters, digits, `_ . -`."""
    run_dir: str | None = None
    """Where everything the run writes goes; unset: `runs/<name>`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of initial parameters, the order of samples and random draws."""
    task: Task
    data: Data = Data()
    train: Train
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    eval: Eval = Eval()
    horovod: Horovod = Horovod()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    stop: Stop = Stop()
    watchdog: Watchdog = Watchdog()
    restart: Restart = Restart()
    launch: Launch = Launch()
    slurm: Slurm = Slurm()

    @property
    def directory(self) -> str:
        """The run directory as given, or its default."""
        return self.run_dir if self.run_dir is not None else f"runs/{self.name}"

    @model_validator(mode="after")
    def _fits(self) -> Config:
        wrong = []
        if self.horovod.op != "average" and self.horovod.predivide is not None:
            wrong.append("horovod.predivide goes with horovod.op=average only")
        if self.horovod.op == "adasum":
            # Adasum combines steps that ranks have already taken
            train = self.train
            if train.clip_norm or train.clip_value or train.precision == "fp16" or train.nonfinite == "skip":
                wrong.append(
                    "horovod.op=adasum cannot clip, skip a step or use fp16: train.clip_norm, train.clip_value,"
                    " train.nonfinite=skip and train.precision=fp16 go with average and sum"
                )
        wrong += check_parallel(self)
        if self.launch.hosts is not None and self.launch.hostfile is not None:
            wrong.append("give launch.hosts or launch.hostfile, not both")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


MATHEMATICS = (
    "seed", "task", "data.shuffle", "data.block", "data.partition", "train", "optim", "schedule", "horovod.op"
)  # fmt: skip
"""What makes two configs the same run: a run directory is continued only by a config that agrees on these."""
FREE = ("train.steps", "train.epochs", "train.micro_batch", "train.nonfinite")
"""Exceptions within `MATHEMATICS`: may change when a run goes on."""
