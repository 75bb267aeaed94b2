"""The three-seed comparison: which towers it trains, its gains and its verdict, on made-up evaluations."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "miniature_seeds.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("miniature_seeds", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluation(gained: int, lost: int, num_seeds: int = 3) -> dict:
    """900 pairs of which 300 are right before; a tower wins `gained` of the others and loses `lost` of 3000 images."""
    pairs = np.arange(900) < 300
    images = np.ones(3000, dtype=bool)

    def tower(pairs: np.ndarray, images: np.ndarray) -> dict:
        per_pattern = {"Texts": {"accuracy": 100 * float(pairs.mean())}}
        return {
            "mmvp_vlm": {"pairs": pairs.tolist(), "per_pattern": per_pattern},
            "zero_shot": {"correct": images.tolist()},
            "knn": {"correct": images.tolist()},
        }

    def measure(before: np.ndarray, after: np.ndarray) -> dict:
        base, new = 100 * float(before.mean()), 100 * float(after.mean())
        return {"base": base, "tower": new, "difference": new - base, "interval": [new - base - 1, new - base + 1]}

    better, worse = pairs.copy(), images.copy()
    better[300 : 300 + gained] = True
    worse[:lost] = False
    towers, comparisons = {"base": tower(pairs, images)}, {}
    for seed in range(num_seeds):
        towers[f"seed {seed}"] = tower(better, worse)
        measures = {"mmvp_vlm": measure(pairs, better), "zero_shot": measure(images, worse)}
        measures["knn"] = measures["zero_shot"]
        for name in ("probes_mean", "nmi"):
            measures[name] = {**measure(images, images), "draws": np.zeros(10_000).tolist()}
        comparisons[f"seed {seed}"] = {"measures": measures}
    return {"towers": towers, "comparisons": comparisons}


@pytest.mark.parametrize(
    ("gained", "lost", "word", "ending"),
    [
        (45, 0, "was raised", "kept within 2 points."),
        (0, 0, "was not detectably changed", "kept within 2 points."),
        (45, 90, "was raised", "not shown to keep: zero_shot, knn."),
    ],
)
def test_verdict_says_what_the_intervals_say(script, gained: int, lost: int, word: str, ending: str) -> None:
    gains, verdict = script.summarise(evaluation(gained, lost), ["seed 0", "seed 1", "seed 2"])
    assert word in verdict and verdict.endswith(ending) and "900 pairs" in verdict and "3 seeds" in verdict
    assert gains["mmvp_vlm"]["mean"] == pytest.approx(100 * gained / 900)
    assert gains["zero_shot"]["mean"] == pytest.approx(-100 * lost / 3000)


def test_fewer_pairs_are_called_lowered(script) -> None:
    swapped = evaluation(45, 0)
    swapped["towers"]["base"], swapped["towers"]["seed 0"] = swapped["towers"]["seed 0"], swapped["towers"]["base"]
    _, verdict = script.summarise(swapped, ["seed 0"])
    assert "was lowered" in verdict


def test_command_trains_every_seed_and_writes_what_it_prints(script, monkeypatch, tmp_path: Path, capsys) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(script.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(script, "write_benchmarks", lambda directory, split: directory)
    seen: dict[str, object] = {}

    def evaluate(towers, mmvp_vlm, labelled):
        seen.update(towers)
        return evaluation(45, 0, num_seeds=len(towers) - 1)

    monkeypatch.setattr(script, "evaluate_towers", evaluate)
    out = tmp_path / "results" / "table.json"
    arguments = ["--seeds", "0", "1", "--jobs", "2", "--runs-dir", str(tmp_path), "--out", str(out), "tau=0.05"]
    assert script.main(arguments) == 0
    assert sorted(command[-4] for command in commands) == ["runs_dir=" + str(tmp_path)] * 2
    assert {command[-3] for command in commands} == {"seed=0", "seed=1"}
    assert all(command[-2:] == ["evaluate=false", "tau=0.05"] for command in commands)
    assert seen["seed 1"] == tmp_path / "mini-seed1" / "tower"
    result = json.loads(out.read_text())
    assert [entry["seed"] for entry in result["seeds"]] == [0, 1]
    assert result["seeds"][0]["measures"]["mmvp_vlm"]["base"] == pytest.approx(33.33, abs=0.01)
    printed = capsys.readouterr().out
    assert result["verdict"] in printed and "| mmvp_vlm | 33.3 | 38.3 | 38.3 | +5.0 [" in printed
