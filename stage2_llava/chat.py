"""`dcr-mllm chat LLAVA [LLAVA2] --image FILE`: talk about an image in the terminal; two LLaVAs answer side by side."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dcr_mllm.cli import run_main
from dcr_mllm.errors import UserError
from dcr_mllm.headers import resolve_weights
from dcr_mllm.llava_headers import llava_summary

Message = dict[str, Any]


def load_chatter(path: Path, *, device: str, max_new_tokens: int) -> Callable[[Sequence[Message], Any], str]:
    """A function from a conversation and its image to the LLaVA's next answer, decoded greedily.

    Args:
        path: LLaVA directory.
        device: Where it runs.
        max_new_tokens: Limit of an answer.
    """
    import torch

    from dcr_mllm.llava import load_llava, load_processor

    processor = load_processor(path)
    model: Any = load_llava(path).to(device)
    if device == "cpu":
        model = model.float()

    @torch.inference_mode()
    def answer(messages: Sequence[Message], image: Any) -> str:
        text = processor.apply_chat_template(list(messages), add_generation_prompt=True)
        inputs = processor(images=image, text=text, return_tensors="pt").to(device, model.dtype)
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens)
        return processor.tokenizer.decode(generated[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()

    return answer


def side_by_side(names: Sequence[str], answers: Sequence[str], width: int) -> str:
    """Answers in columns under the names of who gave them; a single one is not put into a column."""
    if len(answers) == 1:
        return answers[0]
    column = max(20, (width - 3) // len(answers))
    cells = [
        [
            name,
            "-" * column,
            *(line for part in answer.splitlines() or [""] for line in textwrap.wrap(part, column) or [""]),
        ]
        for name, answer in zip(names, answers, strict=True)
    ]
    height = max(map(len, cells))
    rows = zip(*(cell + [""] * (height - len(cell)) for cell in cells), strict=True)
    return "\n".join(" | ".join(text.ljust(column) for text in row).rstrip() for row in rows)


def chat(
    paths: Sequence[Path], image_file: Path, questions: Sequence[str], *, device: str, max_new_tokens: int
) -> None:
    """Ask every question in turn, or read them from the terminal until an empty line or its end.

    Raises:
        UserError: The image cannot be opened.
    """
    from PIL import Image

    try:
        image = Image.open(image_file).convert("RGB")
    except OSError as error:
        raise UserError(f"cannot open --image {image_file}: {error}") from None
    chatters = [load_chatter(path, device=device, max_new_tokens=max_new_tokens) for path in paths]
    names = [path.parent.name if path.name == "llava" else path.name for path in map(Path.absolute, paths)]
    histories: list[list[Message]] = [[] for _ in paths]
    for question in questions or iter(_ask, ""):
        if questions:
            print(f"> {question}")
        answers = []
        for chatter, history in zip(chatters, histories, strict=True):
            image_part: list[Message] = [] if history else [{"type": "image"}]
            history.append({"role": "user", "content": [*image_part, {"type": "text", "text": question}]})
            answers.append(chatter(history, image))
            history.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]})
        print(side_by_side(names, answers, shutil.get_terminal_size().columns), flush=True)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="dcr-mllm chat", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("llava", nargs="+", metavar="LLAVA", help="one LLaVA directory, or two to compare")
    parser.add_argument("--image", type=Path, required=True, help="image file to talk about")
    parser.add_argument("--question", action="append", default=[], help="ask this instead of reading the terminal")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    options = parser.parse_args(argv)

    def call() -> None:
        if len(options.llava) > 2:
            raise UserError(f"chat compares at most two LLaVAs, found {len(options.llava)}")
        if not options.image.is_file():
            raise UserError(f"--image {options.image} does not exist")
        paths = [llava_summary(resolve_weights(path, "llava")).path for path in options.llava]
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        chat(paths, options.image, options.question, device=device, max_new_tokens=options.max_new_tokens)

    return run_main(call)


if __name__ == "__main__":
    sys.exit(main())
