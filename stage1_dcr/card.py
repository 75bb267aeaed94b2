"""The model card that lies beside an exported tower."""

from __future__ import annotations

from typing import Any

from stage1_dcr.config import Stage1Config

_CARD = """---
library_name: transformers
base_model: {base}
tags: [clip, vision-tower, dcr]
---
# {run}: a vision tower post-trained with DCR

`{base}` after Diffusion Contrastive Reconstruction (arXiv 2603.04803): LoRA of rank {rank} on the linear layers of its
vision blocks, merged. The text side is the base's, byte for byte; layers that were trained are stored in float32.

| | |
|---|---|
| denoiser | `{denoiser}`, target {target} |
| projector phase | {projector_steps} steps, {projector_objective}, learning rate {projector_lr} |
| tower phase | {tower_steps} steps, {tower_objective}, learning rate {tower_lr} |
| batch | {batch} x {accumulation} accumulation x {processes} processes, {negatives} negatives per row |
| seed | {seed} |

Load the image side with `CLIPVisionModel.from_pretrained` or `SiglipVisionModel.from_pretrained`, all of it with
`AutoModel.from_pretrained`. Everything that made it is in `provenance.json`.

Compare it with its base before you use it (`python -m dcr_mllm.evaluation.tower BASE TOWER`): post-training may cost
zero-shot accuracy.
"""


def model_card(config: Stage1Config, record: dict[str, Any]) -> str:
    """The card's text.

    Args:
        config: Of the run.
        record: Its provenance.
    """
    return _CARD.format(
        base=config.tower,
        run=config.run,
        rank=config.lora_rank,
        denoiser=config.denoiser,
        target=record["prediction_type"],
        projector_steps=config.projector_steps,
        projector_objective=config.projector_objective,
        projector_lr=config.projector_learning_rate,
        tower_steps=config.tower_steps,
        tower_objective=config.tower_objective,
        tower_lr=config.tower_learning_rate,
        batch=config.batch_size,
        accumulation=config.accumulation,
        processes=record["num_processes"],
        negatives=config.num_negatives(record["num_processes"]),
        seed=config.seed,
    )
