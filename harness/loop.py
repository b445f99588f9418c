"""The training loop, top to bottom.

restore the newest checkpoint; was anyone asked to stop meanwhile?
for each step:
    for each micro batch:  data -> forward/backward        (passes.py)
    communication -> update
    every log.every steps:        one small collective: loss, times, wishes; an elastic run remembers its state
    then, and before what follows, and about every 10 s (pulse.py): was anyone asked to stop or to save, are other
                                  ranks announced?
    every eval.every steps:       evaluate on all ranks; stop early?
    every checkpoint.every steps (or checkpoint.interval, or when asked): save, behind training
    asked to stop:                save, leave with exit code 75
evaluate, save, export
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing

import torch

from harness.batch import length_field
from harness.data import Batch, train_batches
from harness.errors import ConfigError, Stopped, StorageError
from harness.evaluate import evaluate
from harness.job import Job
from harness.metrics import Interval, Meter
from harness.nonfinite import handle_nonfinite
from harness.pulse import Pulse, Wishes
from harness.resume import restore
from harness.schedule import factor
from harness.seeds import seed_generators
from harness.units import show_duration, show_size
from harness.update import Step


def train(job: Job) -> None:
    """Train to the last step. Collective. Raises Stopped after a stop whose state is saved."""
    started = time.perf_counter()
    job.manager.claim()  # first: another job's checkpoints are neither read nor set aside
    first = restore(job)
    pulse = Pulse(first)
    if pulse.hear(first, job.world.exchange(question(job, pulse), "pulse")).stop:
        raise Stopped(f"stopped at step {first} of {job.steps} ({reason(job)}), before anything was done")
    if first >= job.steps or has_stopped_improving(job):
        more = f"a higher {length_field(job.config)} goes on"
        job.sinks.say(f"{job.run.root} is finished: nothing to train after step {first}; {more}")
        finish(job, started, first)
        return
    job.sinks.say(describe(job))
    meter, skipped = Meter(), 0
    # an evaluation that a stop left out
    ended = due(first, job.config.eval.every) and job.progress.evaluated != first and run_evaluation(job, first)
    with batches_of(job, first) as batches:
        for step in range(first, first if ended else job.steps):
            losses, result = take_step(job, batches, step)
            meter.add(losses)
            job.progress.step = done = step + 1

            if not result.finite:
                skipped += 1
                handle_nonfinite(job, done, losses, skipped)
            else:
                skipped = 0
            last = done == job.steps
            logged = due(done, job.config.log.every) or last
            evaluated, saved = due(done, job.config.eval.every), due(done, job.config.checkpoint.every)
            wishes = Wishes()
            if logged:
                interval = meter.exchange(job.world, job.clock, sent=job.sent, asked=question(job, pulse))
                wishes = pulse.hear(done, interval.asked)
                job.manager.poll()
                tell(job, interval, done, result, first, started)
            elif evaluated or saved or pulse.due(done):
                with job.clock("metrics"):
                    wishes = pulse.hear(done, job.world.exchange(question(job, pulse), "pulse"))
            stop = wishes.stop and not last
            if evaluated and not stop and not last and run_evaluation(job, done):
                break
            if (wishes.save or saved) and not stop and not last:
                try_to_save(job, done)
            if stop:
                save(job, done, wait=True)
                raise Stopped(f"stopped at step {done} of {job.steps} ({reason(job)}), state saved")
            if job.elastic is not None and (logged or wishes.announced):
                with job.clock("checkpoint"):
                    job.elastic.remember(job.state(job.extra()), done)
                if wishes.announced and not last:
                    job.elastic.change(done)
    save(job, job.progress.step, wait=True)  # before anything of the task that may fail
    finish(job, started, first)


def take_step(job: Job, batches: Iterator[Batch], step: int) -> tuple[list[torch.Tensor], Step]:
    """One optimizer step: the losses of its micro batches, and what it did. Collective."""
    job.clock.begin(step)
    seed_generators(job.config.seed, step, job.world.replica)
    job.update.begin(factor(job.config.schedule, step, job.steps))
    losses = job.spread.passes(job, batches)
    with job.clock("communication"):
        job.update.synchronize()
    with job.clock("update"):
        result = job.update.step()
        if job.ema is not None and result.taken:
            job.ema.update()
    with job.clock("communication"):
        job.update.share(step + 1)
    return losses, result


def finish(job: Job, started: float, first: int) -> None:
    """What follows the last step; a run that failed here does it when it is started again. Collective."""
    done = job.progress.step
    if job.progress.evaluated != done:
        run_evaluation(job, done)
        if job.eval_batches is not None:
            job.manager.add_metrics(done, job.evaluated)  # it was saved before: an evaluation may fail
    export(job)
    job.sinks.record("state", done, state="finished", summary=f"{done} steps")
    sent = float(job.world.exchange([job.sent], "finish/sent").sum())
    per_sample = sent / max(1, (done - first) * job.plan.global_batch)
    network = f"; {show_size(per_sample)} per sample over the network" if sent else ""
    job.sinks.say(f"finished at step {done} after {show_duration(time.perf_counter() - started)}{network}")


def describe(job: Job) -> str:
    """What is about to be trained, in a line."""
    named, regions = job.model.named_parameters(), job.spread.regions
    parameters = sum(math.prod(regions[name].shape) if name in regions else p.numel() for name, p in named)
    ranks, hosts = job.world.size, len(set(job.world.hosts))
    where = f"{ranks} rank{'s' * (ranks != 1)} on {hosts} host{'s' * (hosts != 1)}"
    if job.plan.each > 1:
        where += f" in {job.plan.replicas} replica{'s' * (job.plan.replicas != 1)} of {job.plan.each}"
    parallel = job.config.parallel
    where += f", optimizer shards: {parallel.optimizer_shards}" if parallel.optimizer_shards != "none" else ""
    where += f", averaged every {parallel.average_every} steps" if parallel.local else ""
    where += f", of which {job.world.servers} serve{'s' * (job.world.servers == 1)}" if job.world.servers else ""
    return (
        f"{job.config.task.name}: {parameters:,} parameters, {job.order.samples:,} samples, {job.steps:,} steps of"
        f" {job.plan.global_batch}; {where}, {job.world.device.type}; {job.run.root}"
    )


def due(done: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after `done` steps."""
    return every is not None and done % every == 0


