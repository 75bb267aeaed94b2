"""Check instruction data before training on them, and write a copy without what is broken.

    python -m stage2_llava.instructions validate DATA... [--images ROOT ...]

Checks the structure of every record, decodes every image, looks for ids that occur twice and, with --llm, tokenizes
every sample. Samples with an id that occurs twice, or that are cut at --max-length, are reported but can be trained on:
--drop-missing keeps them. Exit status: 0 if all is well, 1 if there are problems, 2 if nothing could be checked.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dcr_mllm.cli import run_main
from dcr_mllm.conversation import Turn
from dcr_mllm.errors import UserError
from dcr_mllm.log import get_logger
from dcr_mllm.runs import write_json_atomic
from stage2_llava.image_roots import Images
from stage2_llava.instructions import Instructions, Problem, read_instructions
from stage2_llava.record_files import Refused, expand, read_records, split_weight

TRAINABLE = ("duplicate id", "too long")
"""Kinds of problems that samples can be trained with."""

_NUM_EXAMPLES = 10
_IMAGES_PER_TASK, _SAMPLES_PER_TASK = 64, 256

logger = get_logger(__name__)


class Lengths(NamedTuple):
    """How to count the tokens of a sample: as training with this LLM would."""

    llm: str
    template: str = "auto"
    max_length: int = 2048
    image_tokens: int = 576


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What was found.

    Attributes:
        instructions: The samples whose records are good and whose images are there.
        problems: Of these and of all others.
        num_images: Different images that were decoded.
        num_tokens: Per sample of `instructions` that could be tokenized, before it is cut; None without an LLM.
    """

    instructions: Instructions
    problems: list[Problem]
    num_images: int
    num_tokens: np.ndarray | None

    @property
    def broken(self) -> set[str]:
        """Places of the samples that cannot be trained on."""
        return {problem.where for problem in self.problems if problem.kind not in TRAINABLE}

    def report(self) -> dict[str, Any]:
        """Everything as JSON."""
        has_image, tokens = self.instructions.has_image, self.num_tokens
        num_read = self.instructions.num_records + self.instructions.num_dropped
        lengths = None
        if tokens is not None and len(tokens):
            quantiles = {f"p{q}": int(np.percentile(tokens, q, method="higher")) for q in (50, 95, 99)}
            lengths = {**quantiles, "max": int(tokens.max())}
        return {
            "num_samples": num_read,
            "num_good": num_read - len(self.broken),
            "num_with_images": int(has_image.sum()),
            "num_text_only": int((~has_image).sum()),
            "num_images": self.num_images,
            "num_system_turns": self.instructions.num_system,
            "tokens": lengths,
            "counts": dict(Counter(problem.kind for problem in self.problems).most_common()),
            "problems": [problem._asdict() for problem in self.problems],
        }


def validate(
    data: Sequence[str], images: Sequence[str], *, lengths: Lengths | None = None, num_workers: int | None = None
) -> Validation:
    """Checks everything that may be wrong with instruction data.

    Args:
        data: As in `load_instructions`; weights are ignored.
        images: Folders and tars.
        lengths: Tokenize as well.
        num_workers: Processes; one per CPU by default.

    Raises:
        UserError: A file is missing or cannot be read as a whole, or template and tokenizer do not fit.
    """
    if num_workers is None:
        num_workers = os.cpu_count() or 1
    files = list(dict.fromkeys(split_weight(spec)[0] for spec in data))
    instructions, problems = read_instructions(files, images)
    users: dict[str, list[int]] = defaultdict(list)
    first_places: dict[str, str] = {}
    for index, sample in enumerate(instructions):
        for name in sample.images:
            users[name].append(index)
        first = first_places.setdefault(sample.id, sample.where)
        if first != sample.where:
            problems.append(Problem("duplicate id", sample.where, sample.id, f"has the id of {first}"))

    names = list(users)
    tasks = [names[i : i + _IMAGES_PER_TASK] for i in range(0, len(names), _IMAGES_PER_TASK)]
    for refusals in _map(_decode, tasks, num_workers, _hold_images, (instructions.images,), "images"):
        for name, kind, text in refusals:
            for sample in map(instructions.__getitem__, users[name]):
                problems.append(Problem(kind, sample.where, sample.id, text))

    num_tokens = None
    if lengths is not None:
        num_tokens, more = _count_tokens(instructions, lengths, num_workers)
        problems += more
    return Validation(instructions=instructions, problems=problems, num_images=len(names), num_tokens=num_tokens)


