"""The training loss is that of `LlavaForConditionalGeneration`, from pixels, cached features and in any split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dcr_mllm.conversation import TEMPLATES
from dcr_mllm.llava import load_llava, load_processor
from stage2_llava.collate import Collator, InstructionDataset
from stage2_llava.features import FeatureCache, build_cache, cache_directory
from stage2_llava.instructions import load_instructions
from stage2_llava.labels import IGNORED
from stage2_llava.step import LlavaStep, tower_features


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> Any:
    return load_llava(tiny_llava).requires_grad_(True)


@pytest.fixture(scope="module")
def samples(tiny_llava: Path, llava_data: Path) -> Any:
    processor = load_processor(tiny_llava)
    data = load_instructions(str(llava_data / "instruct.json"), str(llava_data))
    dataset = InstructionDataset(
        data, template=TEMPLATES["vicuna_v1"], processor=processor, image_tokens=16, max_length=512
    )
    return processor, dataset, Collator(processor.tokenizer.pad_token_id, torch.zeros(3, 32, 32))


def reference(model: Any, items: list) -> tuple[torch.Tensor, int]:
    """Sum of the token losses and their number by transformers' own forward, one sample at a time."""
    total, count = torch.zeros(()), 0
    for encoded, images in items:
        labels = torch.tensor([encoded.labels])
        pixel_values = torch.stack(images) if images else None
        loss = model(input_ids=torch.tensor([encoded.input_ids]), pixel_values=pixel_values, labels=labels).loss
        number = int((labels[:, 1:] != IGNORED).sum())
        total, count = total + loss * number, count + number
    return total, count


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [0, 25, 26], [24, 25, 26]], ids=["images", "mixed", "text"])
def test_loss_and_gradients_are_transformers_own(model: Any, samples: Any, chosen: list[int]):
    _, dataset, collate = samples
    items = [dataset[k] for k in chosen]
    total, count = reference(model, items)
    model.zero_grad()
    (total / count).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = LlavaStep(model).eval()(**collate(items))["loss"]
    loss.backward()
    torch.testing.assert_close(loss, total / count, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            assert parameter.grad is None or not parameter.grad.any(), name
        elif name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)
        else:
            assert not parameter.grad.any(), name  # the projector in a text-only batch: in the graph, with zeros


def test_split_into_micro_batches_gives_the_same_gradient(model: Any, samples: Any):
    _, dataset, collate = samples
    items = [dataset[k] for k in (0, 1, 2, 25)]
    step = LlavaStep(model).eval()
    model.zero_grad()
    step(**collate(items))["loss"].backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    count = torch.tensor(sum(label != IGNORED for encoded, _ in items for label in encoded.labels))
    for part in (items[:1], items[1:]):
        step(**collate(part), num_items_in_batch=count)["loss"].backward()
    for name, parameter in model.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-3, atol=1e-6)


def test_cached_features_give_the_same_loss(model: Any, samples: Any, tmp_path: Path):
    processor, dataset, collate = samples
    directory = cache_directory(tmp_path, model, processor, "images")
    build_cache(directory, model, processor, dataset.instructions, device=torch.device("cpu"), batch_size=5)
    features = FeatureCache(directory)
    assert len(features) == 24
    cached = InstructionDataset(
        dataset.instructions,
        template=dataset.template,
        processor=processor,
        image_tokens=16,
        max_length=512,
        features=features,
    )
    collate_features = Collator(processor.tokenizer.pad_token_id, torch.zeros(16, 32), "image_features")
    step = LlavaStep(model).eval()
    for chosen in ([0, 1, 2], [3, 25], [24, 26]):
        pixels = step(**collate([dataset[k] for k in chosen]))["loss"]
        from_cache = step(**collate_features([cached[k] for k in chosen]))["loss"]
        torch.testing.assert_close(from_cache, pixels, rtol=1e-6, atol=1e-6)


def test_cache_of_another_tower_or_preprocessing_is_another_folder(model: Any, samples: Any, tmp_path: Path):
    processor, _, _ = samples
    first = cache_directory(tmp_path, model, processor, "images")
    assert cache_directory(tmp_path, model, processor, "images") == first
    assert cache_directory(tmp_path, model, processor, "other") != first
    processor.image_processor.do_pad = False
    try:
        assert cache_directory(tmp_path, model, processor, "images") != first
    finally:
        processor.image_processor.do_pad = True
    weight = next(model.model.vision_tower.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1
        try:
            assert cache_directory(tmp_path, model, processor, "images") != first
        finally:
            weight.view(-1)[0] -= 1


def test_a_killed_cache_goes_on(model: Any, samples: Any, tmp_path: Path):
    processor, dataset, _ = samples
    build_cache(tmp_path, model, processor, dataset.instructions, device=torch.device("cpu"), rank=0, world_size=2)
    assert len(FeatureCache(tmp_path)) == 12
    build_cache(tmp_path, model, processor, dataset.instructions, device=torch.device("cpu"))
    assert len(FeatureCache(tmp_path)) == 24


def test_features_are_the_layer_that_transformers_projects(model: Any):
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        mine = model.model.multi_modal_projector(tower_features(model, pixels))
        theirs = torch.stack(list(model.get_image_features(pixels).pooler_output))
    torch.testing.assert_close(mine, theirs)


def test_frozen_tower_stays_in_eval_mode(model: Any):
    step = LlavaStep(model).train()
    assert step.llava.model.language_model.training and not step.llava.model.vision_tower.training