def question(job: Job, pulse: Pulse) -> list[float]:
    """What this rank was asked for."""
    announced = job.elastic is not None and job.elastic.announced
    return pulse.ask(job.stop.wanted(), job.request.wanted(), announced)


def reason(job: Job) -> str:
    """Why the run stops, as far as this rank knows."""
    return job.stop.reason or "a signal to another rank"


def batches_of(job: Job, first: int) -> closing[Generator[Batch, None, None]]:
    """This replica's micro batches from step `first` on; loader workers end with the block."""
    batches = train_batches(
        job.train_data,
        job.order,
        job.plan,
        replica=job.world.replica,
        start_step=first,
        stop_step=job.steps,
        seed=job.config.seed,
        workers=job.config.data.workers,
        prefetch=job.config.data.prefetch,
        pin=job.world.device.type == "cuda",
    )
    return closing(batches)


def try_to_save(job: Job, done: int) -> None:
    """Write a checkpoint on the way; one that fails is told and training goes on. Collective, the same on all ranks."""
    try:
        save(job, done)
    except StorageError as error:
        job.sinks.say(f"warning: no checkpoint at step {done}: {error}")


def save(job: Job, done: int, *, wait: bool | None = None) -> None:
    """Make a checkpoint; `wait`: until it is durable. Collective; raises StorageError on all ranks alike."""
    with job.clock("checkpoint"):
        job.request.granted()
        job.align_buffers("save/buffers")
        metrics = job.evaluated if job.progress.evaluated == done else None
        with job.update.shared(state=True):
            job.manager.save(done, job.state(job.extra()), metrics, wait=wait)


def run_evaluation(job: Job, done: int) -> bool:
    """Evaluate and tell; True when early stopping ends the run. Collective, and the same on all ranks."""
    job.progress.evaluated = done
    with job.clock("evaluation"):
        metrics = evaluate(job)
    job.evaluated.clear()
    job.evaluated.update(metrics)
    if metrics:
        job.sinks.record("eval", done, **metrics)
    rule = job.config.eval.stop
    if rule is None:
        return False
    # rank 0 has the metrics that `summarize` adds
    value = job.world.comm.broadcast(metrics.get(rule.metric) if job.world.is_root else None)
    if not isinstance(value, (int, float)):
        raise ConfigError(
            f"eval.stop.metric {rule.metric!r} is no metric of this task",
            hint=f"it has {', '.join(metrics) or 'none'}" if job.world.is_root else None,
        )
    progress, sign = job.progress, 1.0 if rule.mode == "min" else -1.0
    # a value that is not finite is no improvement, and nothing to compare with later
    if math.isfinite(value) and (progress.best is None or sign * (progress.best - value) > rule.min_delta):
        progress.best, progress.waited = value, 0
        return False
    progress.waited += 1
    if not has_stopped_improving(job):
        return False
    best = "nan" if progress.best is None else f"{progress.best:.4g}"
    job.sinks.say(f"{rule.metric} has not improved on {best} for {progress.waited} evaluations: stopping")
    return True


def has_stopped_improving(job: Job) -> bool:
    """Whether early stopping ends the run here; also asked on a restart of a run that it has ended."""
    return job.config.eval.stop is not None and job.progress.waited >= job.config.eval.stop.patience


def tell(job: Job, interval: Interval, done: int, result: Step, first: int, started: float) -> None:
    """Hand an interval's numbers to the sinks."""
    steps, samples = done - first, steps_in(done, job, first) * job.plan.global_batch
    elapsed = time.perf_counter() - started
    spent = sum(interval.sections.values()) or 1.0
    job.sinks.record(
        "train",
        done,
        loss=interval.loss,
        lr=job.update.base_lrs[0] * factor(job.config.schedule, done - 1, job.steps),
        grad_norm=result.grad_norm,
        samples=done * job.plan.global_batch,
        samples_per_s=samples / interval.seconds,
        network_bytes_per_sample=interval.sent / samples,
        rate=steps / elapsed,
        eta_s=(job.steps - done) * elapsed / steps,
        slowest_rank=interval.slowest,
        slowest_host=job.world.hosts[interval.slowest],
        slowdown=interval.slowdown,
        **{f"seconds/{name}": value for name, value in interval.sections.items()},
        **{f"share/{name}": value / spent for name, value in interval.sections.items()},
    )


def steps_in(done: int, job: Job, first: int) -> int:
    """Steps since the log line before the one at `done`."""
    return min((done - 1) % job.config.log.every + 1, done - first)


def export(job: Job) -> None:
    """The task's results, written by rank 0 while the others wait; the averaged parameters, where there are any."""
    job.clock.section = "export"
    job.spread.draws.close()
    job.model.eval()
    with torch.no_grad(), job.shown():
        line = job.task.export(job.model, job.run.root) if job.world.is_root else None
    if line is not None:
        job.sinks.say(line)
