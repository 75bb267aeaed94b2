#!/usr/bin/env python
"""Speed of an evaluation: one prefill per image, a start without torch, only the asked tasks. Prints one JSON object.

    python scripts/benchmark_eval.py [--images 2] [--quick]

`pope_time_ratio` and `answers_equal` come from data in POPE's shape: 18 questions of 14 to 16 tokens on each picture of
640 x 480, asked of a random LLaVA with 576 image tokens and a Llama of 8 layers x 512, fp32. Both sides are given the
same decoded pictures and prompts and read answers of at most 4 tokens, image processing included:

* **plain** is the processor and ``generate`` for one question after the other.
* **ours** is ``generate_answers``, what ``eval/run.py`` uses, in batches.

POPE itself allows 128 tokens, but a trained model stops after "Yes" or "No" and the end token; random weights do not,
so both sides get the same low limit. POPE's three categories share their positive questions, which ``eval/run.py`` asks
once: that is not counted here, all 18 questions differ. The weights are large enough that answers depend on question
and picture (``distinct_answers``), or equality would say nothing. The sides take turns in one process, so that a busy
machine hits both; the best time of each counts.

`startup_seconds_ratio` is ``eval/run.py --help`` over ``import torch``, each a fresh process, medians of several in
turn. `task_index_seconds` is lmms-eval's ``TaskManager`` with the asked tasks only, as ``eval/run.py`` makes it; the
import of lmms-eval is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from scripts.measuring import machine, timed  # noqa: E402

# With the tokenizer below, which splits most of these into letters, questions about them have 14 to 16 tokens.
OBJECTS = (
    *("motorcycle", "traffic light", "fire hydrant", "stop sign", "backpack", "suitcase", "snowboard", "sports ball"),
    *("skateboard", "surfboard", "wine glass", "dining table", "keyboard", "microwave", "refrigerator", "teddy bear"),
    *("flower pot", "wheelbarrow"),
)
MAX_NEW_TOKENS = 4
LIMITS = {"pope_time_ratio": 0.3, "startup_seconds_ratio": 0.6, "task_index_seconds": 1.0}
SIZES = {
    "full": {"image_size": 336, "questions": 18, "layers": 8, "width": 512},
    "quick": {"image_size": 56, "questions": 4, "layers": 2, "width": 32},
}
SIDES = ("pope", "index")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=2, help="pictures (default 2)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions that are decoded together (default 32)")
    parser.add_argument("--repeats", type=int, default=2, help="rounds of both sides, of which the best time counts")
    parser.add_argument("--starts", type=int, default=5, help="processes of which the median start counts (default 5)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, and measures nothing")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if min(options.images, options.batch_size, options.repeats, options.starts) < 1:
        parser.error("--images, --batch-size, --repeats and --starts must be at least 1")
    if options.side:
        print(json.dumps(measure_pope(options) if options.side == "pope" else measure_index()))
        return 0
    print(json.dumps(compare(options), indent=2))
    return 0


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Takes all measurements, one process each, and puts the ratios together."""
    start = time.perf_counter()
    startup = measure_startup(options.starts)
    index, pope = (run_child(options, side) for side in ("index", "pope"))
    result = {
        "pope_time_ratio": pope["ours_seconds"] / pope["plain_seconds"],
        "answers_equal": pope["answers_equal"],
        "startup_seconds_ratio": startup["help_seconds"] / startup["torch_seconds"],
        "task_index_seconds": index["seconds"],
    }
    within = {key: result[key] <= limit for key, limit in LIMITS.items()}
    return {
        **result,
        "limits": {**LIMITS, "answers_equal": 1.0},
        "within_limits": {**within, "answers_equal": result["answers_equal"] == 1.0},
        "batch_size": options.batch_size,
        "plain_seconds": pope["plain_seconds"],
        "ours_seconds": pope["ours_seconds"],
        "pope_cpu_time_ratio": pope["ours_cpu_seconds"] / pope["plain_cpu_seconds"],
        "quick": options.quick,
        "sides": {"pope": pope, "startup": startup, "index": index},
        "machine": machine(),
        "total_seconds": time.perf_counter() - start,
    }


