"""The training loop of `tune`: transformers' Trainer with the losses of Eq. 6.

Trainer runs the loop, over gradients that accumulate and over several processes; ours are the losses, the two
learning rates, the planned batches, and a saved run of what is trained alone. What a run shares with the next
one
lies in one folder: losses.jsonl, evaluations.jsonl and checkpoint/.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from melinoe.errors import MelinoeError
from melinoe.losses.tuning_loss import cooled
from melinoe.models.layers import MoeLayer
from melinoe.tuning import saved_run
from melinoe.tuning.evaluation import Evaluation
from melinoe.tuning.parallel.processes import Processes
from melinoe.tuning.progress import TuningProgress
from melinoe.tuning.settings import TuneSettings
from melinoe.tuning.step.batches import StepBatches, TokensPerStep
from melinoe.tuning.step.losses import StepLosses
from melinoe.tuning.step.means import StepMeans, StepSums

LOG, EVALUATIONS = "losses.jsonl", "evaluations.jsonl"
FINAL_LEARNING_RATE = 0.0  # of the first, reached at the end
MAX_SKIPPED = 10  # steps in a row that were not finite


class LocalityTrainer(Trainer):
    """Trainer with the losses of Eq. 6.

    Args:
        model: routers and factors require gradient, nothing else does.
        folder: where the logs and the saved run go.
        evaluation: held-out rows to measure on, or None.
    """

    loss_is_scaled_for_ga = True  # the sum over the parts of a step is the loss of the step

    def __init__(
        self,
        model: nn.Module,
        layers: list[MoeLayer],
        batches: StepBatches,
        settings: TuneSettings,
        folder: Path,
        tokens_per_step: TokensPerStep,
        device: str,
        progress: TuningProgress,
        processes: Processes | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=settings.max_steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=batches.accumulate,
            ddp_find_unused_parameters=False,  # all that is trained is used; some only by our losses
            ddp_broadcast_buffers=False,
            max_grad_norm=settings.max_grad_norm or math.inf,
            seed=settings.seed,
            use_cpu=device == "cpu",
            save_strategy="steps" if settings.checkpoint_steps else "no",
            save_steps=max(1, settings.checkpoint_steps),
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # no silent DataParallel
        super().__init__(model=model, args=arguments, train_dataset=batches, callbacks=[_Steps(self)])
        self.remove_callback(PrinterCallback)
        self.settings, self.folder, self.layers = settings, folder, layers
        self.accumulate = batches.accumulate  # of paged experts fewer than settings.accumulate may do
        self.tokens_per_step, self.progress, self.evaluation = tokens_per_step, progress, evaluation
        self.processes = processes or Processes()
        self.losses = StepLosses(model, layers, settings)
        self.sums = StepSums(self.processes)
        self.means: StepMeans | None = None
        self.skipped_steps = self.skipped_in_a_row = 0
        self.started, self.seconds = time.monotonic(), 0.0

    # ------------------------------------------------------------ what a step is

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The planned batches of this process, in order.

        One item is one batch, because a resumed run skips by the batch sampler.
        """
        order = [[index] for index in range(len(self.train_dataset))]
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=order, collate_fn=lambda items: items[0]
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *_args: Any, **_options: Any
    ) -> torch.Tensor:
        for layer in self.layers:
            layer.router.eval()  # some routers draw noise in training mode, which decoding does not
        step, turn, processes = self.state.global_step, len(self.sums.parts), self.processes
        part = turn * processes.count + processes.index
        # dropout, also after a resume; each part draws its own
        parts = self.accumulate * processes.count
        torch.manual_seed(((self.settings.seed << 20) + step) * parts + part)
        self.losses.cooling = cooled(self.done_share(step), self.settings.cooldown)
        losses = self.losses(model, inputs, self.tokens_per_step)
        self.sums.add(losses)
        return losses.total * processes.count  # whose gradients are averaged, and are to be summed

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        settings = self.settings
        routers = [p for layer in self.layers for p in layer.router.parameters() if p.requires_grad]
        factors = [p for layer in self.layers for p in layer.experts.low_rank.parameters() if p.requires_grad]
        rate, router_rate = settings.learning_rates(self.model.config.get_text_config().hidden_size)
        self.optimizer = torch.optim.AdamW(
            [{"params": routers, "lr": router_rate}, {"params": factors, "lr": rate}], weight_decay=0.0
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, *_args: Any, **_options: Any) -> Any:
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._learning_rate_at)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def done_share(self, step: int) -> float:
        """How much of the run is over at `step`, 0 .. 1: by steps, or by time where that is scarcer."""
        settings = self.settings
        share = step / settings.max_steps
        if settings.time_limit:
            share = max(share, self.seconds / settings.time_limit)
        return min(1.0, share)

    def _learning_rate_at(self, step: int) -> float:
        """Linear warm-up over the first share of the run, then linear to FINAL_LEARNING_RATE."""
        warmup = self.settings.warmup
        risen = min(1.0, self.done_share(step + 1) / warmup) if warmup else 1.0
        return risen * (1 - (1 - FINAL_LEARNING_RATE) * self.done_share(step))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """Adds up what the parts of a step gave.

        Trainer calls it once per step, when the gradient is whole and summed over processes. A step whose
        gradient is not finite, in whichever part, changes nothing and is counted.
        """
        norm = float(super()._get_grad_norm(model, grad_norm))
        self.means = self.sums.finish(time.monotonic() - self.started)
        self.seconds = self.means.seconds  # the first process's clock: all must stop at the same step
        self.losses.end_of_step(self.means)
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            return norm
        model.zero_grad(set_to_none=True)
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise MelinoeError(
                f"tune: {MAX_SKIPPED} steps in a row were not finite", next_step="lower the learning rates"
            )
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Counts nothing: Trainer would walk all parameters at every step for it."""
        return 0

    # ------------------------------------------------------------ saving and resuming

    def _trained(self) -> saved_run.Trained:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self.processes.is_first:
            return
        notes = {"skipped_steps": str(self.skipped_steps), "losses": json.dumps(self.losses.state_dict())}
        saved_run.save_run(self.folder, self._trained(), self.optimizer, self.state, notes)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        notes = saved_run.load_weights(Path(resume_from_checkpoint), self._trained())
        self.skipped_steps = int(notes["skipped_steps"])
        self.losses.load_state_dict(json.loads(notes["losses"]))

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is None:
            return
        saved_run.load_moments(Path(folder), self._trained(), self.optimizer)
        step = saved_run.steps_done(Path(folder))
        self.lr_scheduler.last_epoch = step
        for group, first in zip(self.optimizer.param_groups, self.lr_scheduler.base_lrs, strict=True):
            group["lr"] = first * self._learning_rate_at(step)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to restore: every step seeds itself."""


