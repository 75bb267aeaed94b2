"""LLaVA on disk: its processor, loading, and what training, chat and evaluation share of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dcr_mllm.conversation import IMAGE_TOKEN, Template
from dcr_mllm.llava_headers import VisionSummary, llava_summary

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

Aspect = Literal["square", "pad"]


def image_processor(path: str | Path, aspect: Aspect) -> Any:
    """LLaVA's image processor with a tower's own size, mean, std and resampling.

    Pillow's backend, bit-exact with LLaVA-1.5; torchvision's differs by up to 0.015.

    Args:
        path: Directory of a tower or of a LLaVA.
        aspect: `square` resizes and crops as the tower's own processor does; `pad` pads to a square first.
    """
    from transformers import AutoImageProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    own = AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=True)
    size = {key: value for key, value in dict(own.size).items() if value is not None}
    side = size.get("shortest_edge") or size["height"]
    return LlavaImageProcessorPil(
        size=size,
        crop_size={"height": side, "width": side},
        do_center_crop=True,  # of a square it changes nothing; serving code reads the token count from crop_size
        do_pad=aspect == "pad",
        resample=own.resample,
        do_rescale=own.do_rescale,
        rescale_factor=own.rescale_factor,
        do_normalize=own.do_normalize,
        image_mean=list(own.image_mean),
        image_std=list(own.image_std),
    )


def build_processor(tower: VisionSummary, tokenizer: Any, template: Template, aspect: Aspect) -> LlavaProcessor:
    """The processor of a LLaVA: image code, tokenizer and chat template in one.

    Args:
        tower: Gives the number of tokens per image.
        tokenizer: Knows `<image>`.
        template: Becomes the chat template.
        aspect: See `image_processor`.
    """
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=image_processor(tower.path, aspect),
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=tower.select_strategy,
        num_additional_image_tokens=tower.num_additional_image_tokens,
        chat_template=template.jinja,
        image_token=IMAGE_TOKEN,
    )


def load_processor(path: str | Path) -> LlavaProcessor:
    """The processor of a saved LLaVA, on the same Pillow backend that it trained with.

    What decides how many tokens an image becomes is taken from the model's config: older repositories leave it out of
    the processor's.
    """
    from transformers import AutoProcessor

    summary = llava_summary(path)
    processor = AutoProcessor.from_pretrained(path, backend="pil", local_files_only=True)
    processor.patch_size = summary.patch_size
    processor.vision_feature_select_strategy = summary.select_strategy
    processor.num_additional_image_tokens = 1 if summary.select_strategy == "default" else 0
    return processor


def load_llava(path: str | Path, dtype: torch.dtype | str = "auto", **options: Any) -> LlavaForConditionalGeneration:
    """A saved LLaVA, in eval mode.

    Args:
        path: Directory.
        dtype: Of the weights; `auto` keeps the stored one.
        options: Further arguments of `from_pretrained`.
    """
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype, local_files_only=True, **options).eval()
