"""Looks inside the tower phase every so many steps: gradient conflict, collapse and drift, in `diagnostics.jsonl`.

Looking changes nothing: the losses of a run are the same with it and without.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from dcr_mllm.log import get_logger
from dcr_mllm.towers import VisionTower
from dcr_mllm.trainer import cut_lines
from stage1_dcr.config import Stage1Config
from stage1_dcr.conflict import Conflict
from stage1_dcr.images import make_loader
from stage1_dcr.order import number
from stage1_dcr.probe import NUM_IMAGES, Probe, read_images
from stage1_dcr.step import TrainingStep

if TYPE_CHECKING:
    from stage1_dcr.train import Stage1

DIAGNOSTICS = "diagnostics.jsonl"

logger = get_logger(__name__)


class Diagnose(TrainerCallback):
    """Measures in optimizer steps whose number is a multiple of `config.diagnose_every`, and once before the first.

    The conflict is that of the gradients which make the step, on every process; the rest is measured of the weights
    after the step, on rank 0, for whom the others wait in the next one.

    Args:
        step: The module that trains; its `on_parts` is set in those steps alone.
        stage: What `stage1_dcr.train.Stage1` has loaded: base tower, statistics of its pixels, sizes.
        file: Where lines go to.
        data: The training images.
    """

    def __init__(self, step: TrainingStep, stage: Stage1, file: Path, data: str | list[str]):
        self._step, self._stage, self._file, self._data = step, stage, file, data
        self._every = stage.config.diagnose_every
        self._tower: VisionTower = step.tower
        # Of an end-to-end phase the tower's only, so that numbers of all objectives mean the same.
        self._conflict = Conflict([p for p in self._tower.parameters() if p.requires_grad])
        self._probe: Probe | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Only now the tower is where it trains, in its type."""
        if not state.is_world_process_zero:
            return
        cut_lines(self._file, lambda line: 0 < state.global_step and line["step"] <= state.global_step)
        stage = self._stage
        images = read_images(probe_loader(stage.config, self._data, stage.crop_size, stage.latent_shape))
        if len(images.images) < NUM_IMAGES:
            logger.warning("diagnostics look at %d images, all that the data hold", len(images.images))
        self._probe = Probe(images, stage.tower, self._tower, stage.statistics, stage.config.views)
        if state.global_step == 0:
            self._write(0, None)

    def on_step_begin(self, args, state, control, **kwargs):
        if (state.global_step + 1) % self._every == 0:
            self._step.on_parts = self._conflict.add

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self._every == 0:
            self._step.on_parts = None
            self._write(state.global_step, self._conflict.take())

    def on_train_end(self, args, state, control, **kwargs):
        if self._probe is not None:
            negative, looks = negative_cosines(self._file)
            if looks:
                logger.info(
                    "gradient conflict: the parts of the loss had a negative cosine in %d of %d looks (%.1f %%)",
                    negative,
                    looks,
                    100 * negative / looks,
                )

    def _write(self, step: int, conflict: dict[str, float | None] | None) -> None:
        if self._probe is None:
            return
        line = json.dumps({"step": step, "conflict": conflict, **self._probe.measure(self._tower)})
        with self._file.open("a") as file:
            file.write(line + "\n")


def probe_loader(config: Stage1Config, data: str | list[str], size: int, latent_shape: Any) -> Any:
    """Images for the probe, read in this process alone, from a stream that is not the training's.

    Its seed is the same for every run, so that runs on the same data look at the same images.
    """
    return make_loader(
        data,
        batch_size=2,  # the smallest, so that data with few images give nearly all of them
        size=size,
        latent_shape=latent_shape,
        seed=number("probe"),
        shuffle_buffer=config.shuffle_buffer,
        views=config.views,
        crop_scale=config.crop_scale,
        max_skipped_fraction=config.max_skipped_fraction,
    )


def negative_cosines(file: Path) -> tuple[int, int]:
    """In how many looks of a `diagnostics.jsonl` the cosine is negative, and in how many there is one."""
    conflicts = [json.loads(line)["conflict"] for line in file.read_text().splitlines()]
    cosines = [conflict["cosine"] for conflict in conflicts if conflict and conflict["cosine"] is not None]
    return sum(cosine < 0 for cosine in cosines), len(cosines)
