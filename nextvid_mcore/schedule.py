"""The staged schedule (Table 8): which step belongs to which stage, its learning rates and its samples.

A step is named by the number of steps finished before it. Inside a stage the learning rate runs on a
straight line whose ends are exact: the first step uses `lr_start`, the last one `lr_end`. Steps and
samples are counted from the start of the whole schedule, also in a run that begins at a later stage
(`--train.start-stage`): such a branch sees the samples that the whole run would have seen there.
`--train.steps N` stops after N steps and rescales nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate

from nextvid_mcore.config import ConfigError, ProfileConfig, RunConfig, StageConfig, require


@dataclass(frozen=True)
class StagePoint:
    """Where a run stands when it is about to take `step`."""

    stage: StageConfig
    step: int
    samples_before: int  # clips of all earlier steps; also the global index of this step's first sample
    batch: int  # clips of this step, over all ranks
    micro_batch: int  # clips of one encoder replica in one forward pass
    lr: float
    lr_flow: float  # of the decoder


class Schedule:
    """The stages of a run, laid end to end.

    first_step_of_run: the step a fresh run begins with; total_steps: the number of finished steps at
    which it ends; schedule_steps: the length of all stages.
    """

    def __init__(self, config: RunConfig) -> None:
        self.stages = config.stages
        self._batches = [config.batch(stage) for stage in self.stages]
        self._micro_batches = [config.micro_batch(stage) for stage in self.stages]
        self._starts = [0, *accumulate(stage.steps for stage in self.stages)]
        samples = (stage.steps * batch for stage, batch in zip(self.stages, self._batches, strict=True))
        self._samples = [0, *accumulate(samples)]
        self.schedule_steps = self._starts[-1]

        begin, asked = config.train.start_stage, config.train.steps
        self.first_step_of_run = 0 if begin is None else self.first_step(begin)
        left = self.schedule_steps - self.first_step_of_run
        if asked is not None:
            where = "" if begin is None else f" from stage {begin} on"
            require(
                asked <= left,
                f"--train.steps {asked} is more than the {left} steps of recipe {config.recipe}'s "
                f"schedule{where}; ask for {left} or fewer, or give a stage more steps",
            )
        self.total_steps = self.first_step_of_run + (left if asked is None else asked)
        self._check_profile(config.profile)

    def _check_profile(self, profile: ProfileConfig) -> None:
        """ConfigError unless the run takes all the steps that are to be recorded."""
        first, last = self.first_step_of_run + 1, self.total_steps
        require(
            profile.span is None or first <= profile.span[0] <= profile.span[1] <= last,
            f"profile steps {profile.steps}: this run takes steps {first} to {last}; choose among them",
        )

    def at(self, step: int) -> StagePoint:
        """The point of the step that follows `step` finished steps, 0 <= step < schedule_steps."""
        require(
            0 <= step < self.schedule_steps,
            f"step {step} lies outside the schedule, whose steps are 0 to {self.schedule_steps - 1}",
        )
        index = bisect_right(self._starts, step) - 1
        stage, done = self.stages[index], step - self._starts[index]
        lr = _line(stage.lr_start, stage.lr_end, done, stage.steps - 1)
        return StagePoint(
            stage=stage,
            step=step,
            samples_before=self.samples_before(step),
            batch=self._batches[index],
            micro_batch=self._micro_batches[index],
            lr=lr,
            lr_flow=lr if stage.flow_lr is None else stage.flow_lr,
        )

    def samples_before(self, step: int) -> int:
        """Clips of the first `step` steps of the schedule, 0 <= step <= schedule_steps."""
        require(
            0 <= step <= self.schedule_steps,
            f"{step} finished steps: the schedule has {self.schedule_steps}",
        )
        index = min(bisect_right(self._starts, step) - 1, len(self.stages) - 1)
        return self._samples[index] + (step - self._starts[index]) * self._batches[index]

    def stages_of_run(self) -> tuple[StageConfig, ...]:
        """The stages that this run enters, each with the number of steps that it takes there."""
        found = []
        for stage, start in zip(self.stages, self._starts, strict=False):
            steps = min(start + stage.steps, self.total_steps) - max(start, self.first_step_of_run)
            if steps > 0:
                found.append(replace(stage, steps=steps))
        return tuple(found)

    def first_step(self, stage_name: str) -> int:
        """The step with which a stage begins."""
        for stage, start in zip(self.stages, self._starts, strict=False):
            if stage.name == stage_name:
                return start
        raise ConfigError(
            f"no stage {stage_name!r} in the schedule; there are {', '.join(s.name for s in self.stages)}"
        )


def _line(start: float, end: float, done: int, last: int) -> float:
    """The straight line from `start` (done = 0) to `end` (done = last), both ends exact."""
    if done == 0 or last == 0:
        return start
    if done == last:
        return end
    return start + (end - start) * done / last
