"""Which step of the tower phase is exported, and how sure one may be of it: from `validation.jsonl` alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcr_mllm.errors import UserError
from dcr_mllm.runs import write_text_atomic

if TYPE_CHECKING:
    from stage1_dcr.config import Stage1Config

VALIDATION_FILE = "validation.jsonl"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The tower after a step, on the validation split.

    Attributes:
        step: Optimizer step of the tower phase; 0 is the base tower.
        pairs: Percent of the pairs of which both images were named; None without pairs.
        zero_shot: Percent of the images whose class was named; None without labelled images.
        num_pairs: How many pairs, 0 without.
        num_images: How many labelled images, 0 without.
    """

    step: int
    pairs: float | None
    zero_shot: float | None
    num_pairs: int
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The step that is exported.

    Attributes:
        rule: `select` of the config.
        margin: `zero_shot_margin` of the config.
        base: The base tower.
        chosen: The step.
        within_margin: False where no measured step kept zero-shot accuracy within the margin.
    """

    rule: str
    margin: float
    base: Measurement
    chosen: Measurement
    within_margin: bool


def read_measurements(run: Path) -> list[Measurement]:
    """The lines of a run's `validation.jsonl` in the order of their steps; none if there is no such file.

    Raises:
        UserError: A line is damaged.
    """
    file = run / VALIDATION_FILE
    if not file.is_file():
        return []
    try:
        found = [Measurement(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{file} has a damaged line ({error}); take the line out, or delete the run to train anew."
        ) from None
    return sorted(found, key=lambda measurement: measurement.step)


def write_measurements(run: Path, measurements: Sequence[Measurement]) -> None:
    """Write them all, atomically; there are few."""
    lines = [json.dumps(dataclasses.asdict(measurement)) + "\n" for measurement in measurements]
    write_text_atomic(run / VALIDATION_FILE, "".join(lines))


def zero_shot_loss(base: Measurement, measurement: Measurement) -> float:
    """Points of zero-shot accuracy lost against the base, negative for a gain; 0 where it was not measured."""
    if base.zero_shot is None or measurement.zero_shot is None:
        return 0.0
    return round(base.zero_shot - measurement.zero_shot, 6)  # else 64.4 - 62.4 is more than 2


def choose(measurements: Sequence[Measurement], rule: str, margin: float) -> Choice | None:
    """The step to export.

    `best-validation`: most pairs among the steps that lost at most `margin` points of zero-shot accuracy; if there is
    none, the step that lost least. Of equals the earlier one. Step 0, the base, is not among them. `final`: the last.

    Args:
        measurements: In the order of their steps, the base first.
        rule: `select` of the config.
        margin: `zero_shot_margin` of the config.

    Returns:
        None where nothing but the base was measured.
    """
    if len(measurements) < 2:
        return None
    base, *steps = measurements
    kept = [step for step in steps if zero_shot_loss(base, step) <= margin]
    if rule == "final":
        chosen = steps[-1]
    elif kept:
        chosen = max(kept, key=lambda step: step.pairs or 0.0)
    else:
        chosen = min(steps, key=lambda step: zero_shot_loss(base, step))
    return Choice(rule=rule, margin=margin, base=base, chosen=chosen, within_margin=chosen in kept)


def selected(config: Stage1Config, run: Path) -> dict[str, Any]:
    """For the provenance of the exported tower: its step, the rule that chose it, and what was measured."""
    choice = choose(read_measurements(run), config.select, config.zero_shot_margin)
    if choice is None:
        return {"step": config.tower_steps, "rule": "final"}
    return {
        "step": choice.chosen.step,
        "rule": choice.rule,
        "zero_shot_margin": choice.margin,
        "validation": dataclasses.asdict(choice.chosen),
        "base": dataclasses.asdict(choice.base),
    }


def selected_words(record: dict[str, Any]) -> str:
    """The record of `selected` as a person reads it."""
    text = f"step {record['step']}, {record['rule']}"
    if "validation" not in record:
        return text
    chosen, base = record["validation"], record["base"]
    for name, what in (("pairs", f"{chosen['num_pairs']} validation pairs"), ("zero_shot", "zero-shot on validation")):
        if chosen[name] is not None:
            text += f"; {what}: {chosen[name]:.1f} % (base {base[name]:.1f} %)"
    return text


def loss_warning(base: Measurement, measurement: Measurement, margin: float) -> str | None:
    """A sentence where a step lost more zero-shot accuracy than the margin allows."""
    loss = zero_shot_loss(base, measurement)
    if loss <= margin:
        return None
    return (
        f"zero-shot accuracy on the validation split is {measurement.zero_shot:.1f} % at step {measurement.step} of "
        f"the tower phase, {loss:.1f} points below the base tower's, more than zero_shot_margin {margin:g}"
    )


def standard_error(measurement: Measurement) -> float:
    """Binomial standard error of the share of pairs, in points."""
    share = (measurement.pairs or 0.0) / 100
    return 100 * math.sqrt(share * (1 - share) / measurement.num_pairs)


def trajectory(measurements: Sequence[Measurement], choice: Choice) -> str:
    """A sentence on where the chosen step lies on the curve of pairs: in the noise, on a plateau, a peak, or the end.

    Two steps count as different where they lie more than two binomial standard errors of the chosen step apart. That
    is cautious: the pairs are the same for all steps, so differences between steps are less noisy than each.
    """
    chosen, base, steps = choice.chosen, choice.base, measurements[1:]
    if chosen.pairs is None or base.pairs is None:
        return "There are no validation pairs, so nothing is said about where pairs are best."
    noise = 2 * standard_error(chosen)
    gain, last = chosen.pairs - base.pairs, steps[-1]
    where = (
        f"Step {chosen.step} has {chosen.pairs:.1f} % of {chosen.num_pairs} pairs, {gain:+.1f} points against the base"
    )
    rule = f"two binomial standard errors, {noise:.1f} points"
    if abs(gain) <= noise:
        return f"{where}: within noise of it ({rule})."
    best = max(steps, key=lambda step: step.pairs or 0.0)
    if chosen == last:
        end = f"{where}, more than {rule}; it is the last step"
        if best.pairs is not None and best.pairs - chosen.pairs > noise:
            return f"{end}, and step {best.step} had {best.pairs:.1f} %: the peak lay before it."
        return f"{end}, so more steps might change it further."
    if last.pairs is not None and last.pairs - chosen.pairs > noise:
        return (
            f"{where}, more than {rule}; the last step, {last.step}, names more ({last.pairs:.1f} %), but lost more "
            f"zero-shot accuracy than zero_shot_margin {choice.margin:g} allows."
        )
    if last.pairs is not None and chosen.pairs - last.pairs > noise:
        return f"{where}, more than {rule}; a peak in the middle: the last step, {last.step}, has {last.pairs:.1f} %."
    return (
        f"{where}, more than {rule}; it lies before the end, but the last step, {last.step}, is within noise of it "
        f"({last.pairs:.1f} %): a plateau, not a peak."
    )
