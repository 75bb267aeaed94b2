"""Put a tower and a language model together: a LLaVA with a fresh projector, and its processor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dcr_mllm.conversation import IMAGE_TOKEN, Template, choose_template
from dcr_mllm.errors import UserError
from dcr_mllm.llava import build_processor
from dcr_mllm.llava_headers import VISION_TYPES, vision_summary

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

PAD_TOKEN = "<pad>"
_ROW_MULTIPLE = 64


def llm_tokenizer(llm: str | Path) -> Any:
    """The tokenizer of a language model, as its directory has it.

    Raises:
        UserError: It cannot say where its tokens come from, which the label mask needs.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llm, local_files_only=True)
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {llm} is a slow one without offsets; save it as tokenizer.json")
    return tokenizer


def add_tokens(tokenizer: Any) -> None:
    """Add `<image>`, and `<pad>` where padding would otherwise be a token with a meaning of its own."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.eos_token, tokenizer.unk_token):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = "left"  # for generation in batches; training pads in its own collator


def assemble(
    tower: str | Path,
    llm: str | Path,
    *,
    template: str = "auto",
    vision_feature_layer: int = -2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, Template]:
    """A LLaVA whose projector has yet to be trained.

    Args:
        tower: CLIP or SigLIP directory, with or without text side.
        llm: Causal language model of the Llama family.
        template: `auto` or a name.
        vision_feature_layer: Hidden state of the tower that the projector reads.
        seed: Of the projector's initialisation (PyTorch's default, as in LLaVA).
        dtype: Of all weights.

    Returns:
        Model, processor (padding images to squares, with the chat template) and template.

    Raises:
        UserError: Template and tokenizer do not fit.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = llm_tokenizer(llm)
    chosen = choose_template(template, tokenizer)
    num_old = len(tokenizer)
    add_tokens(tokenizer)
    language = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype, local_files_only=True)
    _grow_embeddings(language, num_old, len(tokenizer))
    summary = vision_summary(tower)
    model = _llava(_load_vision(summary.path, summary.model_type, dtype), language, seed, vision_feature_layer)
    config = model.config
    config.vision_feature_select_strategy = summary.select_strategy
    config.image_seq_length = summary.image_tokens
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config.pad_token_id = config.text_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = _generation_config(tokenizer, chosen, language)
    return model, build_processor(summary, tokenizer, chosen, "pad"), chosen


def _grow_embeddings(language: PreTrainedModel, num_old: int, num_new: int) -> None:
    """Rows for the added tokens, a multiple of 64 in all; added ones start from the mean of the old ones."""
    table = language.get_input_embeddings().weight
    rows = -(-max(table.shape[0], num_new) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    known = min(num_old, table.shape[0])
    language.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (language.get_input_embeddings(), language.get_output_embeddings()):
            # Some models come with spare rows behind their vocabulary; those were never trained either.
            layer.weight[known:] = layer.weight[:known].float().mean(dim=0).to(layer.weight.dtype)


def _load_vision(path: Path, kind: str, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import CLIPVisionModel, SiglipVisionModel
    from transformers.utils import logging

    classes = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
    assert set(classes) == set(VISION_TYPES)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the text side of a dual encoder is reported as unexpected
    try:
        vision = classes[kind].from_pretrained(path, dtype=dtype, local_files_only=True)
    finally:
        logging.set_verbosity(verbosity)
    # MetaCLIP 2's image side is CLIP's under a name of its own, which a saved LLaVA must not carry on.
    vision.config.model_type = VISION_TYPES[kind]
    return vision


def _llava(
    vision: PreTrainedModel, language: PreTrainedModel, seed: int, vision_feature_layer: int
) -> LlavaForConditionalGeneration:
    """The parts in a LLaVA, without a second copy of any of them."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        vision_feature_layer=vision_feature_layer,
        projector_hidden_act="gelu",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    config.dtype = language.dtype
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config).to(language.dtype)
    model.model.vision_tower = vision
    model.model.language_model = language.model
    model.model.multi_modal_projector = projector
    model.lm_head = language.lm_head
    return model.eval()


def _generation_config(tokenizer: Any, template: Template, language: PreTrainedModel) -> Any:
    """Greedy, and ending where the template's answers end."""
    from transformers import GenerationConfig

    ends = {tokenizer.convert_tokens_to_ids(template.end), tokenizer.eos_token_id}
    own = language.generation_config.eos_token_id if language.generation_config is not None else None
    ends |= set(own if isinstance(own, list) else [own])
    ends.discard(None)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