def run_child(options: argparse.Namespace, side: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, *(["--quick"] if options.quick else [])]
    for name in ("images", "batch_size", "repeats"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    print(f"{side} ...", file=sys.stderr, flush=True)
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode != 0:
        raise SystemExit(f"error: measuring {side} failed with status {finished.returncode}")
    return json.loads(finished.stdout.splitlines()[-1])


def measure_startup(starts: int) -> dict[str, Any]:
    """Medians of both commands, in turn, after one of each that fills the disk cache."""
    print("startup ...", file=sys.stderr, flush=True)
    commands = {
        "help_seconds": [sys.executable, str(REPOSITORY / "eval" / "run.py"), "--help"],
        "torch_seconds": [sys.executable, "-c", "import torch"],
    }

    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(starts + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=REPOSITORY)
            seconds[name].append(time.perf_counter() - start)
    return {"starts": starts, **{name: statistics.median(found[1:]) for name, found in seconds.items()}}


def measure_index() -> dict[str, Any]:
    """lmms-eval's index of all benchmarks that can be asked; what is in their rows does not matter to it."""
    from datasets import Dataset

    from dcr_mllm.evaluation.lmms_tasks import lmms_name, write_task
    from dcr_mllm.evaluation.mllm_data import TaskData
    from dcr_mllm.evaluation.mllm_tasks import TASKS
    from dcr_mllm.evaluation.pillow import kept_strict
    from dcr_mllm.evaluation.scorers import SCORERS

    with kept_strict():
        from lmms_eval.tasks import TaskManager

    found: list[Any] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in TASKS:
            table = Dataset.from_list([{TASKS[task].image: {"bytes": b"", "path": None}}])
            data = TaskData(
                task=task,
                name=task,
                table=table,
                rows=[],
                undecodable={},
                notes=[],
                files=None,
                score=SCORERS[task].score,
            )
            write_task(data, folder, folder)
        seconds, _ = timed(lambda: found.append(TaskManager("WARNING", include_path=name, include_defaults=False)))
    # Beside the tasks there are the tags that some of them have in lmms-eval.
    tasks = sorted(name for name in found[0].all_tasks if name.startswith("dcr_"))
    assert tasks == sorted(map(lmms_name, TASKS)), tasks
    return {"seconds": seconds, "tasks": tasks}


def measure_pope(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn, after a warm-up of each on the first picture's first questions."""
    import torch

    size = SIZES["quick" if options.quick else "full"]
    model, processor, template = build_llava(size)
    requests = draw_requests(template, options.images, size)
    seconds: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    answers: dict[str, list[str]] = {}

    def plain(asked: Sequence[Any] = requests) -> None:
        answers["plain"] = [plain_answer(model, processor, request) for request in asked]

    def ours(asked: Sequence[Any] = requests) -> None:
        answers["ours"] = our_answers(model, processor, asked, options.batch_size)

    for side in (plain, ours):
        side(requests[:2])
    for _ in range(options.repeats):
        for side in (plain, ours):
            seconds[side.__name__].append(timed(side))
    equal = [one == other for one, other in zip(answers["plain"], answers["ours"], strict=True)]
    return {
        **{f"{side}_seconds": min(wall for wall, _ in found) for side, found in seconds.items()},
        **{f"{side}_cpu_seconds": min(used for _, used in found) for side, found in seconds.items()},
        "answers_equal": sum(equal) / len(equal),
        "distinct_answers": len(set(answers["plain"])),
        "questions": len(requests),
        "images": options.images,
        "question_tokens": question_tokens(processor.tokenizer),
        "image_tokens": (size["image_size"] // 14) ** 2,
        "max_new_tokens": MAX_NEW_TOKENS,
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def our_answers(model: Any, processor: Any, requests: Sequence[Any], batch_size: int) -> list[str]:
    from dcr_mllm.evaluation.generation import generate_answers

    return generate_answers(model, processor, requests, batch_size=batch_size)


def plain_answer(model: Any, processor: Any, request: Any) -> str:
    """One question by itself, as the documentation of transformers asks it."""
    inputs = processor(images=list(request.images), text=request.prompt, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=request.max_new_tokens, do_sample=False)
    new = generated[0, inputs.input_ids.shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def build_llava(size: dict[str, int]) -> tuple[Any, Any, Any]:
    """Model, processor and template; weights random, and so large that attention is not the same everywhere."""
    import torch

    from stage2_llava.assemble import assemble
    from tests.tiny_llms import save_tiny_llama
    from tests.tiny_models import save_tiny_clip

    with tempfile.TemporaryDirectory() as name:
        tower = save_tiny_clip(Path(name) / "clip", image_size=size["image_size"], patch_size=14)
        llm = save_tiny_llama(Path(name) / "llama", hidden_size=size["width"], num_layers=size["layers"])
        model, processor, template = assemble(tower, llm, template="vicuna_v1")
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
    return model.eval(), processor, template


def draw_requests(template: Any, images: int, size: dict[str, int]) -> list[Any]:
    """Every question on every picture; pictures are noise on a coarse grid, so that they differ when made smaller."""
    import numpy as np
    from PIL import Image

    from dcr_mllm.conversation import Turn, prompt
    from dcr_mllm.evaluation.generation import Request

    rng = np.random.default_rng(0)
    requests = []
    for number in range(images):
        grid = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        picture = grid.resize((640, 480), Image.Resampling.NEAREST)
        for text in questions()[: size["questions"]]:
            requests.append(
                Request(
                    prompt=prompt(template, [Turn("user", f"<image>\n{text}")]),
                    images=(picture,),
                    image_key=str(number),
                    max_new_tokens=MAX_NEW_TOKENS,
                )
            )
    return requests


def questions() -> list[str]:
    return [f"Is there a {thing} in the image?" for thing in OBJECTS]


def question_tokens(tokenizer: Any) -> list[int]:
    """The smallest and the largest number of tokens of a question."""
    counts = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in questions()]
    return [min(counts), max(counts)]


if __name__ == "__main__":
    sys.exit(main())
