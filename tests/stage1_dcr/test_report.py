"""A run's page: every section from its files alone, what is missing named, numbers as in the files."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from stage1_dcr.report import main, read_lines, write_report
from stage1_dcr.report_plots import thinned

CONFIG = {"run": "test", "tower": "base/tower", "denoiser": "sd", "tower_steps": 40, "validation": "split"}
SECTIONS = (
    *("Validation", "Loss", "Cosines by diffusion time", "Gradient conflict", "Embeddings", "Drift by layer"),
    "Final evaluation: test against base",
)


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An unfinished run with every file that a page reads."""
    (tmp_path / "config.yaml").write_text(json.dumps({**CONFIG, "select": "best-validation"}))
    metrics = []
    for phase, steps in (("projector", 10), ("tower", 30)):
        for step in range(1, steps + 1):
            record = {"phase": phase, "step": step, "loss": 2.0 / step, "loss_view": 1.5 / step, "cos_view": 0.9}
            for low in range(0, 1000, 200):
                record |= {f"cos_{kind}@{low}-{low + 200}": 0.9 for kind in ("view", "target", "negative")}
            metrics.append(record)
    metrics[-1]["cos_view@0-200"] = math.nan  # no image of those steps had such a time
    write_lines(tmp_path / "metrics.jsonl", metrics)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "tower", "st')  # the running process is in the middle of a line
    values = {0: (20.0, 90.0), 10: (30.0, 89.0), 20: (23.0, 88.0), 30: (22.0, 87.0)}
    counts = {"num_pairs": 900, "num_images": 1000}
    lines = [{"step": step, "pairs": pairs, "zero_shot": zero, **counts} for step, (pairs, zero) in values.items()]
    write_lines(tmp_path / "validation.jsonl", lines)
    looks = [
        {
            "step": step,
            "conflict": {"cosine": cosine, "dot": 1.0, "norm_contrastive": 1.0, "norm_reconstruction": 1.0},
            **{name: {"base": 1.0, "tower": 0.5} for name in ("effective_rank", "uniformity", "alignment")},
            "drift": {"class": [None, 0.1, 0.2], "patches": [0.0, 0.1, 0.2]},
        }
        for step, cosine in ((0, None), (10, -0.2), (20, 0.1), (30, -0.3), (40, -0.1))
    ]
    write_lines(tmp_path / "diagnostics.jsonl", looks)
    measure = {"base": 20.0, "tower": 28.04, "difference": 8.04, "interval": [5.0, 11.0], "p_holm": 0.001}
    comparison = {
        "measures": {"mmvp_vlm": measure, "nmi": {**measure, "tower": 61.7}},
        "drift": None,
        "cautions": ["x"],
    }
    result = {"settings": {"baseline": "base"}, "comparisons": {"test": comparison}}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "tower_evaluation.json").write_text(json.dumps(result))
    return tmp_path


class Page(HTMLParser):
    """Headings, texts and what a page would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.headings: list[str] = []
        self.num_plots = 0
        self.fetched: list[str] = []
        self.words = ""
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.num_plots += tag == "svg"
        links = [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        self.fetched += [link for link in links if not link.startswith(("#", "data:"))]

    def handle_data(self, data: str) -> None:
        if self._tag == "h2" and data.strip():
            self.headings.append(data.strip())
        self.words += f" {data}"


def read(file: Path) -> Page:
    return Page(file.read_text(encoding="utf-8"))


def test_page_of_a_whole_run(run: Path) -> None:
    page = read(write_report(run))
    assert page.headings == [*SECTIONS, "Configuration"]
    assert page.num_plots == 2 + 2 + 1 + 1 + 3 + 2
    assert not page.fetched
    words = " ".join(page.words.split())
    assert "Step 10 has 30.0 % of 900 pairs, +10.0 points" in words and "a peak in the middle" in words
    assert "3 of 4 looks (75 %)" in words
    assert "8.0 (+5.0 to +11.0)" in words and "61.7" in words
    assert "step 30 of 40 of the tower phase" in words
    for row in ("base 20.0 90.0 –", "10 30.0 89.0 1.0", "30 22.0 87.0 3.0"):
        assert row in words


@pytest.fixture
def validated(run: Path) -> Path:
    """The same with its validation alone, which makes a page fast."""
    for name in ("metrics.jsonl", "diagnostics.jsonl", "evaluation/tower_evaluation.json"):
        (run / name).unlink()
    return run


def test_final_step_beyond_the_margin_is_a_warning(validated: Path) -> None:
    (validated / "config.yaml").write_text(json.dumps(CONFIG))
    page = write_report(validated).read_text(encoding="utf-8")
    assert re.search(r'verdict worse">\s*<strong>Zero-shot: 90.0 % to 87.0 %', page)
    assert "within noise of it" in page


def test_run_with_nothing_but_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({**CONFIG, "tower": "<b>tower</b>"}))
    page = write_report(tmp_path)
    assert read(page).headings == ["Not in this run", "Configuration"]
    for setting in ("validation", "log_every", "objective", "diagnose_every", "evaluate"):
        assert setting in read(page).words
    assert "<b>" not in page.read_text() and "&lt;b&gt;" in page.read_text()


def test_only_pairs_or_only_labelled_images(validated: Path) -> None:
    lines = read_lines(validated / "validation.jsonl")
    (validated / "config.yaml").write_text(json.dumps(CONFIG))
    for name, count in (("pairs", "num_pairs"), ("zero_shot", "num_images")):
        write_lines(validated / "validation.jsonl", [{**line, name: None, count: 0} for line in lines])
        assert read(write_report(validated)).num_plots == 1


def test_long_curves_are_thinned_to_means() -> None:
    x, y = thinned(range(1000), [number % 2 for number in range(1000)])
    assert len(x) == len(y) == 200 and x[0] == 2.0  # of five neighbours each
    assert sum(y) / len(y) == pytest.approx(0.5)
    assert thinned([1, 2], [3.0, 4.0]) == ([1.0, 2.0], [3.0, 4.0])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG))
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_readable_in_a_browser(run: Path, tmp_path: Path, scheme: str) -> None:
    from tests.dcr_mllm.evaluation.test_report_in_browser import CHROMIUM, look

    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: the page is not looked at")
    (run / "config.yaml").write_text(json.dumps({**CONFIG, "tower": "/a/very/long/path/without/a/gap" * 5}))
    widths, messages = look(write_report(run).read_text(encoding="utf-8"), tmp_path, scheme)
    assert messages == []
    for width, found in widths.items():
        assert found["dark"] == (scheme == "dark") and found["texts"] > 150
        assert found["scrollWidth"] <= width and found["scrolled"] == 0
        assert found["cut"] == found["faint"] == found["fetched"] == []
