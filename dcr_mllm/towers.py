"""Vision towers: the image side of a CLIP- or SigLIP-like model, its LoRA, and the export of what was trained.

A tower is dispatched by its config's `model_type`, never by its name or path.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dcr_mllm.errors import UserError
from dcr_mllm.headers import weight_files

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

# Linear layers of the vision blocks. Neither the text side nor a projection matches, nor SigLIP's pooling head, whose
# MultiheadAttention reads `out_proj.weight` directly so that a LoRA on it would never see a gradient.
LORA_TARGETS = r"vision_model\.encoder\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))"

# What LLaVA-1.5 reads of a tower (`vision_feature_layer`): the output of the last block but one.
LLAVA_LAYER = -2


@dataclass(frozen=True, kw_only=True)
class ImageStatistics:
    """How a tower wants its pixels.

    Attributes:
        size: Side of the square image.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class VisionTower(nn.Module):
    """The image side: pixels -> class embedding, the vector that DCR turns into a condition.

    For CLIP that is the pooled class token after `visual_projection`; for SigLIP the output of the pooling head.
    Parameter names are those of the full model, so that what is trained here fits there.
    """

    def __init__(
        self, vision_model: nn.Module, visual_projection: nn.Module | None, width: int, *, has_class_token: bool = True
    ):
        super().__init__()
        self.vision_model = vision_model
        self.visual_projection = visual_projection
        self.width = width
        self.has_class_token = has_class_token

    @property
    def hidden_size(self) -> int:
        """Width of a token inside."""
        return self.vision_model.config.hidden_size

    @property
    def num_layers(self) -> int:
        """Vision blocks."""
        return self.vision_model.config.num_hidden_layers

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> class embedding [B, width]."""
        return self.project(self.vision_model(pixel_values=pixel_values).pooler_output)

    def with_patches(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Class embedding [B, width] and patch tokens [B, P, hidden_size] of `LLAVA_LAYER`."""
        output = self.vision_model(pixel_values=pixel_values, output_hidden_states=True)
        patches = output.hidden_states[LLAVA_LAYER][:, int(self.has_class_token) :]
        return self.project(output.pooler_output), patches

    def project(self, pooled: Tensor) -> Tensor:
        """What the vision model pools, [B, hidden_size] -> class embedding [B, width]."""
        return pooled if self.visual_projection is None else self.visual_projection(pooled)


def load_full_model(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the full dual encoder (image and text side) from a directory."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(path, dtype=dtype, local_files_only=True)


def vision_tower(model: PreTrainedModel) -> VisionTower:
    """The image side of a loaded CLIP, MetaCLIP 2 or SigLIP, frozen and in eval mode; shares the model's parameters.

    Raises:
        UserError: For a `model_type` that is none of them.
    """
    model.requires_grad_(False).eval()
    kind = model.config.model_type
    if kind in ("clip", "metaclip_2"):
        return VisionTower(model.vision_model, model.visual_projection, model.config.projection_dim)
    if kind == "siglip":
        return VisionTower(model.vision_model, None, model.config.vision_config.hidden_size, has_class_token=False)
    raise UserError(f"A tower of model_type {kind!r} is not supported; use a clip, metaclip_2 or siglip model.")


def image_statistics(path: str | Path) -> ImageStatistics:
    """Size, mean and std of a tower, from the headers of its directory."""
    from dcr_mllm.headers import tower_summary

    summary = tower_summary(path)
    return ImageStatistics(size=summary.image_size, mean=tuple(summary.image_mean), std=tuple(summary.image_std))


def lora_config(rank: int, alpha: int, dropout: float, *, except_block: int | None = None) -> LoraConfig:
    """LoRA on the linear layers of the vision blocks only, without biases.

    Args:
        rank: Of the update.
        alpha: It is scaled by alpha / rank.
        dropout: On its input.
        except_block: A block that is left alone.
    """
    from peft import LoraConfig

    targets = LORA_TARGETS
    if except_block is not None:
        targets = targets.replace(r"layers\.", rf"layers\.(?!{except_block}\.)")
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=targets)