def _count_tokens(instructions: Instructions, lengths: Lengths, num_workers: int) -> tuple[np.ndarray, list[Problem]]:
    _hold_tokenizer(lengths)  # here first, so that a mistake is told before processes start
    starts = range(0, len(instructions), _SAMPLES_PER_TASK)
    tasks = ([(s.turns, s.where) for s in _part(instructions, start)] for start in starts)
    num_tokens: list[int] = []
    problems = []
    results = _map(_tokenize, tasks, num_workers, _hold_tokenizer, (lengths,), "samples", len(starts))
    for start, counts in zip(starts, results, strict=True):
        for sample, count in zip(_part(instructions, start), counts, strict=True):
            if isinstance(count, str):
                problems.append(Problem("tokens", sample.where, sample.id, count))
                continue
            num_tokens.append(count)
            if count > lengths.max_length:
                text = f"has {count:,} tokens with its images, of which training cuts all behind {lengths.max_length:,}"
                problems.append(Problem("too long", sample.where, sample.id, text))
    return np.array(num_tokens, dtype=np.int64), problems


def _part(instructions: Instructions, start: int) -> Iterator[Any]:
    return map(instructions.__getitem__, range(start, min(start + _SAMPLES_PER_TASK, len(instructions))))


def write_clean(data: Sequence[str], broken: set[str], out: str | Path) -> int:
    """Writes the samples that are not broken as LLaVA JSON, one per line, records as they were.

    Images that lie in data tars are named `TAR/MEMBER`, which is found when the same tars are given as `images`.

    Args:
        data: As in `load_instructions`; weights are ignored.
        broken: Places of the samples to leave out.
        out: A file that does not exist.

    Returns:
        Number of samples written.

    Raises:
        UserError: The file exists or cannot be written, or no sample is left.
    """
    out = Path(out)
    _check_free(out)
    partial = out.with_name(f".{out.name}.partial")
    number = 0
    try:
        with open(partial, "w", encoding="utf-8") as file:
            for path in (path for spec in data for path in expand(split_weight(spec)[0], "data")):
                form, records = read_records(path)
                for place, record in records:
                    if path + form.format(place) in broken:
                        continue
                    if path.endswith(".tar"):
                        record = _with_tar_names(record, os.path.basename(path))
                    file.write(f"{',' if number else '['}\n{json.dumps(record, ensure_ascii=False)}")
                    number += 1
            file.write("\n]\n")
            file.flush()
            os.fsync(file.fileno())
        if not number:
            raise UserError(f"no sample is good, so {out} is not written")
        _check_free(out)
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return number


def _with_tar_names(record: dict[str, Any], tar: str) -> dict[str, Any]:
    names = [f"{tar}/{name}" for name in record["image"]]
    rest = {key: value for key, value in record.items() if key != "image"}
    return {**rest, "image": names[0] if len(names) == 1 else names} if names else rest


