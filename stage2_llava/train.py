"""Stage 2 from a checked config to LLaVA directories: for each tower align, instruct, merge.

Every step is a directory: `aligned/` is a LLaVA whose projector has learned to caption, `adapter/` was trained on it
and loads on it with PEFT, `llava/` is the merge. A killed run goes on behind the last directory that is there, or
inside a phase from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcr_mllm.conversation import TEMPLATES, Template, choose_template
from dcr_mllm.headers import resolve_weights
from dcr_mllm.launch import Launch
from dcr_mllm.llava import image_processor, load_llava, load_processor
from dcr_mllm.llava_headers import vision_summary
from dcr_mllm.log import rank
from dcr_mllm.runs import Run, atomic_directory, provenance
from stage2_llava.assemble import assemble
from stage2_llava.config import KEEP, InstructConfig, Stage2Config
from stage2_llava.export import merge, save_llava, with_state
from stage2_llava.phase import PhaseData, barrier, save_adapter, train_phase
from stage2_llava.swap import swap
from stage2_llava.tuning import add_adapter, freeze_for_alignment, freeze_for_full_tuning, trainable_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One tower's way through the protocol, in a folder of its own."""

    config: Stage2Config
    launch: Launch
    path: Path
    tower: str
    data: dict[str, PhaseData]

    @property
    def dtype(self) -> torch.dtype:
        """Of frozen weights, and of everything that is written."""
        return torch.bfloat16 if self.launch.precision == "bf16" else torch.float32

    def record(self, phase: str, facts: dict[str, Any], template: Template, **inputs: Any) -> dict[str, Any]:
        """Provenance of a directory."""
        return provenance(
            self.config,
            phase=phase,
            template=template.name,
            precision=self.launch.precision,
            num_processes=self.launch.num_processes,
            **facts,
            **inputs,
        )


def run_stage2(config: Stage2Config, launch: Launch, run: Run, data: dict[str, PhaseData]) -> dict[str, Any]:
    """Run what is left of a run, one tower after the other.

    Args:
        config: Checked by `stage2_llava.checks.preflight`.
        launch: How it runs.
        run: Its directory.
        data: Of every phase.

    Returns:
        Where the LLaVA of every tower is, under `llavas`, on every rank.
    """
    llavas: dict[str, Any] = {}
    for name, tower in config.towers.items():
        arm = Arm(config=config, launch=launch, path=run.path / name, tower=tower, data=data)
        if not (arm.path / "llava").is_dir():
            if rank() == 0:
                arm.path.mkdir(parents=True, exist_ok=True)
            base = starting_llava(arm)
            if config.protocol != "swap":
                instruct(arm, base)
        llavas[name] = {"llava": str(arm.path / "llava"), "metrics": str(arm.path / "metrics.jsonl")}
    return {"llavas": llavas}


def starting_llava(arm: Arm) -> Path:
    """The LLaVA that the instruct phase starts from: aligned here, or given and with this tower in it."""
    config = arm.config
    if config.protocol == "recipe":
        if not (arm.path / "aligned").is_dir():
            align(arm)
        return arm.path / "aligned"
    llava = resolve_weights(config.llava or "", "llava")
    if arm.tower == KEEP and config.protocol == "instruct-only":
        return llava
    out = arm.path / ("llava" if config.protocol == "swap" else "swapped")
    if rank() == 0 and not out.is_dir():
        tower = resolve_weights(arm.tower, "tower")
        swap(llava, tower, out, legacy_keys=config.legacy_keys and config.protocol == "swap")
    barrier()
    return out


def align(arm: Arm) -> None:
    """Train the projector between a tower and a language model; writes `aligned/`."""
    config = arm.config
    llm, tower = resolve_weights(config.llm or "", "llm"), resolve_weights(arm.tower, "tower")

    def assembled() -> tuple[Any, Any, Template]:
        load_whole()
        return assemble(
            tower,
            llm,
            template=config.template,
            vision_feature_layer=config.vision_feature_layer,
            seed=config.seed,
            dtype=arm.dtype,
        )

    model, processor, _ = assembled()
    processor.image_processor = image_processor(tower, config.align.image_aspect_ratio)
    trained = train_phase(
        config,
        arm.launch,
        "align",
        config.align,
        model=freeze_for_alignment(model),
        processor=processor,
        template=TEMPLATES["plain"],
        data=arm.data["align"],
        arm=arm.path,
    )
    if rank() == 0:
        # Afresh: ZeRO 3 has taken the trained one apart.
        del model
        gc.collect()
        model, processor, template = assembled()
        with_state(model, trained.state)
        record = arm.record("align", trained.facts, template, llm=llm, tower=tower)
        with atomic_directory(arm.path / "aligned") as temporary:
            save_llava(model, processor, temporary, record)
    barrier()


