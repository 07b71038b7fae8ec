"""The training loop: everything round `TrainStep`. Start, resume, data, logs, evaluation, checkpoints, end.

A run directory holds

    config.json          the settings of the last start
    metrics.jsonl        one line a step (see `Trainer._row`), eval.jsonl one line an evaluation
    checkpoints/         training/checkpoint.py
    plots/               written when the run ends
    modules/             what every rank's networks run on (training/inventory.py)
    profile/             with --profile.steps (training/profiling.py)
    watch/, .lock        while it runs (parallel/watchdog.py, training/lock.py)

The state of a run is a step number: data, masks, tau and noise follow from (seed, step). A checkpoint adds
weights, optimizer, EMA, and in `extra` the two counters that decide when to give up.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from nextvid_mcore.config import RunConfig
from nextvid_mcore.data.guard import BadShareGuard, DataError
from nextvid_mcore.data.loader import ClipBatch, build_loader, data_note
from nextvid_mcore.data.sampler import Request, rank_batches
from nextvid_mcore.models import fp8
from nextvid_mcore.models.specs import backend_note
from nextvid_mcore.parallel import mailbox, watchdog
from nextvid_mcore.parallel.groups import init_distributed, seed_trackers
from nextvid_mcore.parallel.placement import resolve_placement, settled
from nextvid_mcore.parallel.seats import build_seats
from nextvid_mcore.schedule import Schedule, StagePoint
from nextvid_mcore.targets import width_note
from nextvid_mcore.training import checkpoint, full_memory, lock
from nextvid_mcore.training.evaluate import Evaluator
from nextvid_mcore.training.feed import Feed, LoaderError, StepData, blank
from nextvid_mcore.training.full_memory import FullMemory
from nextvid_mcore.training.inventory import Inventory
from nextvid_mcore.training.manifest import CheckpointError
from nextvid_mcore.training.metrics import MetricsFile
from nextvid_mcore.training.microbatch import Outline
from nextvid_mcore.training.online_knn import OnlineKnn
from nextvid_mcore.training.profiling import StepProfiler
from nextvid_mcore.training.progress import Progress
from nextvid_mcore.training.saving import Saver
from nextvid_mcore.training.start import CHECKPOINTS, find_checkpoint, going_on
from nextvid_mcore.training.step import StepResult, TrainStep
from nextvid_mcore.training.together import together
from nextvid_mcore.training.told import Told
from nextvid_mcore.training.wandb_sink import WandbSink


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


TOGETHER = (DataError, LoaderError, NonFiniteError, CheckpointError)  # what all ranks raise together


class Trainer:
    """One run in one directory. Every rank makes one and calls `run`."""

    @full_memory.told("setting up", full_memory.SETTING_UP)
    def __init__(self, config: RunConfig, out: Path) -> None:
        """Join the other processes, build everything, and stand where the run left off."""
        patience = watchdog.collective_timeout(config.parallel.timeout)
        init_distributed(patience)
        config, self.notes = settled(config, dist.get_world_size())
        self.config, self.out = config, out
        self.rank = dist.get_rank()
        self.placement = resolve_placement(config, dist.get_world_size())
        self.seats = build_seats(self.placement, patience)
        self.groups = self.seats.home  # of the seat that this rank loads clips for
        seats = ", ".join(seat.name for seat in self.seats.mine)
        label = watchdog.role_label("all roles" if seats == "all" else seats, self.groups)
        self.watch = watchdog.Watchdog(out, self.rank, dist.get_world_size(), label, config.parallel.timeout)
        seed_trackers(config.train.seed, self.groups)
        self.guard = BadShareGuard(config.data.max_bad_share, config.data.bad_window)
        self.skipped = 0  # steps skipped in a row
        self.told = Told(says=self.rank == 0)
        self.checkpoints = out / CHECKPOINTS
        self.lock = together(f"starting in {out}", self._lock)
        self.watch.start()
        try:
            self._build(config, out)
        except BaseException as error:
            self._blame(error)
            self._leave()
            raise

    @full_memory.told("setting up", full_memory.SETTING_UP)  # here too: before anybody is blamed
    def _build(self, config: RunConfig, out: Path) -> None:
        self.data_note = data_note(config)  # before the networks, which take their time
        self.train_step = TrainStep(config, self.seats)
        watchdog.enter("loading a checkpoint")
        newest, self.step, notes = self._stand()
        config = self.config  # of a run that goes on, as it began
        watchdog.enter("starting", self.step)
        self.progress = Progress(
            self.schedule.total_steps, self.step, config.train.log_every, config.train.progress, self.rank
        )
        for note in (*self.notes, *notes):
            self.progress.say(note)
        if self.train_step.engine.graphs is not None:
            self.train_step.engine.graphs.say = self.progress.say
        self.evaluators = self._evaluators()
        self.metrics, self.evals, self.wandb = self._sinks()
        saving = config.checkpoint
        self.saver = Saver(
            self.checkpoints, config, self.train_step.optimizers, saving.keep, saving.asynchronous, newest
        )
        if self.step < self.schedule.total_steps:
            self.saver.check_space()
        self.profiler = StepProfiler(config.profile, out, self.rank, self.progress.say)
        self.inventory: Inventory | None = Inventory(self.train_step.parts())

    def _blame(self, error: BaseException) -> None:
        """End this process with the name of a rank that is gone, if that is why it failed."""
        if isinstance(error, RuntimeError) and not isinstance(error, TOGETHER):
            self.watch.peer_lost()

    def _leave(self) -> None:
        """This rank stops: others may use the folder."""
        self.watch.stop()
        if self.lock is not None:
            self.lock.close()

    def _lock(self) -> TextIO | None:
        return lock.hold(self.out, functools.partial(print, flush=True)) if self.rank == 0 else None

    def _stand(self) -> tuple[Path | None, int, list[str]]:
        """Load the newest whole checkpoint, or the weights to start from.

        Returns the checkpoint, the finished steps, and what to say.
        """
        config = self.config
        newest, passed = checkpoint.resumable(self.checkpoints)
        if newest is not None:
            self.config, notes = going_on(checkpoint.read_state(newest), config, self.out)
            self.schedule = Schedule(self.config)
            there = checkpoint.load(newest, config, self.train_step.optimizers, verified=True)
            self.guard.load_state_dict(there.extra.get("bad_window", []))
            self.skipped = int(there.extra.get("skipped", 0))
            return newest, there.step, [*passed, *notes, f"going on after step {there.step}, from {newest}"]
        if passed:
            raise CheckpointError(
                f"none of the checkpoints in {self.checkpoints} is whole; move them away to start over "
                f"({passed[0]})"
            )
        self.schedule, notes = Schedule(config), []
        if config.train.init_from is not None:
            source = find_checkpoint(Path(config.train.init_from))
            checkpoint.load(source, config, self.train_step.optimizers, weights_only=True)
            notes.append(f"weights from {source}, everything else new")
        if self.schedule.first_step_of_run:
            notes.append(
                f"starting at stage {config.train.start_stage}, step {self.schedule.first_step_of_run}"
            )
        return None, self.schedule.first_step_of_run, notes

    def _evaluators(self) -> list[Evaluator | OnlineKnn]:
        parts = (self.config, self.train_step, self.seats)
        found: list[Evaluator | OnlineKnn] = []
        if self.config.eval.every and self.config.data.eval_manifest is None:
            self.progress.say("no held-out loss: there is no --data.eval-manifest")
        elif self.config.eval.every:
            found.append(Evaluator(*parts))
        if self.config.eval.knn_every:
            found.append(OnlineKnn(*parts, say=self.progress.say))
        return found

    def _sinks(self) -> tuple[MetricsFile | None, MetricsFile | None, WandbSink | None]:
        """Files and wandb, on rank 0."""
        if self.rank != 0:
            return None, None, None
        self.out.mkdir(parents=True, exist_ok=True)
        scratch = self.out / "config.json.tmp"
        scratch.write_text(self.config.to_json() + "\n")
        os.replace(scratch, self.out / "config.json")
        wandb = WandbSink(self.config.wandb, self.out, dataclasses.asdict(self.config), say=self.progress.say)
        metrics = MetricsFile(self.out / "metrics.jsonl", self.step)
        return metrics, MetricsFile(self.out / "eval.jsonl", self.step), wandb

    def _requests(self, step: int) -> Iterator[Request]:
        """This replica's micro-batches after `step` steps, to the end."""
        rank, ranks, seat = self.groups.data_rank, self.groups.layout.data, self.seats.mine[0]
        return rank_batches(
            self.schedule, step, rank, ranks, lambda point: self.placement.clips(seat, point.micro_batch)
        )

    def _loader(self) -> Iterator[ClipBatch] | None:
        """Their clips, from here; None where another rank of the replica loads."""
        requests = self._requests(self.step)
        if not self.seats.mine[0].sees_video:
            return (blank(request) for request in requests)
        return build_loader(self.config, requests) if self.groups.collection.mp.rank() == 0 else None

    def run(self) -> int:
        """Train to the end of the schedule (or of `train.steps`). Returns the process's exit code."""
        self.told.listen()
        loader: Iterator[ClipBatch] | None = None
        try:
            self._say_what_is_used()
            loader = self._loader() if self.step < self.schedule.total_steps else None
            code = self._run(loader)
        except BaseException as error:
            self._blame(error)  # before the signals: a launcher sends SIGTERM when a rank dies
            alone = isinstance(error, FullMemory) and dist.get_world_size() == 1
            if alone or isinstance(error, (DataError, LoaderError, NonFiniteError)):
                self.saver.wait()
            raise
        finally:
            self.told.close()
            if loader is not None:
                loader.close()
            for sink in (self.profiler, self.progress, self.metrics, self.evals, self.wandb):
                if sink is not None:
                    sink.close()
            self.train_step.close()
            self._leave()
        return code

    def _say_what_is_used(self) -> None:
        self.progress.say(f"data: {self.data_note}")
        self.progress.say(backend_note(self.config.model.backend))
        self.progress.say(self.train_step.optimizers.note())
        for more in (width_note(self.config), mailbox.note(self.seats.home.collection.tp)):
            if more is not None:
                self.progress.say(more)

    def _run(self, loader: Iterator[ClipBatch] | None) -> int:
        config = self.config
        if self.step < self.schedule.total_steps:
            feed = Feed(loader, self.seats, self.guard, config.model.image_size)
        while self.step < self.schedule.total_steps:
            begin = time.perf_counter()
            watchdog.enter("data loading", self.step + 1)
            self.profiler.begin(self.step + 1)
            point = self.schedule.at(self.step)
            data = feed.next(point, self.told.number)
            if data.signal:
                return self._interrupted(data.signal)
            result = self._step(point, data)
            self.step += 1
            self.profiler.end(self.step)
            if self.inventory is not None:
                self.inventory.write(self.out, self.rank, self.progress.say)
                self.inventory = None
            self.skipped = 0 if result.applied else self.skipped + 1
            self._log(self._row(point, data, result, time.perf_counter() - begin))
            self.saver.poll()
            if self.skipped >= config.optim.max_skipped:
                self._give_up(point)
            # at the schedule's end, not at `train.steps`: a run in pieces has the lines of a whole one
            complete = self.step == self.schedule.schedule_steps
            if due := [each for each in self.evaluators if complete or self.step % each.every == 0]:
                self._evaluate(due)
            if self.step == self.schedule.total_steps or self.step % config.checkpoint.every == 0:
                self._save()
        self._wait_for_save()
        self._finish()
        return 0

    def _step(self, point: StagePoint, data: StepData) -> StepResult:
        flag, clips = self.config.micro_batch_flag(point.stage), point.micro_batch
        said = f"with micro-batches of {clips}; {full_memory.training_ways(self.config, flag, clips)}"
        with full_memory.told(f"step {self.step + 1}, stage {point.stage.name}", said):
            return self.train_step.run(point, data.batches, self._coming())

    def _coming(self) -> Outline | None:
        """The next step's first micro-batch, if there is one."""
        request = next(self._requests(self.step + 1), None)
        return request and Outline(*request, self.schedule.at(self.step + 1).stage.tau_samples)

    def _row(self, point: StagePoint, data: StepData, result: StepResult, seconds: float) -> dict[str, Any]:
        """One line of metrics.jsonl. `skipped` counts the steps skipped in a row up to this one."""
        row = {
            "step": self.step,
            "samples": point.samples_before + point.batch,
            "stage": point.stage.name,
            "loss": result.loss,
            "loss_flow": result.loss_flow,
            "loss_align": result.loss_align,
            "grad_norm": result.grad_norm,
            "lr": point.lr,
            "lr_flow": point.lr_flow,
            "tau": point.stage.tau_samples,
            "frames": point.stage.frames,
            "bad_samples": data.bad,
            **({"refused_samples": data.refused} if self.config.data.decoder == "dali" else {}),
            "skipped": self.skipped,
            **result.monitors,
            **result.crossed,
            "clips_per_s": point.batch / seconds,
            "step_time": seconds,
            "data_time": data.seconds,
            "memory_gib": full_memory.most_gib(),
        }
        if not result.applied:  # the step's samples: from the first up to, not including, the second
            row["skipped_indices"] = [point.samples_before, point.samples_before + point.batch]
        return row

    def _log(self, row: dict[str, Any]) -> None:
        if self.rank == 0:
            self.metrics.write(row)
            self.wandb.write(row)
            self.progress.step(row)
            if "skipped_indices" in row:
                first, end = row["skipped_indices"]
                self.progress.say(
                    f"step {row['step']} skipped: loss {row['loss']}, gradient norm {row['grad_norm']}; "
                    f"samples {first} to {end - 1}"
                )

    def _evaluate(self, due: list[Evaluator | OnlineKnn]) -> None:
        watchdog.enter("evaluation")
        row: dict[str, Any] = {"step": self.step}
        flag = self.config.micro_batch_flag(self.schedule.at(self.step - 1).stage)
        try:
            with fp8.scales_kept(self.train_step.model.children()):
                for each in due:
                    row |= each.run(flag)
        except FullMemory as error:
            raise self._saved_despite(error) from None
        if self.rank == 0:
            self.evals.write(row)
            self.wandb.write({"step": self.step, "eval": row})
            for each in due:
                self.progress.say(f"step {self.step}: {each.summary(row)}")

    def _save(self) -> None:
        """A checkpoint after `self.step` steps; no checkpoint is ahead of its metrics."""
        watchdog.enter("saving")
        for sink in (self.metrics, self.evals):
            if sink is not None:
                sink.sync()
        self.saver.begin(
            self.step,
            self.schedule.samples_before(self.step),
            extra={"bad_window": self.guard.state_dict(), "skipped": self.skipped},
            note=None if self.metrics is None else self.metrics.amend,
        )

    def _saved_despite(self, error: FullMemory) -> FullMemory:
        """An evaluation has failed, which takes nothing from the weights: save if all ranks are here."""
        said = f"step {self.step}, {error}"
        if not error.everywhere:
            return FullMemory(said)
        try:
            self._save()
            self._wait_for_save()
        except CheckpointError as failed:
            return FullMemory(f"{said}; and {failed}")
        return FullMemory(f"{said}; saved after step {self.step}, from where the run goes on")

    def _wait_for_save(self) -> None:
        watchdog.enter("saving")
        self.saver.wait()

    def _give_up(self, point: StagePoint) -> None:
        first = self.schedule.samples_before(self.step - self.skipped)
        raise NonFiniteError(
            f"{self.skipped} steps in a row up to step {self.step} were not finite and were skipped "
            f"(optim.max_skipped {self.config.optim.max_skipped}), samples {first} to "
            f"{point.samples_before + point.batch - 1}; the newest checkpoint is in {self.checkpoints}. "
            "Lower the learning rate, or look at these samples"
        )

    def _interrupted(self, number: int) -> int:
        what = "nothing is done yet; the same command starts again"
        if self.step > self.schedule.first_step_of_run:
            self._save()
            self._wait_for_save()
            what = f"saved after step {self.step}; the same command goes on from here"
        self.progress.say(f"{signal.Signals(number).name}: {what}")
        return 128 + number

    def _finish(self) -> None:
        """Pictures, and what lies where."""
        if self.rank != 0:
            return
        from nextvid_mcore.evaluation.pictures import plot_losses

        plot_losses(self.out / "metrics.jsonl", self.out / "plots" / "loss.png")
        self.progress.close()
        where = [
            f"finished: {self.step} of {self.schedule.schedule_steps} steps",
            f"  {self.checkpoints / self.saver.newest.name}   the last checkpoint",
            f"  {self.out}/metrics.jsonl   a line a step, plots/loss.png   the same as a picture",
        ]
        self.progress.say("\n".join(where))
