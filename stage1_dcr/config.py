"""The configuration of stage 1. Defaults are the published recipe with its defects mended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dcr_mllm.errors import UserError
from stage1_dcr.hardware import Stage1Hardware
from stage1_dcr.view_config import ViewConfig

Phase = Literal["projector", "tower"]
Objective = Literal["dcr", "reconstruction", "contrastive", "joint", "dcr-end-to-end"]
PhaseObjective = Literal["dcr", "reconstruction", "contrastive", "joint"]
Condition = Literal["class", "class+pooled-patches", "pooled-patches@-2"]


@dataclass(kw_only=True)
class Stage1Config:
    """Everything that stage 1 can be told.

    Recipe: the shipped configs of boyuh/DCR@c16d885 (batch 16 x 8 processes x accumulation 2, AdamW, constant
    schedule). Where a default differs from them, the field says so.
    """

    run: str = "stage1"
    """Name of the run: results go to `<runs_dir>/<run>`."""
    runs_dir: str = "runs"
    """Where runs live."""
    profile: Literal["recipe", "published"] = "recipe"
    """`published` sets what the published code did otherwise, known defects included, wherever this config does not:
    prediction_type, normalisation and four values of `views` (stage1_dcr/profiles.py)."""

    tower: str
    """Vision tower: a Hugging Face directory or cached hub id of a CLIP or SigLIP model, or `mini`."""
    denoiser: str
    """Stable Diffusion: a directory with vae/ unet/ scheduler/ text_encoder/ tokenizer/, a cached hub id, or `mini`."""
    data: str | list[str] | None = None
    """Training images: WebDataset tars (glob or brace), an image folder, Parquet, `hf:NAME[:SPLIT]`, or `mini`."""
    image_size: int | None = None
    """Pixels the tower sees; None: the size in the tower's own config, the only one its positions fit."""
    diffusion_size: int | None = None
    """Pixels the VAE sees; None: the tower's size, as in the published code."""
    normalisation: Literal["tower", "openai"] = "tower"
    """Mean and std of the pixels in training: those of the tower's own processor, or OpenAI's for every tower."""
    seed: int = 0
    """Of everything: initialisation, data order, crops, views, noise and timesteps."""

    # Objective
    objective: Objective = "dcr"
    """`dcr`; or what it is compared with: `reconstruction` (noise prediction alone, as DIVA and GenHancer train),
    `contrastive` (class embeddings of two views, no denoiser), `joint` (the weighted sum of these two: the paper's
    naive baseline), `dcr-end-to-end` (DCR without a projector phase: projector and tower train together in the tower
    phase)."""
    projector_objective: Literal["dcr", "reconstruction"] | None = None
    """Loss of the projector phase; None: `dcr` where `objective` is, else `reconstruction`. `contrastive` and
    `dcr-end-to-end` have no projector phase."""
    contrastive_weight: float = 1.0
    """Of the contrastive loss in `joint`."""
    reconstruction_weight: float = 1.0
    """Of the reconstruction loss in `joint`."""
    tau: float = 0.1
    """Temperature of the contrast, of noise predictions (`dcr`) or of class embeddings (`contrastive`, `joint`)."""
    positives: Literal["view+target", "view", "target"] = "view+target"
    """What DCR pulls an image's prediction towards: the prediction under its augmented view, the true target, or both
    (the method)."""
    condition: Condition = "class"
    """What becomes the condition: the class embedding (the method), the mean patch token of the layer that LLaVA reads
    (`pooled-patches@-2`; the last block is then left alone), or both side by side."""
    negatives: Literal["local", "global"] | int = "local"
    """Whose conditions a row is contrasted with: `local`: the other images of its process's micro-step, as in the
    published code; `global`: those of all processes; K: the K that follow its own among those of all processes."""
    prediction_type: Literal["epsilon", "velocity"] | None = None
    """Target of the denoiser; None: as its scheduler says (the published code always took velocity)."""
    timestep_range: tuple[int, int] = (0, 1000)
    """Diffusion times are drawn from [low, high)."""
    timestep_sampling: Literal["uniform", "logit-normal"] = "uniform"
    """How they are spread there: evenly, or more densely in the middle (the sigmoid of a normal variable)."""
    keep_close: float = 0.0
    """Weight of the distance to the frozen base tower (not part of DCR); it lets the text side go on fitting."""
    keep_close_tokens: Literal["class", "patches", "class+patches"] = "class"
    """What is kept close: the class embedding, the patch tokens of the layer that LLaVA reads, or the sum of both."""
    keep_close_distance: Literal["cosine", "mse"] = "cosine"
    """1 - cosine, or the mean squared error (KUEA and SALM keep close by the latter)."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """Augmentation of the positive view; flips are off (the published code mirrors both ways)."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Area of the random crop that every training image goes through."""

    # Phases
    projector: str | None = None
    """Start from this projector directory instead of a fresh one."""
    projector_width: int = 1024
    """Hidden width of the projector."""
    projector_steps: int = 100_000
    """Optimizer steps of the projector phase; 0 skips it (with `projector` given)."""
    projector_learning_rate: float = 1e-4
    """AdamW's, in the projector phase."""
    tower_steps: int = 4600
    """Optimizer steps of the tower phase; 0 skips it."""
    tower_learning_rate: float = 1e-5
    """AdamW's, in the tower phase."""
    lora_rank: int = 16
    """Of the LoRA on the linear layers of the vision blocks."""
    lora_alpha: int = 16
    """The update is scaled by alpha / rank."""
    lora_dropout: float = 0.1
    """On the input of the LoRA, in training."""

    # Optimisation
    batch_size: int = 16
    """Images per process and micro-step."""
    accumulation: int = 2
    """Micro-steps per optimizer step."""
    weight_decay: float = 0.01
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Clipping; under DeepSpeed its file decides."""
    schedule: Literal["constant", "cosine", "linear", "constant_with_warmup"] = "constant"
    """Of the learning rate, in each phase."""
    warmup_steps: int = 0
    """Used by every schedule but `constant`."""
    rows_per_chunk: int | Literal["auto"] = "auto"
    """Rows of the B x (B+1) grid in memory at a time: exact for any value, a trade of memory for speed."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA, fp32 on the CPU."""
    deepspeed: str = "auto"
    """auto: ZeRO 2 with several processes, none with one. Or none, zero1, zero2, zero3, zero2_offload, zero3_offload,
    or the path of a DeepSpeed JSON."""
    hardware: Stage1Hardware = field(default_factory=Stage1Hardware)
    """How the accelerator is used; see docs/gpu.md."""

    # Data loading
    num_workers: int = 8
    """Processes that decode images, per training process; the batches do not depend on it, and a resumed run may change
    it."""
    shuffle_buffer: int = 2000
    """Images per shuffled block; each training process holds up to twice as many, encoded."""
    max_skipped_fraction: float = 0.05
    """Broken images beyond this share stop the run."""

    # Bookkeeping
    save_every: int = 500
    """Optimizer steps between checkpoints; a killed run goes on from the last one."""
    log_every: int = 10
    """Optimizer steps between lines of metrics.jsonl."""
    report_to: str | list[str] = "tensorboard"
    """Trackers of `transformers.TrainingArguments`; metrics.jsonl is always written."""
    diagnose_every: int = 0
    """Optimizer steps of the tower phase between looks inside: gradient conflict, collapse and drift; 0: never."""
    validation: str | None = None
    """Benchmarks that are not those of the test: a directory with `mmvp_vlm/`, `labelled/` or both, or `mini`."""
    validate_every: int = 500
    """Optimizer steps of the tower phase between measurements on `validation`."""
    select: Literal["final", "best-validation"] = "final"
    """Which tower is exported: that of the last step, or the one that names most validation pairs among those whose
    zero-shot accuracy stayed within `zero_shot_margin` of the base's."""
    zero_shot_margin: float = 2.0
    """Points of zero-shot accuracy on `validation` that may be lost before the run warns."""
    evaluate: bool = False
    """Compare the new tower with its base on the miniature's benchmarks when training has ended."""

    def __post_init__(self) -> None:
        for name in (
            "projector_steps",
            "tower_steps",
            "contrastive_weight",
            "reconstruction_weight",
            "keep_close",
            "weight_decay",
            "warmup_steps",
            "num_workers",
            "diagnose_every",
            "zero_shot_margin",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, found {getattr(self, name)}.")
        for name in (
            "tau",
            "accumulation",
            "lora_rank",
            "save_every",
            "log_every",
            "validate_every",
            "projector_width",
            "shuffle_buffer",
        ):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, found {getattr(self, name)}.")
        if self.batch_size < 2:
            raise UserError(f"batch_size must be at least 2 (one image has no negatives), found {self.batch_size}.")
        if isinstance(self.negatives, int) and self.negatives < 1:
            raise UserError(f"negatives must be local, global or a number of at least 1, found {self.negatives}.")
        if self.rows_per_chunk != "auto" and self.rows_per_chunk < 1:
            raise UserError(f"rows_per_chunk must be auto or at least 1, found {self.rows_per_chunk}.")
        if self.hardware.wants_fixed_shapes and self.rows_per_chunk != "auto" and self.batch_size % self.rows_per_chunk:
            raise UserError(
                f"hardware.compile and hardware.cuda_graphs want chunks of one size, but rows_per_chunk "
                f"{self.rows_per_chunk} does not divide batch_size {self.batch_size}: take a divisor, or auto."
            )
        if self.objective == "joint" and self.diagnose_every and self.hardware.cuda_graphs:
            raise UserError(
                "diagnose_every cannot be used with hardware.cuda_graphs under the objective joint, whose recorded "
                "backward pass would be replayed twice on one forward pass: set one of them to 0 or false."
            )
        low, high = self.timestep_range
        if not 0 <= low < high:
            raise UserError(f"timestep_range must be [low, high) with 0 <= low < high, found [{low}, {high}).")
        needs_projector = self.objective not in ("contrastive", "dcr-end-to-end")
        if needs_projector and self.projector_steps == 0 and self.projector is None and self.tower_steps > 0:
            raise UserError("projector_steps is 0 and no projector is given: name one with projector=DIR.")
        if self.select == "best-validation" and self.validation is None:
            raise UserError("select is best-validation, but validation is not set: give a directory, or select=final.")
        if not self.run or "/" in self.run:
            raise UserError(f"run must be a name without slashes, found {self.run!r}.")

    def steps_of(self, phase: Phase) -> int:
        """Optimizer steps of a phase; none for a projector phase that the objective does not have."""
        if phase == "tower":
            return self.tower_steps
        return 0 if self.objective in ("contrastive", "dcr-end-to-end") else self.projector_steps

    def objective_of(self, phase: Phase) -> PhaseObjective:
        """The loss of a phase."""
        if phase == "projector" and self.projector_objective is not None:
            return self.projector_objective
        if self.objective == "dcr-end-to-end":
            return "dcr"
        return "reconstruction" if phase == "projector" and self.objective == "joint" else self.objective

    def condition_width(self, *, embedding_width: int, hidden_size: int) -> int:
        """Width of what the projector reads of a tower."""
        widths: dict[Condition, int] = {
            "class": embedding_width,
            "class+pooled-patches": embedding_width + hidden_size,
            "pooled-patches@-2": hidden_size,
        }
        return widths[self.condition]

    def untouched_block(self, num_layers: int) -> int | None:
        """The vision block without LoRA: the last one where the loss reads the layer before it.

        The feature contrast reads the class embedding, whatever the condition is.
        """
        contrasts_features = self.objective in ("contrastive", "joint")
        return num_layers - 1 if self.condition == "pooled-patches@-2" and not contrasts_features else None

    def num_negatives(self, num_processes: int) -> int:
        """Negatives per row with this many processes.

        Raises:
            UserError: `negatives` is a number that there are not enough images for.
        """
        if self.negatives == "local":
            return self.batch_size - 1
        available = self.batch_size * num_processes - 1
        if self.negatives == "global":
            return available
        if self.negatives > available:
            raise UserError(
                f"negatives is {self.negatives}, but {num_processes} x {self.batch_size} images (processes x "
                f"batch_size) have at most {available} others; lower it or write negatives=global."
            )
        return self.negatives
