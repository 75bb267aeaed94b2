"""LLaVA for lmms-eval: `lmms-eval --model dcr_llava --model_args pretrained=DIR` works by itself.

Its own template, image code and processor; batches with one prefill per image; CPU and CUDA; an error is raised where
lmms-eval's own LLaVA turns it into an empty answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.generation import Request, generate_answers
from dcr_mllm.evaluation.pillow import kept_strict
from dcr_mllm.llava import load_llava, load_processor

with kept_strict():
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("dcr_llava", chat_class_path="dcr_mllm.evaluation.lmms_model.DcrLlava")


class DcrLlava(lmms):
    """A LLaVA directory as a model of lmms-eval.

    Args:
        pretrained: LLaVA directory.
        batch_size: Questions that are decoded together.
        device: `auto`, `cpu` or `cuda`, the last by local rank where several processes share a run.
        dtype: Of the weights; `auto` keeps the stored one on CUDA and takes float32 on the CPU.
        answers: JSONL file of answers that this model has given to these questions; it is added to after every batch.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 16,
        device: str | None = "auto",
        dtype: str = "auto",
        answers: str | Path | None = None,
    ) -> None:
        super().__init__()
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu")
        self.accelerator = state
        self._rank, self._world_size = state.process_index, state.num_processes
        self.device = torch.device("cpu") if device == "cpu" else state.device
        self.batch_size = int(batch_size)
        self.processor = load_processor(pretrained)
        if dtype == "auto" and self.device.type == "cpu":
            dtype = "float32"
        model: Any = load_llava(Path(pretrained), dtype)
        self.model = model.to(self.device)
        self.answers = None if answers is None else Path(answers)

    def clean(self) -> None:
        """Keeps the weights, which lmms-eval would drop after every task: whoever made the model lets go of it."""

    @property
    def tokenizer_name(self) -> str:
        return str(self.processor.tokenizer.name_or_path)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers to lmms-eval's chat requests, cut at their stop strings.

        Raises:
            UserError: A task asks for sampling or beams, or shows a video.
        """
        shown: dict[str, tuple[Any, ...]] = {}  # one copy of each image: POPE asks eighteen questions on every one
        prepared = []
        for instance in requests:
            request = self._request(*instance.args)
            prepared.append(replace(request, images=shown.setdefault(request.image_key, request.images)))
        answers = self._answer(prepared)
        return [_cut(answer, instance.args[2].get("until")) for answer, instance in zip(answers, requests, strict=True)]

    def _answer(self, requests: Sequence[Request]) -> list[str]:
        """Asks every distinct question once: POPE repeats its positive ones in all three categories."""
        known = {} if self.answers is None else read_answers(self.answers)
        keys = [request_key(request) for request in requests]
        asked = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        order = list(asked)

        def keep(found: dict[int, str]) -> None:
            new = {order[position]: answer for position, answer in found.items()}
            known.update(new)
            if self.answers is not None:
                with self.answers.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in new.items())

        generate_answers(self.model, self.processor, list(asked.values()), batch_size=self.batch_size, on_answers=keep)
        return [known[key] for key in keys]

    def _request(
        self, _context: str, doc_to_messages: Any, settings: dict[str, Any], doc_id: int, task: str, split: str
    ) -> Request:
        if settings.get("do_sample") or (settings.get("temperature") or 0) > 0 or (settings.get("num_beams") or 1) > 1:
            raise UserError(f"task {task} asks for sampling or beams ({settings}); answers are decoded greedily here")
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        images: list[Any] = []
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    images.append(part["url"].convert("RGB"))
                elif part["type"] != "text":
                    raise UserError(f"task {task} shows a {part['type']}, and a LLaVA sees images only")
        return Request(
            prompt=self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            images=tuple(images),
            image_key=image_key(images),
            max_new_tokens=int(settings.get("max_new_tokens", 16)),
        )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise UserError("dcr_llava generates answers; tasks that compare likelihoods are not supported")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UserError("dcr_llava answers single questions; tasks of several rounds are not supported")


def request_key(request: Request) -> str:
    """A hash of prompt, images and settings: what an answer of one model depends on."""
    text = json.dumps([request.prompt, request.image_key, request.max_new_tokens])
    return hashlib.sha256(text.encode()).hexdigest()


def read_answers(path: Path) -> dict[str, str]:
    """Answers by request; a last line that a killed run left half written is cut off."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    records = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
    return {record["key"]: record["answer"] for record in records}


def image_key(images: Sequence[Any]) -> str:
    """A hash of the pixels of a request's images."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def _cut(answer: str, until: str | Sequence[str] | None) -> str:
    stops = [until] if isinstance(until, str) else list(until or [])
    for stop in filter(None, stops):
        answer = answer.split(stop)[0]
    return answer.strip()
