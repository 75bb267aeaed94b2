"""What weights, gradients and optimizer state cost on each device, without DeepSpeed and under each ZeRO stage.

Adam in mixed precision keeps 12 bytes of fp32 per trained parameter (master weight and two moments); ZeRO 1 shards
them over the processes, ZeRO 2 the gradients too, ZeRO 3 all weights of the trained module (Rajbhandari et al., 2020).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dcr_mllm.launch import Launch, zero_stage

TRAINED, FROZEN_BESIDE, GRADIENTS, OPTIMIZER, BUCKETS = (
    "trained weights",
    "frozen weights of the trained module",
    "gradients",
    "optimizer state",
    "ZeRO buffers",
)
# DeepSpeed's own defaults, for files that leave them out.
_BUCKET_ELEMENTS, _PREFETCH_ELEMENTS = 500_000_000, 50_000_000


def parameter_memory(module: nn.Module, launch: Launch) -> dict[str, int]:
    """Bytes per device by component, for what the Trainer sees; what is frozen outside of it comes on top.

    Gradients are counted in fp32, as DeepSpeed accumulates them. Buffers are those that DeepSpeed allocates at their
    full size: buckets of gradients, and under ZeRO 3 the two largest blocks of layers gathered at a time.

    Args:
        module: With `requires_grad` set where it trains, in the types that the launch trains it in.
        launch: Of the machine that trains.
    """
    parameters = {id(parameter): parameter for parameter in module.parameters()}.values()
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    weights = {
        TRAINED: sum(p.numel() * p.element_size() for p in parameters if p.requires_grad),
        FROZEN_BESIDE: sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad),
    }
    if launch.deepspeed is None:
        return {**weights, GRADIENTS: weights[TRAINED], OPTIMIZER: 8 * trained, BUCKETS: 0}
    stage, settings = zero_stage(launch.deepspeed)
    processes = launch.num_processes
    offloaded = [key for key in ("offload_optimizer", "offload_param") if _on_host(settings.get(key))]
    buckets = 0
    if stage in (1, 2) and settings.get("contiguous_gradients", True):
        per_element = 2 if launch.precision == "bf16" and stage == 2 else 4
        copies = 2 if settings.get("overlap_comm", False) else 1
        # DeepSpeed allocates a bucket whole, however little trains.
        buckets = settings.get("reduce_bucket_size", _BUCKET_ELEMENTS) * per_element * copies
    if stage == 3:
        gathered = sorted(_block_bytes(module))[-2:]
        buckets = sum(gathered) + 2 * settings.get("stage3_prefetch_bucket_size", _PREFETCH_ELEMENTS)
        weights = {name: 0 if "offload_param" in offloaded else size // processes for name, size in weights.items()}
    sharded = 4 * trained // processes
    return {
        **weights,
        GRADIENTS: sharded if stage >= 2 else 4 * trained,
        OPTIMIZER: 0 if "offload_optimizer" in offloaded else 12 * trained // processes,
        BUCKETS: buckets,
    }


def checkpoint_bytes(module: nn.Module, launch: Launch) -> int:
    """Disk of one checkpoint, all processes together: trained weights in fp32, and the optimizer's state."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained * (4 + (8 if launch.deepspeed is None else 12 + 2))


def _on_host(setting: dict | None) -> bool:
    return setting is not None and setting.get("device", "none") != "none"


def _block_bytes(module: nn.Module) -> Iterable[int]:
    """Weights of every element of every list of layers: what ZeRO 3 gathers at a time is at most about that."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList):
            for block in part:
                yield sum(p.numel() * p.element_size() for p in block.parameters())
