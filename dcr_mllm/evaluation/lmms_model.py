"""LLaVA for lmms-eval: `lmms-eval --model dcr_llava --model_args pretrained=DIR` works by itself.

Its own template, image code and processor; batches with one prefill per image; CPU and CUDA; an error is raised where
lmms-eval's own LLaVA turns it into an empty answer. Of several processes (`torchrun`, `accelerate launch`) lmms-eval
asks each for its share of the questions, and gives the first one all answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.generation import Request, generate_answers
from dcr_mllm.evaluation.likelihood import option_log_probabilities
from dcr_mllm.evaluation.pillow import kept_strict
from dcr_mllm.llava import load_llava, load_processor
from dcr_mllm.log import rank

with kept_strict():
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest

# A question as it is asked: freely, or with the options that it may be answered with.
Question = tuple[Request, tuple[str, ...] | None]

MANIFEST = ModelManifest("dcr_llava", chat_class_path="dcr_mllm.evaluation.lmms_model.DcrLlava")


class DcrLlava(lmms):
    """A LLaVA directory as a model of lmms-eval.

    Args:
        pretrained: LLaVA directory.
        batch_size: Questions that are decoded together.
        device: `auto`, `cpu` or `cuda`, the last by local rank where several processes share a run.
        dtype: Of the weights; `auto` keeps the stored one on CUDA and takes float32 on the CPU.
        answers: JSONL file of answers that this model has given to these questions; it is added to after every batch.
            Further processes add to files of their own beside it, see `rank_path`.
        options: Gives a document's options by lmms-eval's task name and document number, or None; such a question is
            answered with the likeliest of them, the first of equals, and not in the model's own words.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 16,
        device: str | None = "auto",
        dtype: str = "auto",
        answers: str | Path | None = None,
        options: Callable[[str, int], Sequence[str] | None] | None = None,
    ) -> None:
        super().__init__()
        from accelerate import Accelerator, PartialState

        # Without a GPU accelerate connects processes only if it is told that there is none. A process that is done
        # waits for the others, and NCCL gives up after ten minutes where lmms-eval means to wait a day.
        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=1))
        self.accelerator = Accelerator()  # on that state: lmms-eval gathers and waits with it
        self._rank, self._world_size = state.process_index, state.num_processes
        self.device = torch.device("cpu") if device == "cpu" else state.device
        self.batch_size = int(batch_size)
        self.processor = load_processor(pretrained)
        if dtype == "auto" and self.device.type == "cpu":
            dtype = "float32"
        model: Any = load_llava(Path(pretrained), dtype)
        self.model = model.to(self.device)
        self.answers = None if answers is None else Path(answers)
        self.options = options

    def clean(self) -> None:
        """Keeps the weights, which lmms-eval would drop after every task: whoever made the model lets go of it."""

    @property
    def tokenizer_name(self) -> str:
        return str(self.processor.tokenizer.name_or_path)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to lmms-eval's chat requests: greedy and cut at their stop strings, or one of their options.

        Raises:
            UserError: A task asks for sampling or beams, or shows a video.
        """
        questions: list[Question] = []
        for instance in requests:
            request = self._request(*instance.args)
            _, _, _, doc_id, task, _ = instance.args
            options = None if self.options is None else self.options(task, doc_id)
            questions.append((request, None if options is None else tuple(options)))
        return [
            answer if options is not None else _cut(answer, instance.args[2].get("until"))
            for answer, (_, options), instance in zip(self._answer(questions), questions, requests, strict=True)
        ]

    def _answer(self, questions: Sequence[Question]) -> list[str]:
        """Asks every distinct question once: POPE repeats its positive ones in all three categories."""
        known = {} if self.answers is None else read_answers(self.answers)
        own = None if self.answers is None else rank_path(self.answers, rank())
        if own is not None:
            cut_half_line(own)
        keys = [request_key(*question) for question in questions]
        asked = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}

        progress = tqdm(total=len(asked), desc="questions", unit="", disable=rank() > 0 or not asked)

        def keep(order: Sequence[str], found: dict[int, str]) -> None:
            new = {order[position]: answer for position, answer in found.items()}
            known.update(new)
            progress.update(len(new))
            if own is not None:
                with own.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in new.items())

        free = {key: request for key, (request, options) in asked.items() if options is None}
        closed = {key: (request, options) for key, (request, options) in asked.items() if options is not None}
        generate_answers(
            self.model,
            self.processor,
            list(free.values()),
            batch_size=self.batch_size,
            on_answers=partial(keep, list(free)),
        )
        self._choose(list(closed.values()), partial(keep, list(closed)))
        progress.close()
        return [known[key] for key in keys]

    def _choose(
        self, questions: Sequence[tuple[Request, tuple[str, ...]]], keep: Callable[[dict[int, str]], None]
    ) -> None:
        """The likeliest option of each question, the first of equals."""

        def choose(scores: dict[int, list[float]]) -> None:
            keep({position: questions[position][1][row.index(max(row))] for position, row in scores.items()})

        option_log_probabilities(
            self.model,
            self.processor,
            [request for request, _ in questions],
            [options for _, options in questions],
            batch_size=self.batch_size,
            on_scores=choose,
        )

    def _request(
        self, _context: str, doc_to_messages: Any, settings: dict[str, Any], doc_id: int, task: str, split: str
    ) -> Request:
        if settings.get("do_sample") or (settings.get("temperature") or 0) > 0 or (settings.get("num_beams") or 1) > 1:
            raise UserError(f"task {task} asks for sampling or beams ({settings}); answers are decoded greedily here")
        messages, images = self._shown(doc_to_messages, doc_id, task, split)
        # Decoded once for its hash and again in its batch: thousands of pictures at a time need not fit into memory.
        opened = partial(self._images, doc_to_messages, doc_id, task, split)
        return Request(
            prompt=self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            images=opened if images else (),
            image_key=image_key(images),
            max_new_tokens=int(settings.get("max_new_tokens", 16)),
        )

    def _images(self, doc_to_messages: Any, doc_id: int, task: str, split: str) -> tuple[Any, ...]:
        return tuple(self._shown(doc_to_messages, doc_id, task, split)[1])

    def _shown(self, doc_to_messages: Any, doc_id: int, task: str, split: str) -> tuple[Any, list[Any]]:
        """A document's messages, and the images in them."""
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        images: list[Any] = []
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    images.append(part["url"].convert("RGB"))
                elif part["type"] != "text":
                    raise UserError(f"task {task} shows a {part['type']}, and a LLaVA sees images only")
        return messages, images

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        # lmms-eval (0.7) itself stops at such a task before it gets here: it builds no likelihood requests for models
        # that take messages.
        raise UserError("lmms-eval asks models that take messages for answers only; likelihood tasks are not supported")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UserError("dcr_llava answers single questions; tasks of several rounds are not supported")