def instruct(arm: Arm, base: Path) -> None:
    """Train language model and projector on instructions; writes `adapter/` (not for full tuning) and `llava/`."""
    config, phase, adapter = arm.config, arm.config.instruct, arm.path / "adapter"
    load_whole()
    processor = load_processor(base)
    template = template_of(processor, config.template)
    # Published LLaVAs come with CLIP's image processor, which crops where LLaVA-1.5 pads.
    processor.image_processor = image_processor(base, phase.image_aspect_ratio)

    def train(model: nn.Module) -> Any:
        return train_phase(
            config,
            arm.launch,
            "instruct",
            phase,
            model=model,
            processor=processor,
            template=template,
            data=arm.data["instruct"],
            arm=arm.path,
        )

    if phase.tuning == "full":
        trained = train(freeze_for_full_tuning(load_llava(base, arm.dtype)))
        if rank() == 0:
            load_whole()
            model = with_state(load_llava(base, arm.dtype), trained.state)
            record = arm.record("instruct", trained.facts, template, base=base)
            with atomic_directory(arm.path / "llava") as temporary:
                save_llava(model, processor, temporary, record, legacy_keys=config.legacy_keys)
    else:
        if not adapter.is_dir():
            model = add_adapter(
                load_llava(base, arm.dtype, **quantised(phase, arm.dtype)), phase, str(base), config.seed
            )
            trained = train(model)
            if rank() == 0:
                with atomic_directory(adapter) as temporary:
                    save_adapter(model, trained.state, temporary)
        if rank() == 0:
            load_whole()
            data = {"path": arm.data["instruct"].files, "sha256": arm.data["instruct"].load(config).fingerprint()}
            record = arm.record("instruct", {"data": data}, template)
            llava = arm.path / "llava"
            merge(base, adapter, llava, record, processor=processor, dtype=arm.dtype, legacy_keys=config.legacy_keys)
    barrier()


def quantised(phase: InstructConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Loading arguments of QLoRA: four bits for the language model's blocks only; none otherwise."""
    if phase.tuning != "qlora":
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
    )
    return {"quantization_config": config}


def template_of(processor: Any, name: str) -> Template:
    """The template of a saved LLaVA: the one it was trained with if we wrote it, else what `choose_template` says."""
    known = [template for template in TEMPLATES.values() if template.jinja == processor.chat_template]
    if known and name in ("auto", known[0].name):
        return known[0]
    tokenizer = processor.tokenizer
    if tokenizer.chat_template is None:
        tokenizer.chat_template = processor.chat_template
    template = choose_template(name, tokenizer)
    processor.chat_template = template.jinja
    return template


def load_whole() -> None:
    """From here on models are loaded whole: with DeepSpeed's config known, ZeRO 3 would leave them empty."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def phase_tables(config: Stage2Config) -> str:
    """What would train in each phase of the first tower, without loading any weights."""
    tables = []
    for name, _ in config.phases():
        with torch.device("meta"):
            model = empty_llava(config)
        tables.append(trainable_table(make_trainable(model, config, name), name))
    return "\n".join(tables)


def make_trainable(model: nn.Module, config: Stage2Config, name: str) -> nn.Module:
    """A LLaVA as the phase `align` or `instruct` trains it."""
    if name == "align":
        return freeze_for_alignment(model)
    if config.instruct.tuning == "full":
        return freeze_for_full_tuning(model)
    return add_adapter(model, config.instruct, str(config.llava or config.llm))


def empty_llava(config: Stage2Config) -> nn.Module:
    """The first tower's LLaVA in the shapes that the configs on disk say, without their weights."""
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    if config.llava is not None:
        given: Any = AutoConfig.from_pretrained(resolve_weights(config.llava, "llava"))
        return _named(LlavaForConditionalGeneration(given), config.llava)
    path = resolve_weights(next(iter(config.towers.values())), "tower")
    tower: Any = AutoConfig.from_pretrained(path)
    text = AutoConfig.from_pretrained(resolve_weights(config.llm or "", "llm"))
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=getattr(tower, "vision_config", tower),
            text_config=text,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=vision_summary(path).select_strategy,
            tie_word_embeddings=text.tie_word_embeddings,
        )
    )
    return _named(model, str(config.llm))


def _named(model: Any, name: str) -> nn.Module:
    """PEFT compares its record with this name, and warns where they differ."""
    model.name_or_path = name
    return model
