"""Pairs and zero-shot accuracy of the tower on a validation split while it trains, with the evaluation's own code.

Rank 0 holds a tower of its own in fp32, as the evaluation loads it. The trained LoRA is gathered and merged into that
one, so the module that trains, its mode and the random state stay as they are: a run that validates trains the same
tower as one that does not.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from dcr_mllm.evaluation.features import DualEncoder
from dcr_mllm.evaluation.measures import zero_shot_correct
from dcr_mllm.evaluation.mmvp_vlm import pair_logits, score_pairs
from dcr_mllm.headers import tower_summary
from dcr_mllm.log import get_logger
from dcr_mllm.towers import add_lora, merged_weights
from stage1_dcr.selection import (
    Measurement,
    choose,
    loss_warning,
    read_measurements,
    write_measurements,
)
from stage1_dcr.validation_split import read_split

if TYPE_CHECKING:
    from dcr_mllm.evaluation.features import Picture
    from dcr_mllm.trainer import StreamTrainer
    from stage1_dcr.train import Stage1

logger = get_logger(__name__)

BATCH_SIZE = 64
"""Images per forward pass."""
MAX_KEPT_BYTES = 1 << 30
"""Images are decoded once and kept on the host if they fit into this; otherwise they are decoded each time."""

_TOWER = "tower."  # how the names of the tower's tensors begin in the module that trains


class Validation:
    """Measures the tower of a run and keeps what was measured; lives on rank 0 alone.

    To be made before the first `TrainingArguments`: under ZeRO 3 whatever `from_pretrained` loads after it is empty.
    The base tower is measured at once, so that an image that cannot be decoded ends the run before it trains.

    Args:
        stage: Its base tower is copied.
        directory: The split.
        run: Directory of the run.

    Raises:
        UserError: An image cannot be decoded.
    """

    def __init__(self, stage: Stage1, directory: Path, run: Path):
        self._config, self._run = stage.config, run
        self._states = run / "checkpoints" / "validation"
        with torch.random.fork_rng(devices=[]):
            self._tower = add_lora(copy.deepcopy(stage.tower), stage.lora())
        encoder = DualEncoder(tower_summary(stage.tower_path), device=stage.launch.device, batch_size=BATCH_SIZE)
        self._encoder = encoder
        split = read_split(directory)
        self._truth = split.truth
        self._statements = self._prompts = np.empty((0, 0))
        if split.pairs:
            self._statements = encoder.embed_texts([text for pair in split.pairs for text in pair.texts])
        if split.files:
            texts = encoder.embed_texts([prompt for prompts in split.prompts for prompt in prompts])
            self._prompts = texts.reshape(len(split.prompts), -1, texts.shape[-1])
        encoder.drop_text_side()
        self._pair_images = self._pixels([file for pair in split.pairs for file in pair.images])
        self._images = self._pixels(split.files)
        if not read_measurements(run):
            write_measurements(run, [self._measure(0)])

    def measure(self, step: int, state: dict[str, Tensor]) -> None:
        """Measure the tower after a step, and keep its state if `best-validation` would choose it by now.

        Args:
            step: Of the tower phase.
            state: Trained tensors by their names in the module that trains, as `gathered_trainable_state` gives them.
        """
        lora = {name.removeprefix(_TOWER): value for name, value in state.items() if name.startswith(_TOWER)}
        unknown = self._tower.load_state_dict(lora, strict=False).unexpected_keys
        assert not unknown, f"{unknown[0]} is trained, but a tower with LoRA has no such tensor"
        self._encoder.overwrite(merged_weights(self._tower))
        before, found = read_measurements(self._run), self._measure(step)
        choice = choose([*before, found], self._config.select, self._config.zero_shot_margin)
        if self._config.select == "best-validation" and choice is not None and choice.chosen == found:
            # Of those chosen at their time the choice among all steps is one, also when a resumed run drops the rest.
            _save_atomic(state, self._states / f"step-{step}.safetensors")
        write_measurements(self._run, [*before, found])
        base, margin = before[0], self._config.zero_shot_margin
        warning = loss_warning(base, found, margin)
        if warning and not any(loss_warning(base, earlier, margin) for earlier in before):
            logger.warning("%s; a lower tower_learning_rate or more keep_close loses less", warning)

    def selected_state(self) -> dict[str, Tensor] | None:
        """The state that `select` exports, as `measure` got it; None for that of the last step.

        Warns where it lost more zero-shot accuracy than `zero_shot_margin`.
        """
        found = read_measurements(self._run)
        choice = choose(found, self._config.select, self._config.zero_shot_margin)
        assert choice is not None, "the last step of the phase is always measured"
        if self._config.select == "best-validation":
            chosen = choice.chosen
            logger.info("step %d of the tower phase is exported: the choice on the validation split", chosen.step)
            if not choice.within_margin:
                logger.warning(
                    "no measured step kept zero-shot accuracy within zero_shot_margin: the one that lost least is "
                    "exported"
                )
        warning = loss_warning(choice.base, choice.chosen, self._config.zero_shot_margin)
        if warning:
            logger.warning("the exported tower: %s", warning)
        if self._config.select == "final":
            return None
        return load_file(self._states / f"step-{choice.chosen.step}.safetensors")

    def _measure(self, step: int) -> Measurement:
        """What the encoder holds now, on the whole split."""
        pairs = zero_shot = None
        num_pairs = len(self._statements) // 2
        if num_pairs:
            images = self._encoder.embed_pixels(self._pair_images()).projected
            pairs = 100 * float(score_pairs(pair_logits(images, self._statements)).mean())
        if len(self._truth):
            images = self._encoder.embed_pixels(self._images()).projected
            zero_shot = 100 * float(zero_shot_correct(images, self._prompts, self._truth).mean())
        return Measurement(
            step=step, pairs=pairs, zero_shot=zero_shot, num_pairs=num_pairs, num_images=len(self._truth)
        )

    def _pixels(self, files: Sequence[Picture]) -> Callable[[], Iterable[Tensor]]:
        """Gives a set of images as batches of pixels, as often as it is called."""
        encoder = self._encoder
        if 3 * 4 * encoder.vision_config.image_size**2 * len(files) > MAX_KEPT_BYTES:
            return lambda: encoder.pixel_batches(files)
        kept = list(encoder.pixel_batches(files))
        return lambda: kept


class Validate(TrainerCallback):
    """Measures at every so many steps and at the last one; every rank needs one, as they gather the state together.

    Args:
        trainer: Of the tower phase.
        validation: On rank 0; None on the others, which wait.
        every: Optimizer steps from one measurement to the next.
    """

    def __init__(self, trainer: StreamTrainer, validation: Validation | None, every: int):
        self._trainer, self._validation, self._every = trainer, validation, every

    def on_step_end(self, args, state, control, **kwargs):
        from dcr_mllm.trainer import gathered_trainable_state

        if state.global_step % self._every and state.global_step < state.max_steps:
            return
        trained = gathered_trainable_state(self._trainer)
        if self._validation is not None:
            self._validation.measure(state.global_step, trained)
        # An exception on rank 0 ends its process, and the launcher then ends those that wait here.
        self._trainer.accelerator.wait_for_everyone()


def cut_validation(run: Path, step: int) -> None:
    """Drop what lies after a step: a resumed run measures it again."""
    found = read_measurements(run)
    if found:
        write_measurements(run, [measurement for measurement in found if measurement.step <= step])
    for file in (run / "checkpoints" / "validation").glob("step-*.safetensors"):
        if int(file.stem.removeprefix("step-")) > step:
            file.unlink()


def _save_atomic(state: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file(state, partial, metadata={"format": "pt"})
    os.replace(partial, path)