def request_key(request: Request, options: Sequence[str] | None = None) -> str:
    """A hash of prompt, images, settings and options: what an answer of one model depends on."""
    content = [request.prompt, request.image_key, request.max_new_tokens]
    text = json.dumps(content if options is None else [*content, list(options)])
    return hashlib.sha256(text.encode()).hexdigest()


def rank_path(path: Path, rank: int) -> Path:
    """Where a process keeps its answers: `NAME.jsonl` for the first one, `NAME.rank1.jsonl` for the second."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path


def read_answers(path: Path) -> dict[str, str]:
    """Answers by request, from the files of all processes, however many there were.

    A last line may be half written: its process was killed, or is writing it.
    """
    if not path.parent.is_dir():
        return {}
    name = re.compile(rf"{re.escape(path.stem)}(\.rank\d+)?{re.escape(path.suffix)}")
    found = {}
    for file in sorted(file for file in path.parent.iterdir() if name.fullmatch(file.name)):
        content = file.read_bytes()
        for line in content[: content.rfind(b"\n") + 1].decode("utf-8").splitlines():
            record = json.loads(line)
            found[record["key"]] = record["answer"]
    return found


def cut_half_line(path: Path) -> None:
    """Take off what a killed run has left of a last line; only for the process that writes to the file."""
    if path.is_file():
        # Not written anew: another process may be reading.
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


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