def add_lora(tower: VisionTower, config: LoraConfig) -> VisionTower:
    """Put LoRA into a tower in place; only its matrices are trainable afterwards."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, tower)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return tower


def merged_weights(tower: VisionTower) -> dict[str, Tensor]:
    """What the layers that have a LoRA would weigh with it merged, by their names in the full model.

    The same sums as `merged_tensors`, bit for bit, but the tower itself stays as it is.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in tower.named_modules() if isinstance(module, LoraLayer)}
    with torch.no_grad():
        return {
            f"{name}.weight": layer.base_layer.weight + layer.get_delta_weight("default")
            for name, layer in layers.items()
        }


def merged_tensors(
    base: str | Path, config: LoraConfig, weights: dict[str, Tensor], adapter_out: Path
) -> dict[str, Tensor]:
    """Merge trained LoRA matrices into the base, in fp32.

    Args:
        base: Directory of the base model.
        config: What the matrices were made with.
        weights: The matrices by name, as in `add_lora`'s tower.
        adapter_out: Where the adapter itself is saved, loadable by PEFT on the base.

    Returns:
        The tensors that changed, by their names in the full model.

    Raises:
        UserError: If names do not fit the base.
    """
    from peft import get_peft_model

    wrapped = get_peft_model(load_full_model(base), config)
    model = wrapped.base_model.model
    own = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    if set(own) != set(weights):
        odd = sorted(set(own) ^ set(weights))[0]
        raise UserError(f"The trained adapter does not fit the base tower {base}: {odd!r} exists on one side only.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    wrapped.save_pretrained(adapter_out)
    touched = {name.split(".lora_")[0] + ".weight" for name in own}
    merged = wrapped.merge_and_unload()
    return {name: value.detach().clone() for name, value in merged.state_dict().items() if name in touched}


def export_tower(base: str | Path, changed: dict[str, Tensor], out: Path) -> None:
    """Write a full model directory that differs from its base in the given tensors only.

    Every other tensor keeps its bytes; changed ones are stored in fp32, since a LoRA update can be smaller than half a
    unit in the last place of fp16. Configs, processor and tokenizer are copied, and the config's dtype becomes float32
    so that loading loses nothing.

    Args:
        base: Directory of the base model, with one or several safetensors files.
        changed: New tensors by name in the full model.
        out: Directory to write into; it must exist and be empty.

    Raises:
        UserError: If a tensor is not in the base's files.
    """
    base = Path(base)
    missing = set(changed)
    weights = set(weight_files(base))
    for source in sorted(base.iterdir()):
        if source in weights:
            with safe_open(source, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            for name in missing & set(state):
                state[name] = changed[name].float().contiguous()
            missing -= set(state)
            save_file(state, out / source.name, metadata={"format": "pt"})
        elif source.suffix in (".json", ".txt", ".model", ".jinja"):
            shutil.copyfile(source, out / source.name)
    if missing:
        raise UserError(
            f"The weights of {base} hold no tensor {sorted(missing)[0]!r}, so the tower cannot be exported."
        )
    config = json.loads((out / "config.json").read_text())
    config.pop("torch_dtype", None)
    for part in (config, *(config[key] for key in ("text_config", "vision_config") if key in config)):
        part.pop("torch_dtype", None)
        part["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def stored_tensors(path: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Tensors by the names that are wanted, from the weight files of a directory that the libraries load, no others."""
    tensors: dict[str, Tensor] = {}
    for source in weight_files(path):
        with safe_open(source, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys() if wanted(name)})  # noqa: SIM118
    return tensors


def vision_tensors(path: str | Path) -> dict[str, Tensor]:
    """The image side's tensors of a tower directory, full model or vision-only, without the prefix `vision_model.`."""
    other = ("text_model.", "text_projection", "visual_projection", "logit_")
    stored = stored_tensors(path, lambda name: not name.startswith(other))
    return {name.removeprefix("vision_model."): value for name, value in stored.items()}
