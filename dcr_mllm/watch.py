"""Looks after the steps of a `StreamTrainer`: stops it when told to, and before a bad loss spoils the weights.

Both are known to all processes just before the weights change (`dcr_mllm.agreement`), so that all of them save, or
write down a bad step, at the same point.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from dcr_mllm.agreement import Agreement, any_process
from dcr_mllm.bad_step import MicroStep, write_rank, write_step
from dcr_mllm.errors import UserError
from dcr_mllm.stopping import Stopped, received

if TYPE_CHECKING:
    from dcr_mllm.trainer import StreamTrainer


class Watch(TrainerCallback):
    """See the module's docstring.

    Args:
        trainer: That it watches.
        folder: Where a bad step goes to.
        config: YAML of the run, to go with it.
        replay: Module that computes a bad step again.
    """

    def __init__(self, trainer: StreamTrainer, folder: Path, config: str, replay: str):
        self._trainer, self._folder, self._config, self._replay = trainer, folder, config, replay
        self._agreement = Agreement()
        self._micro_steps: list[MicroStep] = []
        self._answered = False
        self._signal = 0

    def begin(self, inputs: dict[str, Tensor]) -> None:
        """A micro-step begins."""
        if self._answered:
            self._micro_steps, self._answered = [], False
            self._agreement.clear()
        self._micro_steps.append(MicroStep.now(inputs))

    def forward_done(self, loss: Tensor, *, last: bool) -> None:
        """Its loss is there, perhaps not yet computed; `last` before the weights change."""
        self._agreement.add(loss)
        if last:
            self._agreement.ask(received())

    def on_train_begin(self, args, state, control, **kwargs):
        optimizer = self._trainer.optimizer
        while hasattr(optimizer, "optimizer"):  # accelerate and DeepSpeed wrap it
            optimizer = optimizer.optimizer
        if isinstance(optimizer, torch.optim.Optimizer):
            # DeepSpeed's engine steps inside `backward`, where the Trainer's own callbacks come too late.
            optimizer.register_step_pre_hook(lambda *_: self._look(state.global_step + 1))

    def on_step_end(self, args, state, control, **kwargs):
        self._look(state.global_step)
        if self._signal:
            control.should_save = control.should_log = control.should_training_stop = True

    def raise_if_stopped(self) -> None:
        """After training.

        Raises:
            Stopped: It ended early, as it was told.
        """
        state = self._trainer.state
        if self._signal and state.global_step < state.max_steps:
            raise Stopped(
                f"stopped by {signal.Signals(self._signal).name} at step {state.global_step} of the "
                f"{self._trainer.phase} phase; the same command goes on"
            )

    def refuse_bad_weights(self, last_good: Path | None) -> None:
        """Before a checkpoint is written: a gradient may have been infinite while its loss was not.

        Raises:
            UserError: A trained weight is not finite.
        """
        # ZeRO 3 keeps each process's part in `ds_tensor`.
        weights = [getattr(p, "ds_tensor", p) for p in self._trainer.model.parameters() if p.requires_grad]
        good = [weight.detach().isfinite().all().to(self._trainer.args.device) for weight in weights]
        if any_process(~torch.stack(good).all()):
            raise UserError(
                f"the weights are not finite after step {self._trainer.state.global_step} of the {self._trainer.phase} "
                f"phase although the losses were, so a gradient overflowed: nothing is saved; "
                f"the last good checkpoint is {last_good or 'the start'}; lower the learning rate or use fp32."
            )

    def _look(self, step: int) -> None:
        if self._answered:
            return
        bad, self._signal = self._agreement.read()
        self._answered = True
        if bad:
            self._keep(step)

    def _keep(self, step: int) -> None:
        from dcr_mllm.trainer import gathered_trainable_state

        trainer = self._trainer
        directory = self._folder / f"bad-step-{step}"
        losses = trainer.accelerator.gather(torch.stack(self._agreement.losses)[None]).cpu()  # [ranks, micro-steps]
        write_rank(directory, trainer.args.process_index, self._micro_steps)
        weights = gathered_trainable_state(trainer)
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            facts: dict[str, Any] = {
                "phase": trainer.phase,
                "step": step,
                "num_processes": trainer.args.world_size,
                "precision": "bf16" if trainer.args.bf16 else "fp32",
                "deepspeed": trainer.is_deepspeed_enabled,
            }
            write_step(directory, config=self._config, weights=weights, losses=losses, **facts)
        trainer.accelerator.wait_for_everyone()
        rank, micro_step = (~losses.isfinite()).nonzero()[0].tolist()
        raise UserError(
            f"the loss is {losses[rank, micro_step].item()} in step {step} of the {trainer.phase} phase (rank {rank}); "
            f"the step is kept, `python -m {self._replay} {directory}` computes it again; nothing of it was saved."
        )
