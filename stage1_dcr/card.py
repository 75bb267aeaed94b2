"""The model card that lies beside an exported tower."""

from __future__ import annotations

from typing import Any

from stage1_dcr.config import Objective, Stage1Config
from stage1_dcr.selection import selected_words

_DCR = "Diffusion Contrastive Reconstruction (arXiv 2603.04803)"
METHODS: dict[Objective, str] = {
    "dcr": _DCR,
    "dcr-end-to-end": f"{_DCR}, projector and tower trained together",
    "reconstruction": "diffusion reconstruction",
    "contrastive": "contrastive learning of augmented views",
    "joint": "the weighted sum of contrastive learning and diffusion reconstruction",
}

_CARD = """---
library_name: transformers
base_model: {base}
tags: [clip, vision-tower, dcr]
---
# {run}: a vision tower after post-training

`{base}` after {method}: LoRA of rank {rank} on the linear layers of its
vision blocks, merged. The text side is the base's, byte for byte; layers that were trained are stored in float32.

| | |
|---|---|
| denoiser | `{denoiser}`, target {target} |
| projector phase | {projector_steps} steps, {projector_objective}, learning rate {projector_lr} |
| tower phase | {tower_steps} steps, {tower_objective}, learning rate {tower_lr} |
| condition | {condition} |
| batch | {batch} x {accumulation} accumulation x {processes} processes, {negatives} negatives per row |
| exported | {selected} |
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
        method=METHODS[config.objective],
        rank=config.lora_rank,
        denoiser=config.denoiser,
        target=record["prediction_type"],
        projector_steps=config.steps_of("projector"),
        projector_objective=config.objective_of("projector"),
        projector_lr=config.projector_learning_rate,
        tower_steps=config.tower_steps,
        tower_objective=config.objective,
        tower_lr=config.tower_learning_rate,
        batch=config.batch_size,
        accumulation=config.accumulation,
        processes=record["num_processes"],
        negatives=config.num_negatives(record["num_processes"]),
        condition=config.condition,
        selected=selected_words(record["selected"]),
        seed=config.seed,
    )
