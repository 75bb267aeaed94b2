"""The ablation: cells that run once whatever is killed, tables from records alone, statistics, and verdicts by rule."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.compare import Items, Measured, compare
from dcr_mllm.evaluation.statistics import seeds_and_items_bootstrap
from dcr_mllm.runs import write_json_atomic
from scripts import ablate
from scripts.ablation import comparing, llavas, running
from scripts.ablation.grid import OBJECTIVES, Cell, check_names, main_cells, plan, sweep_cells
from scripts.ablation.records import (
    diagnosed,
    measured,
    pack_bits,
    pack_draws,
    read_records,
    unpack_bits,
    unpack_draws,
    write_record,
)
from scripts.ablation.running import Workshop
from scripts.ablation.verdicts import verdicts
from tests.processes import clean_environment, kill_when_there, run_to_end

PATTERNS = ("Texts", "Quantity")


def evaluation(seed: int, gained: int = 4, num_pairs: int = 40, num_images: int = 60) -> dict[str, Any]:
    """What the evaluation of a tower writes, made up: the base is always the same."""

    def tower(rng: np.random.Generator, pairs: np.ndarray) -> Measured:
        correct = {name: (rng.random(num_images) < 0.8).astype(float) for name in ("zero_shot", "knn", "probe:text")}
        clusters = rng.integers(4, size=(2, num_images))
        per_pattern = {
            name: {"accuracy": 100 * float(part.mean())}
            for name, part in zip(PATTERNS, np.split(pairs, 2), strict=True)
        }
        report = {name: {"correct": [int(value) for value in correct[name]]} for name in ("zero_shot", "knn")}
        report["mmvp_vlm"] = {"pairs": [int(pair) for pair in pairs], "per_pattern": per_pattern}
        report["clustering"] = {name: {"mean": 90.0 + rng.random()} for name in ("nmi", "acc", "ari")}
        return Measured(
            description={"model_type": "clip"}, pairs=pairs, correct=correct, clusters=clusters, report=report
        )

    before = np.random.default_rng(0).random(num_pairs) < 0.4
    after = before.copy()
    after[np.flatnonzero(~before)[:gained]] = True
    base, new = tower(np.random.default_rng(1), before), tower(np.random.default_rng(100 + seed), after)
    items = Items(
        patterns=np.repeat(np.array(PATTERNS), num_pairs // 2), classes=np.random.default_rng(2).integers(4, size=60)
    )
    return {
        "settings": {"mmvp_vlm": {"sha256": {"Questions.csv": "q"}}, "labelled": {"sha256": {"labels.csv": "l"}}},
        "towers": {"base": base.report, "new": new.report},
        "comparisons": {"new": compare(base, new, items)},
    }


def record(objective: str = "dcr", seed: int = 0, gained: int = 4, **more: Any) -> dict[str, Any]:
    """A finished cell."""
    cell = {"objective": objective, "seed": seed, "changes": {}, "factor": None, **more}
    spent = {"tower": {"run": f"{objective}-{seed}-{more}", "started": 10.0 * seed, "ended": 10.0 * seed + 15}}
    norms = {"norm_contrastive": 0.3, "norm_reconstruction": 0.01}
    looks = [{"step": step, "conflict": {"cosine": cosine} | norms} for step, cosine in enumerate((-0.5, -0.1, 0.2))]
    return {
        "kind": "cell",
        "cell": cell,
        "split": "test",
        "overrides": [],
        "weights": {},
        **measured(evaluation(10 * OBJECTIVES.index(objective) + seed, gained)),
        "diagnostics": diagnosed([json.dumps(look) for look in looks]) if objective == "joint" else None,
        "spent": {"projector": None, **spent},
        "device": "CPU",
    }


def stand_in(command: list[str], log: Path, threads: int, keep_open: int | None = None) -> None:
    """In place of training and measuring: the files that these leave, and a line in a diary.

    The command whose name is in PAUSE says so in a file and waits to be killed.
    """
    words = dict(word.split("=", 1) for word in command if "=" in word)
    name = words.get("run") or f"measuring {Path(command[4]).parent.name}"
    diary = Path(os.environ["DIARY"])
    with diary.open("a") as file:
        file.write(name + "\n")
    if os.environ.get("PAUSE") and name.startswith(os.environ["PAUSE"]):
        diary.with_name("paused").touch()
        time.sleep(60)
    if "run" in words:
        run = Path(words["runs_dir"]) / name
        for folder in ("tower", "projector", "checkpoints"):
            (run / folder).mkdir(parents=True)
        (run / "finished.json").write_text("{}")
        if "objective" in words and "projector" in words:
            assert (Path(words["projector"]).parent / "finished.json").is_file(), "the projector comes first"
    else:
        found = evaluation(len(diary.read_text()))
        Path(command[-1]).mkdir(exist_ok=True)
        write_json_atomic(Path(command[-1]) / "tower_evaluation.json", found)


def drive(arguments: list[str]) -> int:
    """The command with stand-ins for what takes long."""
    running.call = stand_in
    running.write_benchmarks = lambda directory, split: directory
    running.device = lambda: "stand-in"
    return ablate.main(arguments)


def test_a_killed_ablation_repeats_no_finished_cell(tmp_path: Path, capsys: pytest.CaptureFixture):
    argv = [sys.executable, "-c", "import sys; from tests.test_ablate import drive; sys.exit(drive(sys.argv[1:]))"]
    argv += ["--objectives", "dcr", "joint", "contrastive", "--seeds", "0", "--only", "main", "--jobs", "1"]
    argv += ["--out", str(tmp_path / "records"), "--runs-dir", str(tmp_path / "runs"), "tower_steps=2"]
    environment = {**clean_environment(), "DIARY": str(tmp_path / "diary")}
    kill_when_there(argv, {**environment, "PAUSE": "measuring joint"}, tmp_path / "paused", tmp_path / "log")
    assert [file.name for file in (tmp_path / "records").glob("*.json")] == ["dcr-seed0.json"]
    first = (tmp_path / "records" / "dcr-seed0.json").stat().st_mtime_ns

    run_to_end(argv, environment)
    names = [line.rsplit("-", 1)[0] for line in (tmp_path / "diary").read_text().splitlines()]
    assert names == [
        *("projector-dcr-seed0", "projector-reconstruction-seed0"),
        *("dcr-seed0", "measuring dcr-seed0", "joint-seed0", "measuring joint-seed0"),
        *("measuring joint-seed0", "contrastive-seed0", "measuring contrastive-seed0"),
    ], "only what the kill interrupted comes twice"
    assert (tmp_path / "records" / "dcr-seed0.json").stat().st_mtime_ns == first
    finished = json.loads((tmp_path / "records" / "joint-seed0.json").read_text())
    assert finished["overrides"] == ["tower_steps=2"] and finished["settings"]["tower"]["tower_steps"] == 2
    run = next((tmp_path / "runs").glob("joint-*"))
    assert (run / "tower").is_dir() and not (run / "checkpoints").exists()
    assert str(tmp_path) not in (tmp_path / "records" / "joint-seed0.json").read_text(), "no paths of this machine"

    assert ablate.main([*argv[3:], "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "0 of 3 to do" in listed and "finished  joint-seed0" in listed


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.setenv("DIARY", str(tmp_path / "diary"))
    monkeypatch.setattr(running, "call", stand_in)
    monkeypatch.setattr(running, "write_benchmarks", lambda directory, split: directory)
    monkeypatch.setattr(running, "device", lambda: "stand-in")
    return Workshop(tmp_path / "records", tmp_path / "runs", "test", (), 1)


def test_a_record_of_other_settings_is_refused(shop: Workshop, capsys: pytest.CaptureFixture):
    cells = [Cell("dcr", 0)]
    assert running.run_cells(shop, cells) == [] and running.pending(shop, cells) == []
    arguments = ["--objectives", "dcr", "--seeds", "0", "--only", "main", "--out", str(shop.out)]
    arguments += ["--runs-dir", str(shop.runs_dir), "--jobs", "1", "tau=0.2"]
    assert ablate.main(arguments) == 2
    message = capsys.readouterr().err
    assert str(shop.out / "dcr-seed0.json") in message and "tau: 0.1 -> 0.2" in message and "--rerun" in message
    assert ablate.main([*arguments, "--rerun"]) == 0
    assert json.loads((shop.out / "dcr-seed0.json").read_text())["settings"]["tower"]["tau"] == 0.2
    with pytest.raises(UserError, match="split: validation -> test|split: test -> validation"):
        running.pending(Workshop(shop.out, shop.runs_dir, "validation", ("tau=0.2",), 1), cells)


def test_a_damaged_record_is_named(shop: Workshop):
    shop.out.mkdir()
    (shop.out / "dcr-seed0.json").write_text("{")
    with pytest.raises(UserError, match="dcr-seed0.json is no JSON"):
        running.pending(shop, [Cell("dcr", 0)])


def test_one_failing_cell_does_not_stop_the_others(shop: Workshop, monkeypatch: pytest.MonkeyPatch):
    def failing(command: list[str], *rest: Any) -> None:
        if "objective=contrastive" in command:
            raise running.CellFailed("no memory")
        stand_in(command, *rest)

    monkeypatch.setattr(running, "call", failing)
    failed = running.run_cells(shop, [Cell("contrastive", 0), Cell("dcr-end-to-end", 0)])
    assert failed == ["contrastive-seed0: no memory"]
    assert [file.stem for file in shop.out.glob("*.json")] == ["dcr-end-to-end-seed0"]


def test_a_process_left_behind_keeps_the_folder(tmp_path: Path):
    until = f"while [ ! -e {tmp_path / 'end'} ]; do sleep 0.02; done"
    entered = Event()

    def enter() -> None:
        with running.alone(tmp_path):
            entered.set()

    with running.alone(tmp_path):
        left = Thread(target=running.call, args=(["sh", "-c", until], tmp_path / "log", 1, running.held()))
        left.start()
        while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text():
            time.sleep(0.01)
        time.sleep(0.3)  # the shell has begun
    next_one = Thread(target=enter)
    next_one.start()
    assert not entered.wait(0.5), "what was left behind is at work"
    (tmp_path / "end").touch()
    assert entered.wait(20)
    left.join()
    next_one.join()


def test_a_failing_command_shows_its_last_words(tmp_path: Path):
    program = "import os; print('threads', os.environ['OMP_NUM_THREADS']); raise SystemExit(3)"
    with pytest.raises(running.CellFailed, match=r"(?s)status 3.*threads 7"):
        running.call([sys.executable, "-c", program], tmp_path / "log", 7)


def test_projectors_are_shared_where_nothing_about_them_differs():
    check_names([*main_cells(), *sweep_cells()])
    default = plan(Cell("dcr", 0))
    assert default.projector is not None and "projector_steps=0" in default.tower
    assert plan(Cell("dcr", 0, {"tau": 0.3})).projector == default.projector
    assert plan(Cell("dcr", 1)).projector != default.projector
    assert plan(Cell("joint", 0)).projector == plan(Cell("reconstruction", 0)).projector != default.projector
    other = plan(Cell("dcr", 0, {"condition": "class+pooled-patches"}))
    assert "condition=class+pooled-patches" in (other.projector or [])
    for objective in ("contrastive", "dcr-end-to-end"):
        assert plan(Cell(objective, 0)).projector is None
        assert "projector_steps=0" not in plan(Cell(objective, 0)).tower
    with pytest.raises(UserError, match="dcr-seed0 twice"):
        check_names([Cell("dcr", 0), Cell("dcr", 0)])


def test_bits_and_draws_come_back():
    rng = np.random.default_rng(0)
    bits, draws = rng.random(901) < 0.3, rng.normal(-44, 3, 2000)
    assert (unpack_bits(json.loads(json.dumps(pack_bits(bits)))) == bits).all()
    np.testing.assert_allclose(unpack_draws(pack_draws(draws)), draws, rtol=1e-6)


def test_a_record_stays_small(tmp_path: Path):
    big = {**record(), **measured(evaluation(1, num_pairs=900))}
    write_record(tmp_path, "dcr-seed0", big)
    assert (tmp_path / "dcr-seed0.json").stat().st_size < 20_000


def test_diagnostics_are_summed_up():
    conflict = {"norm_contrastive": 3.0, "norm_reconstruction": 0.2}
    looks = [
        {"step": 0, "conflict": None},
        {"step": 5, "conflict": {"cosine": None, "norm_contrastive": 0.5, "norm_reconstruction": 0.0}},
        {"step": 10, "conflict": conflict | {"cosine": -0.2}, "effective_rank": {"base": 9.0, "tower": 8.0}},
        {
            "step": 20,
            "conflict": {"cosine": 0.1, "norm_contrastive": 1.0, "norm_reconstruction": 0.4},
            "effective_rank": {"base": 9.0, "tower": 7.0},
            "drift": {"class": [None, 0.1, 0.3, 0.5], "patches": [0.0, 0.2, 0.4, 0.6]},
        },
    ]
    found = diagnosed([json.dumps(look) for look in looks])
    assert found is not None
    norms = found["conflict"].pop("norms")
    assert found["conflict"] == {"looks": 2, "negative": 1, "mean_cosine": pytest.approx(-0.05)}
    assert norms["contrastive"] == {"mean": pytest.approx(1.5), "min": 0.5, "max": 3.0}
    assert norms["reconstruction"] == {"mean": pytest.approx(0.2), "min": 0.0, "max": 0.4}
    assert found["effective_rank"]["tower"] == 7.0
    assert found["drift_at_llava_layer"] == {"class": 0.3, "patches": 0.4}
    assert diagnosed([]) is None
    quiet = diagnosed([json.dumps({"step": 1, "conflict": None, "drift": {"class": [0.0, None, None]}})])
    assert quiet is not None and quiet["conflict"] is None
    assert quiet["drift_at_llava_layer"] == {}


def test_gains_equal_the_bootstrap_over_seeds_and_items():
    records = [record(seed=seed, gained=gained) for seed, gained in enumerate((2, 5, 8))]
    found = comparing.over_seeds([comparing.change(entry, "pairs") for entry in records])
    deltas = [
        100 * (unpack_bits(e["items"]["pairs"]["tower"]).astype(float) - unpack_bits(e["items"]["pairs"]["base"]))
        for e in records
    ]
    expected = seeds_and_items_bootstrap(deltas)
    assert found["mean"] == pytest.approx(100 * 15 / 3 / 40) and found["per_seed"] == pytest.approx([5, 12.5, 20])
    assert found["interval"] == pytest.approx(expected["interval"])


def test_statistics_by_hand():
    base, new = np.array([1, 1, 1, 0, 0, 0, 0, 0]), np.array([0, 1, 1, 1, 1, 1, 1, 1])  # five gained, one lost
    entry = record()
    entry["items"]["pairs"] = {"base": pack_bits(base), "tower": pack_bits(new)}
    test = comparing.tested(entry, "pairs")
    p_value = 2 * sum(math.comb(6, k) for k in (0, 1)) / 2**6
    assert test == {"seed": 0, "p_value": pytest.approx(p_value), "gained": 5, "lost": 1}
    assert comparing.change(entry, "pairs")[0] == pytest.approx(50)
    # All draws above zero but 1 of 99: two-sided 2 * (1 + 1) / (99 + 1).
    assert comparing.bootstrap_p(np.array([-1.0] + [1.0] * 98)) == pytest.approx(0.04)
    assert comparing.union([(0, 2), (1, 3), (5, 6)]) == 4
    draws = [np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 30.0, 40.0])]
    entry["draws"] = {name: pack_draws(draws[1]) for name in ("nmi", "acc", "ari", "probes_mean")}
    entry["measures"]["nmi"]["difference"] = 6.0
    ability, drawn = comparing.change(entry, "d_ability")
    parts = [comparing.change(entry, name) for name in ("zero_shot", "knn")]
    assert ability == pytest.approx((parts[0][0] + parts[1][0] + 6) / 3)
    # The draws that are kept have a mean of 25, and move onto the difference.
    np.testing.assert_allclose(drawn, (parts[0][1][:4] + parts[1][1][:4] + draws[1] - 25 + 6) / 3)
    # Against another tower the base drops out.
    other = json.loads(json.dumps(entry))
    other["draws"]["nmi"], other["measures"]["nmi"]["difference"] = pack_draws(draws[1] - 1), 5.0
    value, drawn = comparing.change(entry, "nmi", other)
    assert value == pytest.approx(1) and drawn.tolist() == [1.0] * 4
    assert comparing.change(entry, "pairs", other)[0] == 0


def test_holm_over_objectives():
    gains = [{"pairs": {"p_value": p}} for p in (0.01, 0.04, 0.03)]
    comparing._adjust(gains)
    assert [entry["pairs"]["p_holm"] for entry in gains] == pytest.approx([0.03, 0.06, 0.06])


def test_tables_come_from_the_records_alone(tmp_path: Path, capsys: pytest.CaptureFixture):
    out, runs = tmp_path / "results" / "ablation", tmp_path / "runs"
    for seed in range(2):
        for number, objective in enumerate(OBJECTIVES):
            write_record(out, f"{objective}-seed{seed}", record(objective, seed, gained=number + 2 * seed))
    tried = record("dcr", 0, gained=7, changes={"tau": 0.3}, factor="temperature")
    write_record(out, "dcr-seed0-tau-0.3", tried)
    for tower, bits in (("base", [1, 0, 0, 0]), ("dcr", [1, 1, 1, 0])):
        arm = {
            "kind": "stage2",
            "arm": {"tower": tower, "seed": 0},
            "overrides": ["stage2.seed=3"],
            "settings": {"weights": {"llm": "a"}},
            "measures": dict.fromkeys(("mmvp_pairs", "mmvp_single", "heldout", "heldout_blind"), 100 * sum(bits) / 4),
            "items": {"mmvp_pairs": pack_bits(bits), "heldout": pack_bits(bits)},
            "spent": {"llava": {"run": tower, "started": 100.0, "ended": 130.0}},
            "device": "CPU",
        }
        write_record(out, f"stage2-{tower}-seed0", arm)
    runs.mkdir()
    shutil.rmtree(runs)
    arguments = ["--only", "tables", "--out", str(out), "--runs-dir", str(runs)]
    assert ablate.main(arguments) == 0 and not runs.exists()
    found = json.loads((tmp_path / "results" / "ablation.json").read_text())
    assert [(row["objective"], row["seed"]) for row in found["main"]] == [(o, s) for o in OBJECTIVES for s in (0, 1)]
    joint = next(row for row in found["main"] if row["objective"] == "joint" and row["seed"] == 1)
    assert joint["difference"]["pairs"] == pytest.approx(100 * 5 / 40)
    assert joint["pairs"] == pytest.approx(found["base"]["pairs"] + 12.5)
    assert found["summary"]["joint"]["gain"]["pairs"]["mean"] == pytest.approx(10)
    # joint gains 3 and 5 pairs, dcr 0 and 2.
    assert found["summary"]["joint"]["against_dcr"]["pairs"]["per_seed"] == pytest.approx([7.5, 7.5])
    assert found["summary"]["dcr"]["against_dcr"] is None
    assert found["diagnostics"]["joint"]["share_per_seed"] == pytest.approx([200 / 3] * 2)
    assert found["stage2"]["gain"]["dcr"]["mmvp_pairs"]["mean"] == pytest.approx(50)
    assert found["stage2"]["gain"]["dcr"]["mmvp_pairs"]["exact_tests"][0]["gained"] == 2
    assert found["sweeps"][0]["label"] == "tau=0.3"
    assert found["sweeps"][0]["against_default"]["pairs"]["mean"] == pytest.approx(100 * 7 / 40)
    # Two seeds' runs of 15 s overlap from 10 to 15, all objectives at once; the LLaVAs come later.
    assert found["time"]["wall_clock_seconds"] == 25 + 30
    assert found["time"]["process_seconds"] == 11 * 15 + 2 * 30
    assert found["command"] == "python scripts/ablate.py stage2.seed=3"
    assert len(found["verdicts"]) == 5 and all(entry["sentence"] for entry in found["verdicts"])
    page = (tmp_path / "results" / "ablation.html").read_text()
    assert len(page) < 200_000 and not re.search(r'(src|href)="(?!#)|url\((?!#)|@import', page)
    assert page.count("<svg") == 2 and "Beside the paper" in page
    text = (tmp_path / "results" / "ablation.md").read_text()
    assert "| joint | 1 |" in text and found["verdicts"][2]["sentence"] in text
    before = [(tmp_path / "results" / f"ablation.{end}").read_bytes() for end in ("json", "md", "html")]
    assert ablate.main(arguments) == 0
    assert [(tmp_path / "results" / f"ablation.{end}").read_bytes() for end in ("json", "md", "html")] == before
    capsys.readouterr()


def test_records_of_different_experiments_make_no_table(tmp_path: Path):
    with pytest.raises(UserError, match="no finished cell"):
        read_records(tmp_path)
    write_record(tmp_path, "a", record())
    write_record(tmp_path, "b", {**record(seed=1), "overrides": ["tower_steps=2"]})
    with pytest.raises(UserError, match="differ in overrides"):
        read_records(tmp_path)
    write_record(tmp_path, "b", record(seed=1))
    arm = {"kind": "stage2", "overrides": ["stage2.seed=3"], "settings": {"weights": {"llm": "a"}}}
    write_record(tmp_path, "c", arm)
    write_record(tmp_path, "d", {**arm, "settings": {"weights": {"llm": "b"}}})
    with pytest.raises(UserError, match="differ in weights"):
        read_records(tmp_path)


def gain(low: float, high: float) -> dict[str, Any]:
    return {"mean": (low + high) / 2, "interval": [low, high]}


def claims(
    *, order: tuple[dict, dict] | None = None, shares: list[float] | None = None, dcr: dict | None = None
) -> list[str]:
    measures = ("pairs", "d_ability", "zero_shot", "knn", "nmi", "probes_mean")
    contrasts = [{"worse": "a", "better": "b", "gain": {"pairs": g, "nmi": g}} for g in order or ()]
    seen = None
    if shares is not None:
        seen = {"looks": 100, "negative": 60, "share_per_seed": shares, "mean_cosine": -0.1}
    summary = {name: {"gain": {m: gain(-2, -1) for m in measures}} for name in ("dcr", "reconstruction")}
    summary["dcr"]["gain"] |= dcr or {}
    found = verdicts({"summary": summary, "contrasts": contrasts, "diagnostics": {"joint": seen}})
    return [entry["verdict"] for entry in found]


def test_verdicts_follow_their_rules():
    up, down, unsure = gain(1, 2), gain(-2, -1), gain(-1, 2)
    assert claims()[:3] == ["not run"] * 3
    assert claims(order=(up, up))[:2] == ["holds", "holds"]
    assert claims(order=(up, unsure))[0] == "cannot be told"
    assert claims(order=(unsure, down))[0] == "does not hold"
    assert claims(shares=[86.0, 51.0])[2] == "holds"
    assert claims(shares=[86.0, 50.0])[2] == "cannot be told"
    assert claims(shares=[40.0, 49.0])[2] == "does not hold"
    assert claims()[3] == "holds", "reconstruction lowers D-Ability here"
    assert claims(dcr={"pairs": up, "d_ability": up})[4] == "holds"
    assert claims(dcr={"pairs": up, "d_ability": unsure})[4] == "cannot be told"
    assert claims(dcr={"pairs": up, "d_ability": down})[4] == "does not hold"
    sentence = verdicts(
        {"summary": {"dcr": {"gain": dict.fromkeys(comparing.GAINS, up)}}, "contrasts": [], "diagnostics": {}}
    )
    assert sentence[4]["sentence"].startswith("Holds here: P-Ability (pairs) +1.50 [+1.00, +2.00]")
    assert sentence[3]["verdict"] == "not run"


def test_llavas_of_the_base_and_the_main_objectives(shop: Workshop):
    assert [arm.name for arm in llavas.arms(["dcr", "joint"], [0, 1])] == [
        *("stage2-base-seed0", "stage2-dcr-seed0", "stage2-base-seed1", "stage2-dcr-seed1")
    ]
    arm, other = llavas.Arm("dcr", 0), ["stage2.align.max_steps=2"]
    settings = llavas.settings_of(arm, llavas.plan_of(shop, arm), other)
    assert settings["stage2"]["align"]["max_steps"] == 2 and settings["stage2"]["seed"] == 0
    write_record(shop.out, arm.name, {"kind": "stage2", "settings": settings})
    assert llavas.pending_arms(shop, [arm, llavas.Arm("base", 0)], other) == [llavas.Arm("base", 0)]
    with pytest.raises(UserError, match=r"stage2-dcr-seed0.json.*align.max_steps: 2 -> 260"):
        llavas.pending_arms(shop, [arm], [])


def test_answers_of_a_llava_are_kept_pair_by_pair(tmp_path: Path):
    run, answers = tmp_path / "run", tmp_path / "answers"
    entry = {"accuracy": 50.0, "blind": 25.0}
    write_json_atomic(
        (run / "heldout.json") if run.mkdir() is None else run,
        {"llavas": {"dcr": entry}, "records": [{"id": 1, "dcr": True}, {"id": 2, "dcr": False}]},
    )
    folder = answers / "answers" / "dcr"
    folder.mkdir(parents=True)
    lines = [json.dumps({"index": k, "right": right}) for k, right in enumerate((True, True, True, False))]
    (folder / "mini-mmvp.jsonl").write_text("\n".join(lines))
    scores = {"dcr": {"mini-mmvp": {"measures": {"pair_accuracy": 50.0, "accuracy": 75.0}}}}
    write_json_atomic(answers / "results.json", {"scores": scores})
    found = llavas.read_answers(run, answers)
    assert unpack_bits(found["items"]["mmvp_pairs"]).tolist() == [True, False]
    assert unpack_bits(found["items"]["heldout"]).tolist() == [True, False]
    assert found["measures"] == {"mmvp_pairs": 50.0, "mmvp_single": 75.0, "heldout": 50.0, "heldout_blind": 25.0}


@pytest.mark.slow
def test_real_cells_survive_a_kill(tmp_path: Path):
    argv = [sys.executable, str(ablate.REPOSITORY / "scripts/ablate.py"), "--objectives", "dcr", "reconstruction"]
    argv += ["--seeds", "0", "--only", "main", "--jobs", "1", "--out", str(tmp_path / "records")]
    argv += ["--runs-dir", str(tmp_path / "runs"), "tower_steps=2", "projector_steps=2"]
    records = tmp_path / "records"
    kill_when_there(argv, clean_environment(), records / "dcr-seed0.json", tmp_path / "log")
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/finished.json")}
    assert len(stamps) >= 3
    first = (records / "dcr-seed0.json").read_bytes()
    run_to_end(argv, clean_environment())
    assert (records / "reconstruction-seed0.json").is_file()
    assert (records / "dcr-seed0.json").read_bytes() == first
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items())