def _check_free(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already and is not overwritten; move it away or choose another name")
    _check_folder(path)


def _check_folder(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: the folder {path.parent} does not exist")


# ---- work in other processes; what they need is sent once and held here

_held: dict[str, Any] = {}


def _hold_images(images: Images) -> None:
    _held["images"] = images


def _hold_tokenizer(lengths: Lengths) -> None:
    if _held.get("lengths") == lengths:
        return
    from dcr_mllm.conversation import choose_template
    from dcr_mllm.headers import resolve_weights
    from stage2_llava.assemble import add_tokens, llm_tokenizer

    path = resolve_weights(lengths.llm, "llm")
    try:
        tokenizer = llm_tokenizer(path)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"llm {path} has no tokenizer that could be loaded ({reason}); copy its files there") from None
    template = choose_template(lengths.template, tokenizer)
    add_tokens(tokenizer)
    _held["lengths"], _held["tokenizer"], _held["template"] = lengths, tokenizer, template


def _decode(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Name, kind of problem and what it is, for images that cannot be decoded."""
    refusals = []
    for name in names:
        try:
            _held["images"].open(name)
        except Refused as error:
            refusals.append((name, error.kind, error.text))
    return refusals


def _tokenize(samples: Sequence[tuple[Sequence[Turn], str]]) -> list[int | str]:
    """Number of tokens before cutting, or why a sample cannot be encoded."""
    from stage2_llava.labels import encode

    lengths: Lengths = _held["lengths"]
    counts: list[int | str] = []
    for turns, where in samples:
        try:
            encoded = encode(
                turns,
                _held["template"],
                _held["tokenizer"],
                image_tokens=lengths.image_tokens,
                max_length=lengths.max_length,
                where=where,
            )
            counts.append(len(encoded.input_ids) + encoded.num_truncated)
        except UserError as error:
            counts.append(str(error))
    return counts


def _map(
    function: Callable[[Any], Any],
    tasks: Any,
    num_workers: int,
    initializer: Callable[..., None],
    initargs: tuple[Any, ...],
    what: str,
    num_tasks: int | None = None,
) -> Iterator[Any]:
    """Results in the order of the tasks, which are drawn as they are needed; in this process if it is enough."""
    num_tasks = len(tasks) if num_tasks is None else num_tasks
    if num_workers <= 1 or num_tasks <= 1:
        initializer(*initargs)
        for number, task in enumerate(tasks, start=1):
            yield function(task)
            _tell(what, number, num_tasks)
        return
    # Spawned, since this process may have threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    workers = min(num_workers, num_tasks)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=initializer, initargs=initargs) as pool:
        waiting: deque[Future[Any]] = deque()
        number = 0
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) > 4 * workers:
                    number += 1
                    yield waiting.popleft().result()
                    _tell(what, number, num_tasks)
            while waiting:
                number += 1
                yield waiting.popleft().result()
                _tell(what, number, num_tasks)
        except BrokenProcessPool:
            raise UserError("a worker process died, perhaps for lack of memory; try again with --workers 1") from None


def _tell(what: str, done: int, total: int) -> None:
    """A line at every tenth of a long way."""
    if total >= 100 and done * 10 // total > (done - 1) * 10 // total:
        logger.info("%s: %d %%", what, done * 100 // total)


# ---- the command


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the command, `validate` in front."""
    parser = argparse.ArgumentParser(
        prog="python -m stage2_llava.instructions",
        description="Instruction data of stage 2.",
        epilog="`validate --help` says more.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="validate")
    command = commands.add_parser(
        "validate",
        description=__doc__,
        help="check instruction data before training on them",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("data", nargs="+", metavar="DATA", help="LLaVA JSON or JSONL files or WebDataset tars")
    command.add_argument("--images", nargs="+", default=[], metavar="ROOT", help="folders and tars with the images")
    command.add_argument("--llm", metavar="DIR", help="tokenize with this language model: directory or Hugging Face id")
    command.add_argument("--template", default="auto", choices=("auto", "vicuna_v1", "chatml"))
    command.add_argument("--max-length", type=_positive, default=2048, metavar="N", help="tokens of a sample (2048)")
    command.add_argument("--image-tokens", type=_positive, default=576, metavar="N", help="tokens of an image (576)")
    command.add_argument("--workers", type=_positive, metavar="N", help="processes (one per CPU)")
    command.add_argument("--report", type=Path, metavar="FILE.json", help="write all problems there")
    command.add_argument("--drop-missing", type=Path, metavar="OUT.json", help="write the good samples there")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    return run_main(lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    if arguments.drop_missing is not None:
        _check_free(arguments.drop_missing)
    if arguments.report is not None:
        _check_folder(arguments.report)
    lengths = None
    if arguments.llm is not None:
        lengths = Lengths(arguments.llm, arguments.template, arguments.max_length, arguments.image_tokens)
    found = validate(arguments.data, arguments.images, lengths=lengths, num_workers=arguments.workers)
    report = found.report()
    _print(report, found.problems)
    if arguments.report is not None:
        write_json_atomic(arguments.report, {"data": arguments.data, "images": arguments.images, **report})
        print(f"report: {arguments.report}")
    if arguments.drop_missing is not None:
        number = write_clean(arguments.data, found.broken, arguments.drop_missing)
        print(f"wrote {number:,} good samples: {arguments.drop_missing}")
    return 1 if found.problems else 0


def _print(report: dict[str, Any], problems: Sequence[Problem]) -> None:
    print(
        f"{report['num_samples']:,} samples, {report['num_good']:,} good; of those with sound records "
        f"{report['num_with_images']:,} have images ({report['num_images']:,} different ones) and "
        f"{report['num_text_only']:,} are text-only"
    )
    if report["num_system_turns"]:
        print(f"{report['num_system_turns']:,} samples have a system turn, which training ignores as LLaVA-1.5 does")
    if report["tokens"] is not None:
        print("tokens: " + ", ".join(f"{name} {value:,}" for name, value in report["tokens"].items()))
    for kind, count in report["counts"].items():
        print(f"{kind}: {count:,}")
        examples = [problem for problem in problems if problem.kind == kind][:_NUM_EXAMPLES]
        for problem in examples:
            print(f"  {problem}")
        if count > len(examples):
            print(f"  ... and {count - len(examples):,} more")
    if not problems:
        print("no problems")
