"""The page of a stage 1 run: what it lost, what it gained, and whether the exported step can be believed.

    python -m stage1_dcr.report RUNS_DIR/RUN

Written at the end of stage 1, and by this command at any time, also while a run trains. It reads the run's own files
alone, and is one HTML file without a single request to elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr_mllm.cli import run_main
from dcr_mllm.config import load_config
from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.report import page_environment
from dcr_mllm.runs import CONFIG_FILE, write_text_atomic
from stage1_dcr.config import Stage1Config
from stage1_dcr.report_sections import (
    Section,
    conflict_section,
    cosine_section,
    drift_section,
    embedding_section,
    evaluation_section,
    loss_section,
    validation_section,
)
from stage1_dcr.selection import (
    Choice,
    Measurement,
    choose,
    loss_warning,
    read_measurements,
    standard_error,
    trajectory,
)

REPORT_FILE = "report.html"


@dataclass(kw_only=True)
class _Box:
    """What a reader sees first: `kind` colours it."""

    title: str
    text: str
    kind: str = ""


def write_report(run: Path) -> Path:
    """Write a run's `report.html`; returns it.

    Raises:
        UserError: The folder is no run of stage 1.
    """
    config_file = run / CONFIG_FILE
    if not config_file.is_file():
        raise UserError(f"{run} holds no {CONFIG_FILE}, so it is no run; give RUNS_DIR/RUN of stage 1")
    config = load_config(Stage1Config, config_file, [])
    page = (
        page_environment(Path(__file__).parent / "templates").get_template("run.html.jinja").render(_page(run, config))
    )
    write_text_atomic(run / REPORT_FILE, page)
    return run / REPORT_FILE


def _page(run: Path, config: Stage1Config) -> dict[str, Any]:
    metrics = read_lines(run / "metrics.jsonl")
    looks = read_lines(run / "diagnostics.jsonl")
    measurements = read_measurements(run)
    choice = choose(measurements, config.select, config.zero_shot_margin)
    evaluation = run / "evaluation" / "tower_evaluation.json"
    result = json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else None
    found: list[Section | str] = [
        validation_section(measurements, choice),
        loss_section(metrics),
        cosine_section(metrics),
        conflict_section(looks),
        embedding_section(looks),
        drift_section(looks),
        evaluation_section(result),
    ]
    return {
        "title": f"{config.run}: stage 1, {config.objective}",
        "subtitle": f"{config.tower} with {config.denoiser}. {_state(run, config, metrics)}.",
        "boxes": _boxes(measurements, choice),
        "sections": [part for part in found if isinstance(part, Section)],
        "missing": [part for part in found if isinstance(part, str)],
        "config": (run / CONFIG_FILE).read_text(encoding="utf-8"),
    }


def _state(run: Path, config: Stage1Config, metrics: list[dict[str, Any]]) -> str:
    if (run / ("tower" if config.tower_steps else "projector")).is_dir():
        return "Trained to its end"
    if not metrics:
        return "Not finished: nothing is logged yet"
    phase, step = metrics[-1]["phase"], metrics[-1]["step"]
    return f"Not finished: step {step} of {config.steps_of(phase)} of the {phase} phase"


def _boxes(measurements: list[Measurement], choice: Choice | None) -> list[_Box]:
    """The verdicts on the chosen step."""
    if choice is None:
        return [_Box(title="Nothing was measured on a validation split", text="Set validation to see what is lost.")]
    base, chosen = choice.base, choice.chosen
    boxes = []
    if base.pairs is not None and chosen.pairs is not None:
        gain = chosen.pairs - base.pairs
        seen = abs(gain) > 2 * standard_error(chosen)
        boxes.append(
            _Box(
                title=f"Pairs: {base.pairs:.1f} % to {chosen.pairs:.1f} %",
                text=trajectory(measurements, choice),
                kind=("better" if gain > 0 else "worse") if seen else "",
            )
        )
    if base.zero_shot is not None and chosen.zero_shot is not None:
        warning = loss_warning(base, chosen, choice.margin)
        kept = f"step {chosen.step} is within zero_shot_margin, {choice.margin:g} points"
        boxes.append(
            _Box(
                title=f"Zero-shot: {base.zero_shot:.1f} % to {chosen.zero_shot:.1f} %",
                text=_sentence(warning or kept),
                kind="worse" if warning else "",
            )
        )
    return boxes


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, none if it is not there; one that a running process has not ended is left out."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m stage1_dcr.report", description="Write a run's report.html.")
    parser.add_argument("run", type=Path, metavar="RUNS_DIR/RUN", help="a run of stage 1, finished or not")
    options = parser.parse_args(argv)

    def call() -> None:
        print(write_report(options.run))

    return run_main(call)


if __name__ == "__main__":
    sys.exit(main())
