"""The configuration of stage 2. Defaults are the LLaVA-1.5 recipe, from its scripts: its code's defaults differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dcr_mllm.errors import UserError
from dcr_mllm.hardware import HardwareConfig

KEEP = "keep"
"""As a tower: the one that is inside `llava` already."""


@dataclass(kw_only=True)
class PhaseConfig:
    """What both training phases have. Batch sizes are global: accumulation makes up for the number of processes."""

    data: str | list[str] | None = None
    """LLaVA JSON or JSONL files or WebDataset tars, each as PATH or PATH@WEIGHT; `mini` draws the miniature's."""
    images: str | list[str] | None = None
    """Folder(s), or tars, in which the image names of `data` are looked up."""
    learning_rate: float
    """AdamW's."""
    batch_size: int
    """Samples per optimizer step over all processes."""
    micro_batch_size: int
    """Samples per process and micro-step."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps instead of `epochs`."""
    image_aspect_ratio: Literal["square", "pad"]
    """square: resize and crop, as the tower's own processor does; pad: to a square of the mean colour first."""
    group_by_modality: bool
    """Batches hold either samples with images or text-only ones."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Of the learning rate."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """LLaVA ran unclipped or clipped at 1.0 depending on DeepSpeed's release. Under DeepSpeed its file decides."""
    cache_features: bool = False
    """Run the frozen tower once per image and keep its output on disk: pays for small LLMs, sweeps, several epochs."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "batch_size", "micro_batch_size", "epochs", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, found {getattr(self, name)}.")
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(f"max_steps must be at least 1, found {self.max_steps}; leave it out to train `epochs`.")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"warmup_ratio must be in [0, 1), found {self.warmup_ratio}.")


@dataclass(kw_only=True)
class AlignConfig(PhaseConfig):
    """Phase one: the projector alone learns to caption (LLaVA's `pretrain.sh`, template `plain`)."""

    learning_rate: float = 1e-3
    batch_size: int = 256
    micro_batch_size: int = 32
    image_aspect_ratio: Literal["square", "pad"] = "square"
    group_by_modality: bool = False


@dataclass(kw_only=True)
class InstructConfig(PhaseConfig):
    """Phase two: projector and language model learn to follow instructions (LLaVA's `finetune_lora.sh`)."""

    learning_rate: float = 2e-4
    """Of the language model: 2e-4 for LoRA, LLaVA's full fine-tuning takes 2e-5."""
    projector_learning_rate: float = 2e-5
    """Of the projector, which trains fully (LLaVA's `mm_projector_lr`)."""
    batch_size: int = 128
    micro_batch_size: int = 16
    image_aspect_ratio: Literal["square", "pad"] = "pad"
    group_by_modality: bool = True
    tuning: Literal["lora", "qlora", "full"] = "lora"
    """qlora: the frozen language model in four bits (bitsandbytes, CUDA only)."""
    lora_rank: int = 128
    """Of the LoRA on all linear layers of the language model but `lm_head`."""
    lora_alpha: int = 256
    """The update is scaled by alpha / rank."""
    lora_dropout: float = 0.05
    """On the input of the LoRA, in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("projector_learning_rate", "lora_rank", "lora_alpha"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, found {getattr(self, name)}.")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout must be in [0, 1), found {self.lora_dropout}.")


@dataclass(kw_only=True)
class Stage2Hardware(HardwareConfig):
    """What stage 2 can be told about the accelerator."""

    tf32: bool = True
    """As LLaVA's scripts: matrix products of fp32 tensors with 10 bits of mantissa instead of 23 (CUDA, Ampere and
    newer)."""


@dataclass(kw_only=True)
class Stage2Config:
    """One LLaVA per tower; all of them see the same data in the same order, from the same seed."""

    run: str = "stage2"
    """Name of the run; results go to `<runs_dir>/<run>/<tower's name>/`."""
    runs_dir: str = "runs"
    """Where runs live."""
    seed: int = 0
    """Of everything: initialisation, data order, dropout, held-out draw."""

    # What is put together
    protocol: Literal["recipe", "instruct-only", "swap"] = "recipe"
    """recipe: align, then instruct. instruct-only: instruct from the aligned `llava`, with each tower in it.
    swap: put each tower into `llava`, train nothing."""
    towers: dict[str, str] = field(default_factory=dict)
    """Name -> CLIP or SigLIP directory or Hugging Face id, `mini`, or `keep` for the one inside `llava`; the first is
    the baseline."""
    llm: str | None = None
    """Causal language model (directory, Hugging Face id or `mini`); for `recipe`."""
    llava: str | None = None
    """LLaVA directory to start from; for `instruct-only` and `swap`."""
    template: str = "auto"
    """vicuna_v1, chatml, or auto: the one that the LLM's own chat template speaks."""
    vision_feature_layer: int = -2
    """Hidden state of the tower that LLaVA reads."""
    max_length: int = 2048
    """Tokens of a sample, image tokens included; longer ones are cut at the end, never within an image."""
    stage1: str | None = None
    """Config of stage 1 to run first when a tower `<runs_dir>/<run>/tower` is not there yet."""

    align: AlignConfig = field(default_factory=AlignConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    drop_missing: bool = False
    """Leave out and count samples whose image is missing or whose turns are damaged; otherwise they are errors."""

    heldout: str | None = None
    """Closed single-turn questions (LLaVA JSON, or `mini`) that every LLaVA answers at the end, seeing and blind."""
    heldout_images: str | None = None
    """Where their image names are looked up."""
    heldout_limit: int | None = None
    """At most so many of them, drawn at random."""

    # How it runs
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA, fp32 on the CPU."""
    deepspeed: str = "auto"
    """auto: ZeRO 2 with several processes, none with one. Or none, zero1, zero2, zero3, zero2_offload, zero3_offload,
    or the path of a DeepSpeed JSON. LLaVA used ZeRO 3 for the second phase."""
    hardware: Stage2Hardware = field(default_factory=Stage2Hardware)
    """How the accelerator is used; see docs/gpu.md."""
    gradient_checkpointing: bool = True
    """Of the language model: less memory, more time."""
    num_workers: int = 4
    """Loader processes per rank."""
    save_every: int = 500
    """Optimizer steps between checkpoints; a killed run goes on from the last one."""
    log_every: int = 10
    """Optimizer steps between lines of metrics.jsonl."""
    report_to: str | list[str] = "tensorboard"
    """Trackers of `transformers.TrainingArguments`; metrics.jsonl is always written."""
    legacy_keys: bool = False
    """Write `llava/` with the tensor names that older transformers and vLLM expect."""

    def __post_init__(self) -> None:
        if self.heldout_limit is not None and self.heldout_limit < 1:
            raise UserError(f"heldout_limit must be at least 1, found {self.heldout_limit}; leave it out to ask all.")
        if not self.towers:
            raise UserError("towers is empty; name at least one, e.g. towers='{baseline: DIR, enhanced: DIR}'.")
        for name in self.towers:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
                raise UserError(f"towers has the name {name!r}, expected letters, digits and . _ -")
        for name in ("max_length", "save_every", "log_every"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, found {getattr(self, name)}.")
        if self.num_workers < 0:
            raise UserError(f"num_workers must not be negative, found {self.num_workers}.")
        if self.protocol != "instruct-only" and KEEP in self.towers.values():
            raise UserError(
                "towers has `keep`, the tower inside `llava`, which only protocol instruct-only trains with."
            )
        if self.protocol == "recipe":
            if self.llm is None:
                raise UserError("llm is not set; protocol recipe builds a LLaVA from towers and llm.")
            if self.llava is not None:
                raise UserError("llava is set, but protocol recipe starts from llm; leave it out or use instruct-only.")
        elif self.llava is None:
            raise UserError(f"llava is not set; protocol {self.protocol} starts from a LLaVA directory.")
        elif self.llm is not None:
            raise UserError(f"llm is set, but protocol {self.protocol} takes the one inside `llava`; leave llm out.")

    def phases(self) -> list[tuple[str, PhaseConfig]]:
        """The training phases of the protocol, in order."""
        phases: dict[str, list[tuple[str, PhaseConfig]]] = {
            "recipe": [("align", self.align), ("instruct", self.instruct)],
            "instruct-only": [("instruct", self.instruct)],
            "swap": [],
        }
        return phases[self.protocol]
