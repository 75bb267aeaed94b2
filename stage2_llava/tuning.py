"""What trains in which phase: the projector, LoRA on the language model, or all of it; never the tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stage2_llava.config import InstructConfig

# Anchored on the language model: bare suffixes would match the tower's attention as well, "all-linear" the projector.
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
PROJECTOR = "multi_modal_projector"
TOWER = "vision_tower"


def freeze_for_alignment(model: nn.Module) -> nn.Module:
    """Leave only the projector trainable."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(PROJECTOR in name)
    return model


def add_adapter(model: nn.Module, config: InstructConfig, base: str, seed: int = 0) -> nn.Module:
    """A PEFT model: LoRA on the language model's linear layers, and the projector in full.

    Args:
        model: LLaVA.
        config: Rank, alpha and dropout.
        base: The directory that `model` came from, for the adapter's own record.
        seed: Of LoRA's initialisation, so that all towers start from the same one.
    """
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        bias="none",
        target_modules=LORA_TARGETS,
        modules_to_save=[PROJECTOR],
        base_model_name_or_path=base,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, lora)


def freeze_for_full_tuning(model: nn.Module) -> nn.Module:
    """Leave language model and projector trainable."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TOWER not in name)
    return model


def trainable_in_fp32(model: nn.Module) -> None:
    """Keep what trains in fp32: an update of a bf16 weight is mostly smaller than its last place.

    Under DeepSpeed the engine keeps such masters itself.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def parameter_groups(
    model: nn.Module, *, learning_rate: float, projector_learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups: the projector has its own learning rate, as LLaVA's `mm_projector_lr`; vectors do not decay."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = []
    for is_projector, rate in ((False, learning_rate), (True, projector_learning_rate)):
        for decays in (True, False):
            chosen = [p for name, p in named if (PROJECTOR in name) == is_projector and _decays(p) == decays]
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": weight_decay if decays else 0.0})
    return groups


def trainable_table(model: nn.Module, title: str) -> str:
    """Tensors and parameters that train and that do not, for each part of a LLaVA."""
    counts: dict[str, list[int]] = {part: [0, 0, 0] for part in ("tower", "projector", "language model", "LoRA")}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue  # PEFT's untouched copy of the projector
        part = (
            "LoRA"
            if ".lora_" in name
            else "tower"
            if TOWER in name
            else "projector"
            if PROJECTOR in name
            else "language model"
        )
        size = getattr(parameter, "ds_numel", parameter.numel())
        counts[part][0] += parameter.requires_grad
        counts[part][1] += size if parameter.requires_grad else 0
        counts[part][2] += 0 if parameter.requires_grad else size
    lines = [f"{title:<16} {'tensors':>8} {'trained':>14} {'frozen':>14}"]
    lines += [
        f"  {part:<14} {tensors:>8} {trained:>14,} {frozen:>14,}"
        for part, (tensors, trained, frozen) in counts.items()
        if trained or frozen
    ]
    return "\n".join(lines)


def _decays(parameter: nn.Parameter) -> bool:
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1
