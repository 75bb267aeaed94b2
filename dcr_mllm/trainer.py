"""What both stages add to `transformers.Trainer`: exact streams, slim checkpoints, metrics without host syncs.

- A rank-sharded stream keeps its loader unprepared (a prepared one would give every rank the stream of rank 0) and
  saves its position per rank, so that a killed run goes on with the very next batch.
- A checkpoint holds trainable tensors only, and counts only once its `COMPLETE` marker is written.
- Metrics add up on the device and are read when they are logged; they go to `metrics.jsonl` and every tracker.
- A run that is told to stop saves at the end of its step; one whose loss is not finite keeps that step (see `watch`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import sort_checkpoints

from dcr_mllm.bad_step import refuse_to_repeat
from dcr_mllm.config import to_yaml
from dcr_mllm.errors import UserError
from dcr_mllm.hardware import HardwareConfig, choose_tf32
from dcr_mllm.launch import Launch, use_single_process_environment
from dcr_mllm.log import get_logger
from dcr_mllm.prefetch import Prefetcher
from dcr_mllm.runs import write_text_atomic
from dcr_mllm.stopping import deaf
from dcr_mllm.watch import Watch

logger = get_logger(__name__)

COMPLETE = "COMPLETE"
WEIGHTS = "model.safetensors"


class Position(Protocol):
    """Where a rank stands in its stream."""

    def update(self, batch: dict[str, Any]) -> None:
        """Note that a batch was consumed."""

    def to_json(self) -> str:
        """For the checkpoint."""


class Metrics:
    """Weighted means of device scalars since the last reading, without a host sync per step."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, values: dict[str, Tensor], weights: dict[str, Tensor] | None = None) -> None:
        """Add scalars; the same names each time.

        Args:
            values: By name.
            weights: Of some of them, such as the number of rows in a mean over some rows; the others weigh 1.
        """
        means = torch.stack([value.detach().float() for value in values.values()])
        one, weights = torch.ones((), device=means.device), weights or {}
        shares = torch.stack([weights.get(name, one) for name in values])
        row = torch.stack([means * shares, shares])
        self._names = list(values)
        self._sums = row if self._sums is None else self._sums + row

    def take(self) -> tuple[list[str], Tensor | None]:
        """Names, and weighted sums and sums of weights `[2, num_names]`; start anew."""
        sums, self._sums = self._sums, None
        return self._names, sums


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """The trainable tensors of a module by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def keep_trainable_only(module: nn.Module) -> None:
    """Make `state_dict` and `load_state_dict` of a module speak of trainable tensors only.

    A frozen base neither belongs into checkpoints nor may it be missed when one is loaded, strictly.
    """
    names = set(trainable_state(module))

    def drop_frozen(_module, state: dict[str, Tensor], _prefix: str, _metadata) -> None:
        for name in [key for key in state if key not in names]:
            del state[name]

    def forgive_frozen(_module, incompatible) -> None:
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key in names]

    module.register_state_dict_post_hook(drop_frozen)
    module.register_load_state_dict_post_hook(forgive_frozen)


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint below a directory; half-written ones are passed over."""
    found = [path for path in directory.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def read_position(checkpoint: Path, rank: int, world_size: int) -> str:
    """The stream position that a rank saved in a checkpoint.

    Raises:
        UserError: If the checkpoint was written by another number of processes.
    """
    saved = len(list(checkpoint.glob("stream_rank*.json")))
    if saved != world_size:
        raise UserError(
            f"{checkpoint} was written by {saved} processes and cannot go on with {world_size}: use {saved} again."
        )
    return (checkpoint / f"stream_rank{rank}.json").read_text()


class StageConfig(Protocol):
    """What the arguments below read from either stage's config."""

    run: str
    seed: int
    save_every: int
    log_every: int
    report_to: str | list[str]

    @property
    def hardware(self) -> HardwareConfig:
        """Of either stage; read only, as each stage has a class of its own."""


def stage_arguments(
    config: StageConfig, launch: Launch, phase: str, directory: Path, **specific: Any
) -> TrainingArguments:
    """The Trainer's arguments for a phase: what both stages share, and what the phase says.

    Args:
        config: Of the stage.
        launch: Devices, precision and DeepSpeed file.
        phase: Its name, for trackers.
        directory: Of its checkpoints.
        specific: Further arguments of `TrainingArguments`: batch, steps, learning rate, schedule, clipping.
    """
    choose_tf32(config.hardware, launch.device)
    if launch.deepspeed is not None:
        use_single_process_environment()
    return TrainingArguments(
        output_dir=str(directory),
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        optim="adamw_torch",
        bf16=launch.precision == "bf16",
        use_cpu=launch.device == "cpu",
        deepspeed=str(launch.deepspeed) if launch.deepspeed else None,
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would wait for the device at every step
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=None,  # StreamTrainer keeps the last two complete ones
        report_to=config.report_to,
        run_name=f"{config.run}-{phase}",
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
        ignore_data_skip=True,  # the stream itself starts where it stopped
        ddp_find_unused_parameters=False,
        **specific,
    )


class StreamTrainer(Trainer):
    """A Trainer on a rank-sharded endless stream; see the module's docstring."""

    def __init__(
        self,
        *,
        loader: DataLoader,
        position: Position,
        metrics: Metrics,
        metrics_file: Path,
        phase: str,
        config: Any,
        replay: str,
        prefetch: bool = False,
        learning_rates: dict[str, float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        refuse_to_repeat(metrics_file.parent)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossOnTheBar())
        if isinstance(loader, DataLoader):
            loader.worker_init_fn = deaf(loader.worker_init_fn)
        self._loader: Any = Prefetcher(loader, self.args.device) if prefetch else loader
        self.position = position
        self.metrics = metrics
        self._metrics_file = metrics_file
        self.phase = phase
        self._learning_rates = learning_rates or {}
        self._watch = Watch(self, metrics_file.parent, to_yaml(config), replay)
        self.add_callback(self._watch)
        self._last_log: tuple[float, int] | None = None
        # Whether the module's forward takes `num_items_in_batch`; otherwise its loss is a mean over the micro-batch.
        self.model_accepts_loss_kwargs = getattr(self.model, "accepts_loss_kwargs", False)

    def get_train_dataloader(self) -> DataLoader:
        return self._loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the stock method; parameters below a name in `learning_rates` get a rate of their own."""
        optimizer = super().create_optimizer(model)
        for prefix, rate in self._learning_rates.items():
            chosen = {id(p) for name, p in self.model.named_parameters() if name.startswith(prefix)}
            for group in list(optimizer.param_groups):
                apart = [p for p in group["params"] if id(p) in chosen]
                if apart:
                    group["params"] = [p for p in group["params"] if id(p) not in chosen]
                    optimizer.add_param_group({**group, "params": apart, "lr": rate})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Only to the device: the stock method casts floats to DeepSpeed's dtype, and noise must not be rounded."""
        return {name: value.to(self.args.device, non_blocking=True) for name, value in inputs.items()}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.position.update(inputs)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "cursor"}
        kept = dict(tensors)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            kept["num_items_in_batch"] = torch.as_tensor(num_items_in_batch)
        self._watch.begin(kept)
        return super().training_step(model, tensors, num_items_in_batch)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self._watch.forward_done(loss, last=self.accelerator.sync_gradients)
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method, which takes one more step where a checkpoint of the last one is all that is left to do.

        So a run that was killed between its last checkpoint and its export exports what that checkpoint holds.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock method.

        Raises:
            Stopped: A signal ended it early; it is saved.
        """
        output = super().train(*args, **kwargs)
        self._watch.raise_if_stopped()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            names, sums = self.metrics.take()
            if sums is not None:
                total, weight = self.accelerator.gather(sums[None]).sum(dim=0).tolist()
                # A name without weight has no value, such as a range of times that no image was drawn from.
                logs.update({name: t / w for name, t, w in zip(names, total, weight, strict=True) if w})
            now, step = time.monotonic(), self.state.global_step
            if self._last_log is not None and now > self._last_log[0]:
                images = (step - self._last_log[1]) * self._images_per_step()
                logs["images_per_second"] = images / (now - self._last_log[0])
            self._last_log = (now, step)
        super().log(logs, start_time)
        if self.is_world_process_zero() and "loss" in logs:
            line = json.dumps({"phase": self.phase, "step": self.state.global_step, **logs})
            with self._metrics_file.open("a") as file:
                file.write(line + "\n")

    def _images_per_step(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Only tensors that train, only safetensors (the stock method also pickles its arguments)."""
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        names = set(trainable_state(self.model))
        state = state_dict if state_dict is not None else self.model.state_dict()
        chosen = {name: value.detach().cpu().contiguous() for name, value in state.items() if name in names}
        safetensors.torch.save_file(chosen, directory / WEIGHTS, metadata={"format": "pt"})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._watch.refuse_bad_weights(last_checkpoint(Path(self.args.output_dir)))
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / COMPLETE).unlink(missing_ok=True)
        write_text_atomic(directory / f"stream_rank{self.args.process_index}.json", self.position.to_json())
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            write_text_atomic(directory / COMPLETE, "")
            # Rotation by the stock Trainer happens before the marker; do it here, when the new one counts.
            for old in sort_checkpoints(self.args.output_dir)[:-2]:
                _remove(Path(old))
        self.accelerator.wait_for_everyone()


class LossOnTheBar(ProgressCallback):
    """The stock progress bar with the last loss on it instead of a printed dictionary per log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)


def cut_metrics(file: Path, phase: str, step: int) -> None:
    """Drop the lines of a phase that lie after a step: a resumed run writes them again."""
    cut_lines(file, lambda record: record["phase"] != phase or record["step"] <= step)


def cut_lines(file: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keep some lines of a file of JSON lines, and not the last one if a kill has left only a part of it."""
    if not file.is_file():
        return
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    write_text_atomic(file, "".join(line for line in lines if keep(json.loads(line))))


def gathered_trainable_state(trainer: Trainer) -> dict[str, Tensor]:
    """The trained tensors on the CPU in fp32, gathered where ZeRO 3 has scattered them: call it on every rank."""
    state = trainable_state(trainer.model)
    parameters = list(state.values())
    context: Callable = _gather(parameters)
    with context():
        return {name: value.detach().float().cpu().clone() for name, value in state.items()}


def _gather(parameters: list[nn.Parameter]) -> Callable:
    import contextlib

    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext
    import deepspeed

    return lambda: deepspeed.zero.GatheredParameters(parameters)


def _remove(directory: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves no half of it that counts."""
    import shutil

    (directory / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(directory)
