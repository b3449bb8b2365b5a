"""The training loop of `tune`: transformers' Trainer with the losses of Eq. 6.

Trainer runs the loop; ours are the losses, the two learning rates, the planned batches, and a checkpoint
of what is trained. What a run shares with the next one lies in one folder: losses.jsonl and checkpoint/.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from melinoe.errors import MelinoeError
from melinoe.moe import MoeLayer
from melinoe.offload.adapter import replace_folder
from melinoe.tuning.batches import Batches
from melinoe.tuning.losses import Losses, TuningLosses
from melinoe.tuning.progress import TuningProgress
from melinoe.tuning.settings import TuneSettings

CHECKPOINT, WEIGHTS, STATE = "checkpoint", "training.safetensors", "trainer_state.json"
LOG = "losses.jsonl"
FINAL_LEARNING_RATE = 0.0  # of the first, reached at the end
MAX_SKIPPED = 10  # steps in a row that were not finite


class LocalityTrainer(Trainer):
    """Trainer with the losses of Eq. 6.

    Args:
        model: routers and factors require gradient, nothing else does.
        folder: where losses.jsonl and the checkpoint go.
        tokens_per_step: mean completion and scored tokens of a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[MoeLayer],
        batches: Batches,
        settings: TuneSettings,
        folder: Path,
        tokens_per_step: tuple[float, float],
        device: str,
        progress: TuningProgress,
    ) -> None:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=settings.max_steps,
            per_device_train_batch_size=1,
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
        self.tokens_per_step, self.progress = tokens_per_step, progress
        self.losses = TuningLosses(model, layers, settings)
        self.last: Losses | None = None
        self.skipped_steps = self.skipped_in_a_row = 0
        self.started = time.monotonic()

    # ------------------------------------------------------------ what a step is

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The planned batches, in order; one item is one batch (a resumed run skips by batch sampler)."""
        order = [[index] for index in range(len(self.train_dataset))]
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=order, collate_fn=lambda items: items[0]
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], *_args: Any, **_options: Any
    ) -> torch.Tensor:
        for layer in self.layers:
            layer.router.eval()  # some routers draw noise in training mode, which decoding does not
        torch.manual_seed((self.settings.seed << 20) + self.state.global_step)  # dropout, also after a resume
        self.losses.schedule = self.settings.schedule(self.done_share(self.state.global_step))
        self.last = self.losses(model, inputs, self.state.global_step, self.tokens_per_step)
        return self.last.total

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        settings = self.settings
        routers = [p for layer in self.layers for p in layer.router.parameters() if p.requires_grad]
        factors = [p for layer in self.layers for p in layer.experts.low_rank.parameters() if p.requires_grad]
        rate, router_rate = settings.learning_rates(self.model.config.get_text_config().hidden_size)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": routers, "lr": router_rate},
                {"params": factors, "lr": rate},
            ],
            weight_decay=0.0,
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
        if settings.time_limit_seconds:
            share = max(share, (time.monotonic() - self.started) / settings.time_limit_seconds)
        return min(1.0, share)

    def _learning_rate_at(self, step: int) -> float:
        """Linear warm-up over the first steps, then linear to FINAL_LEARNING_RATE."""
        warm = (step + 1) / max(1.0, self.settings.warmup * self.settings.max_steps)
        return min(1.0, warm) * (1 - (1 - FINAL_LEARNING_RATE) * self.done_share(step))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """A step whose gradient is not finite changes nothing and is counted."""
        norm = float(super()._get_grad_norm(model, grad_norm))
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
        """Not counted: Trainer would walk all parameters at every step for it."""
        return 0

    # ------------------------------------------------------------ checkpoint and resume

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """What is trained with AdamW's moments (safetensors), and Trainer's state; whole or not at all."""
        new = self.folder / (CHECKPOINT + ".new")
        new.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, parameter in self._trained().items():
            tensors[name] = parameter.detach()
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}:{name}": value for key, value in moments.items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(
            tensors,
            new / WEIGHTS,
            {"skipped_steps": str(self.skipped_steps), "losses": json.dumps(self.losses.memory())},
        )
        self.state.save_to_json(str(new / STATE))
        replace_folder(new, self.folder / CHECKPOINT)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with safe_open(Path(resume_from_checkpoint) / WEIGHTS, framework="pt") as file:
            for name, parameter in self._trained().items():
                parameter.copy_(file.get_tensor(name))
            self.skipped_steps = int(file.metadata()["skipped_steps"])
            self.losses.remember(json.loads(file.metadata()["losses"]))

    @torch.no_grad()
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with safe_open(Path(checkpoint) / WEIGHTS, framework="pt") as file:
            names = set(file.keys())
            for name, parameter in self._trained().items():
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}:{name}" in names:
                        value = file.get_tensor(f"{key}:{name}")
                        state = self.optimizer.state[parameter]
                        state[key] = value if key == "step" else value.to(parameter.device)
        step = json.loads((Path(checkpoint) / STATE).read_text())["global_step"]
        self.lr_scheduler.last_epoch = step
        for group, first in zip(self.optimizer.param_groups, self.lr_scheduler.base_lrs, strict=True):
            group["lr"] = first * self._learning_rate_at(step)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to restore: every step seeds itself."""


class _Steps(TrainerCallback):
    """After each step: one line in losses.jsonl, the progress bar, and the time limit."""

    def __init__(self, trainer: LocalityTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Drops the log lines of steps that an interrupted run did and its checkpoint did not keep."""
        log = self.trainer.folder / LOG
        lines = log.read_text().splitlines() if log.is_file() else []
        log.write_text("".join(f"{line}\n" for line in lines[: state.global_step]))
        self.trainer.started = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        trainer, last = self.trainer, self.trainer.last
        assert last is not None
        seconds = time.monotonic() - trainer.started
        record: dict[str, Any] = {"step": state.global_step}
        for name in ("total", "nll", "misses", "rank", "hit_rate", "divergence", "base_nll"):
            value = getattr(last, name)
            if value is not None:
                value = float(value.detach())
                record[name] = round(value, 6) if math.isfinite(value) else None
        if trainer.losses.weight.steers:
            record["weight_factor"] = round(trainer.losses.weight.factor, 5)
        record |= {"seconds": round(seconds, 3), "skipped": trainer.skipped_in_a_row > 0}
        with (trainer.folder / LOG).open("a") as log:
            log.write(json.dumps(record) + "\n")
        trainer.progress.step(record, trainer.done_share(state.global_step))
        limit = trainer.settings.time_limit_seconds
        if limit is not None and seconds >= limit:
            control.should_training_stop = True
