"""The only clock of a run: counts training seconds, drives the schedule, ends the training inside its budget.

Time is rank 0's, sent to all ranks once per optimizer step over gloo, which needs no GPU synchronization. Every number
that follows from it (learning rate, progress, the decision to stop) is therefore the same on all ranks.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from hymba_lightning.callbacks.stopwatch import Stopwatch
from hymba_lightning.checkpoints import check_clock_state
from hymba_lightning.run.run import ClockReading, Run
from hymba_lightning.trainer_internals import say_that_data_are_endless, step_limit, time_limit

# Of a budget: over thirty years.
MOST_SECONDS = 1_000_000_000
NO_END = (
    "nothing ends this run: set model.budget_seconds, trainer.max_steps, trainer.max_time, or trainer.max_epochs for a "
    "loader that ends"
)


class WallClock(Callback):
    """Counts training time and stops every rank at the same optimizer step, before the budget is used up.

    The clock starts with the first training batch (so after the compile warm-up), stands still during validation and
    inside `paused()`, and its state goes into checkpoints, so that a resumed run spends the budget once.

    After every optimizer step the end of the next one is predicted: `margin` times the longest of the last
    `recent_steps` (so never less than their mean), for that step and for those a GPU still works on. If it lies past
    `budget_seconds - reserve_seconds`, training ends. The limit of this: one step that takes longer than `margin`
    times every recent one, at the very end of the budget, overruns by the difference; a reserve covers that. The first
    step has no prediction and always runs unless the budget is already spent.

    Args:
        budget_seconds: training seconds in all; None never stops.
        reserve_seconds: seconds of the budget held back for work after training that counts, such as calibration.
        margin: factor on the predicted duration of a step.
        recent_steps: how many step durations the maximum looks back on.
        time_fn: monotonic seconds; replaced in tests.

    Raises:
        ValueError: an argument is out of range, or the reserve leaves nothing of the budget.
    """

    def __init__(
        self,
        budget_seconds: float | None = None,
        reserve_seconds: float = 0.0,
        margin: float = 1.05,
        recent_steps: int = 20,
        time_fn: Callable[[], float] = time.monotonic,
    ) -> None:
        if budget_seconds is not None and not 0 < budget_seconds <= MOST_SECONDS:
            raise ValueError(
                f"budget_seconds is {budget_seconds}; it must be positive and at most {MOST_SECONDS:,}, or null for "
                "no budget"
            )
        if not reserve_seconds >= 0:
            raise ValueError(f"reserve_seconds is {reserve_seconds}; it must be 0 or positive")
        if budget_seconds is not None and reserve_seconds >= budget_seconds:
            raise ValueError(
                f"reserve_seconds ({reserve_seconds}) leaves nothing of budget_seconds ({budget_seconds}) to train in; "
                "lower the reserve or raise the budget"
            )
        if not margin >= 1:
            raise ValueError(f"margin is {margin}; it must be 1 or more, e.g. 1.05")
        if recent_steps < 1:
            raise ValueError(f"recent_steps is {recent_steps}; it must be 1 or more")
        self.budget_seconds = budget_seconds
        self.reserve_seconds = reserve_seconds
        self.margin = margin
        self.watch = Stopwatch(time_fn, finish_work=self._finish_gpu_work)
        self.stop_reason: str | None = None
        self.stop_code = 0
        self._reading: ClockReading | None = None
        self._steps = 0
        self._recent: deque[float] = deque(maxlen=recent_steps)
        self._boundary = 0.0
        self._seen_step = 0
        self._inside_step = False
        self._made_steps = False
        """Whether this fit trained, and did not only look at what a run before had left to do."""
        self._ended = False
        self._requested_code = 0
        self._timer: Timer | None = None
        """Lightning's, of trainer.max_time."""
        self._time_done = 0.0
        """Rank 0's share of max_time that is over."""
        self._group: dist.ProcessGroup | None = None
        self._event: torch.cuda.Event | None = None

    @property
    def usable_seconds(self) -> float | None:
        """Budget minus reserve."""
        return None if self.budget_seconds is None else self.budget_seconds - self.reserve_seconds

    @property
    def reading(self) -> ClockReading:
        """The latest reading that all ranks agreed on.

        Raises:
            RuntimeError: no fit has started.
        """
        if self._reading is None:
            raise RuntimeError("the clock has no reading before training starts")
        return self._reading

    def elapsed(self) -> float:
        """Training seconds so far, by this rank's clock (set to rank 0's after every optimizer step)."""
        return self.watch.elapsed()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock for the time of the block. May be nested, and used while the clock does not run."""
        self.watch.pause()
        try:
            yield
        finally:
            self.watch.resume()

    def charged(self) -> AbstractContextManager[None]:
        """Runs the clock for the time of the block, after training: for the work that the reserve was held back for."""
        return self.watch.charged()

    def end(self) -> None:
        """Ends training: from now on only the time within `charged` is counted."""
        self.watch.stop()
        usable, ended, self._ended = self.usable_seconds, self._ended, True
        # Before the reserve's work is charged, which is no step.
        if usable is not None and self._made_steps and not ended and self.elapsed() > usable:
            rank_zero_warn(
                f"training took {self.elapsed():.2f} s of {usable:.2f} s: its last step took longer than predicted"
                + (" (it was the only one; the budget does not fit one step)" if self._steps == 1 else "")
            )

    def request_stop(self, code: int = 1) -> None:
        """End training on all ranks after the optimizer step in progress; safe to call in a signal handler.

        Args:
            code: a positive number, such as the signal's, that `stop_code` has on all ranks afterwards.
        """
        self._requested_code = code

    def agree_on_request(self) -> int:
        """The highest code that any rank asked to stop with, else 0; to be called by all ranks, between steps."""
        if self._group is None:
            return self._requested_code
        code = torch.tensor([self._requested_code])
        dist.all_reduce(code, op=dist.ReduceOp.MAX, group=self._group)
        return int(code)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        Run.of(trainer).clock = self
        self.watch.reset()
        self._inside_step, self._event, self._made_steps, self._ended = False, None, False, False
        self.stop_reason, self.stop_code, self._requested_code = None, 0, 0
        if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """
        Raises:
            ValueError: the Trainer has a lower limit on steps or epochs, against which no budget can be kept, or
                nothing ends the run.
        """
        say_that_data_are_endless(trainer)
        self._timer = time_limit(trainer)
        if self.budget_seconds is None and self._timer is None and step_limit(trainer) is None:
            raise ValueError(NO_END)
        if self.budget_seconds is not None and (trainer.min_steps or trainer.min_epochs):
            raise ValueError(
                "a budget cannot be kept together with Trainer(min_steps=…) or Trainer(min_epochs=…); leave those out"
            )
        self._seen_step = trainer.global_step
        spent = self._boundary = self.elapsed()
        self._time_done = trainer.strategy.broadcast(self._share_of_time()) if self._timer is not None else 0.0
        self._reading = self._read(trainer, spent)
        usable = self.usable_seconds
        if usable is not None and spent + (self._predicted_step() if self._recent else 0.0) >= usable:
            rank_zero_warn(
                f"the budget of {usable:.1f} s is already spent ({spent:.1f} s, step {trainer.global_step}); "
                "no step is run. Raise budget_seconds to train on."
            )
            self._stop(trainer, "budget")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Publish the reading at the first micro-batch of an optimizer step."""
        if not self.watch.started and self.stop_reason is None:
            self.watch.start()
        if self._inside_step:
            return
        self._inside_step = True
        for set_schedule in Run.of(trainer).schedules:
            set_schedule(self.reading)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a reading at the end of an optimizer step, and decide whether there is time for another one."""
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        self._inside_step, self._made_steps = False, True
        in_flight = self._wait_for_gpu(pl_module)
        elapsed, self.stop_code = self._agree()
        self._steps += 1
        self._recent.append(elapsed - self._boundary)
        self._boundary = elapsed
        self._reading = self._read(trainer, elapsed)
        usable = self.usable_seconds
        if self.stop_code:
            self._stop(trainer, "request")
        elif usable is not None and elapsed + (in_flight + 1) * self._predicted_step() > usable:
            self._stop(trainer, "budget")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.watch.stop()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """
        Raises:
            CheckpointError: a fit would go on without knowing what is left of its budget.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            check_clock_state(trainer.ckpt_path or "", state, checkpoint.get("global_step"))

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self.elapsed(), "steps": self._steps, "recent": list(self._recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.watch.set_elapsed(float(state_dict["elapsed"]))
        self._steps = int(state_dict["steps"])
        self._recent.clear()
        self._recent.extend(state_dict["recent"])

    def _read(self, trainer: Trainer, elapsed: float) -> ClockReading:
        max_steps = step_limit(trainer) or None
        usable = self.usable_seconds
        shares = [self._time_done]
        if usable is not None:
            shares.append(elapsed / usable)
        elif self._timer is not None and self._time_done > 0.0:
            usable = elapsed / self._time_done
        if max_steps is not None:
            shares.append(trainer.global_step / max_steps)
        return ClockReading(
            step=trainer.global_step,
            elapsed=elapsed,
            mean_step=elapsed / self._steps if self._steps else None,
            budget=usable,
            progress=min(max(shares), 1.0),
            remaining=None if usable is None else max(usable - elapsed, 0.0),
            max_steps=max_steps,
        )

    def _predicted_step(self) -> float:
        return self.margin * max(self._recent)

    def _wait_for_gpu(self, pl_module: LightningModule) -> int:
        """Keep the CPU at most one step ahead of the GPU, so that its clock tells the truth.

        Returns:
            number of steps still in the GPU's queue: 1, or 0 close to the end of the budget and on the CPU.
        """
        if pl_module.device.type != "cuda":
            return 0
        previous, self._event = self._event, torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(pl_module.device))
        remaining = self.reading.remaining
        # Agreed numbers of the step before, so that all ranks take the same branch.
        if not self._recent or (remaining is not None and remaining < 5 * self._predicted_step()):
            self._event.synchronize()
            return 0
        if previous is not None:
            previous.synchronize()
        return 1

    def _agree(self) -> tuple[float, int]:
        """Rank 0's elapsed seconds, and the highest code that any rank asked to stop with, else 0."""
        if self._group is None:
            self._time_done = self._share_of_time()
            return self.elapsed(), self._requested_code
        own = (self.elapsed(), self._share_of_time()) if dist.get_rank() == 0 else (0.0, 0.0)
        message = torch.tensor([*own, float(self._requested_code)], dtype=torch.float64)
        dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self._group)
        elapsed, self._time_done, code = message.tolist()
        self.watch.set_elapsed(elapsed)
        return elapsed, int(code)

    def _share_of_time(self) -> float:
        """Of max_time, which counts validations too: this rank's."""
        if self._timer is None:
            return 0.0
        done, left = self._timer.time_elapsed(), self._timer.time_remaining() or 0.0
        return min(done / max(done + left, 1e-9), 1.0)

    def _stop(self, trainer: Trainer, reason: str) -> None:
        self.watch.stop()
        self.stop_reason = reason
        trainer.should_stop = True
        rank_zero_info(f"training stops after step {trainer.global_step} and {self.elapsed():.2f} s: {reason}")

    def _finish_gpu_work(self) -> None:
        if self._event is not None:
            self._event.synchronize()