class _Steps(TrainerCallback):
    """What happens after each step: a line in losses.jsonl, the progress bar, evaluation, the time limit."""

    def __init__(self, trainer: LocalityTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Drops the log lines of steps that an interrupted run did and its checkpoint did not keep."""
        trainer = self.trainer
        if trainer.processes.is_first:
            for name in (LOG, EVALUATIONS):
                log = trainer.folder / name
                lines = log.read_text().splitlines() if log.is_file() else []
                kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
                log.write_text("".join(f"{line}\n" for line in kept))
        trainer.started = time.monotonic()
        if state.global_step == 0:
            self._evaluate(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        trainer, means = self.trainer, self.trainer.means
        assert means is not None
        record: dict[str, Any] = {"step": state.global_step}
        optional = ("divergence", "base_nll")
        for name in ("total", "nll", "misses", "rank", "hit_rate", *optional):
            value = means.values[name]
            if value is not None or name not in optional:
                record[name] = None if value is None else round(value, 6)
        if trainer.losses.controller.steers:
            record["weight_factor"] = round(trainer.losses.controller.factor, 5)
        record |= {"seconds": round(means.seconds, 3), "skipped": trainer.skipped_in_a_row > 0}
        self._log(LOG, record)
        limit = trainer.settings.time_limit
        if limit is not None and means.seconds >= limit:
            control.should_training_stop = True
        last = control.should_training_stop or state.global_step >= trainer.settings.max_steps
        every = trainer.settings.eval_steps
        if every and (state.global_step % every == 0 or last):
            self._evaluate(state.global_step)
        trainer.progress.step(record, trainer.done_share(state.global_step))

    def _evaluate(self, step: int) -> None:
        trainer = self.trainer
        if trainer.evaluation is None:
            return
        record = {"step": step, **trainer.evaluation.measure(trainer.model)}
        self._log(EVALUATIONS, record)
        trainer.progress.evaluation(record)

    def _log(self, name: str, record: dict[str, Any]) -> None:
        if self.trainer.processes.is_first:
            with (self.trainer.folder / name).open("a") as log:
                log.write(json.dumps(record) + "\n")
