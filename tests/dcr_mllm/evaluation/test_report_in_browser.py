"""The report in headless Chromium, wide and narrow, light and dark: nothing cut, nothing unreadable, nothing fetched.

A copy of the page gets a script that looks at it and hands its findings to the page around it. That page shows it in a
frame of the wanted width, because Chromium's own window is never narrower than 500 px.
"""

from __future__ import annotations

import functools
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from dcr_mllm.evaluation.mllm_data import TaskData
from dcr_mllm.evaluation.mllm_tasks import mmvp_item, pope_item
from dcr_mllm.evaluation.report import write_report
from dcr_mllm.evaluation.scorers import POPE_CATEGORIES, score_mme, score_mmvp, score_pope
from dcr_mllm.evaluation.verdicts import add_verdicts, compare_task

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH: the report is not looked at"
)

WIDTHS = (1280, 390)
MODELS = (
    "llava-1.5-7b-openai-clip-vit-large-patch14-336-baseline",
    "llava-1.5-7b-dcr-enhanced-phase2-lora128-seed3",
    "großes_Modell_с_кириллицей_und_einem_sehr_langen_Namen",
)
PATTERNS = (
    *("Orientation and Direction", "Presence of Specific Features", "State and Condition", "Quantity and Count"),
    *("Positional and Relational Context", "Color and Appearance", "Structural and Physical Characteristics"),
    *("Texts", "Viewpoint and Perspective"),
)
QUESTIONS = (
    "Is the dog facing left or right?",
    "In this picture, which was taken from a considerable distance, can one see the shadow of the person who stands "
    "behind the second of the three parked vehicles, or is it hidden by the hedge?",
    "Какая буква рядом с кругом? 円の隣の文字は何ですか？ 🐕‍🦺",
)
ANSWERS = (
    "<script>console.error('an answer was run')</script>",
    "The animal in the foreground is, as far as this can be told from the angle at which it was photographed, facing "
    "to the left-hand side of the picture, so that the answer has to be the first option.",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2,
    "الكلب يتجه إلى اليسار ← 左を向いています 🐕",
    "",
)


def write_page(out: Path, models: tuple[str, ...]) -> None:
    """A report on synthetic answers to MMVP, POPE and MME; all that these tests know of `write_report`."""
    rng = np.random.default_rng(0)
    rows = {"mmvp": mmvp_rows(rng), "pope": pope_rows(), "mme": mme_rows()}
    scorers: dict[str, Any] = {"mmvp": score_mmvp, "pope": score_pope, "mme": score_mme}
    item: dict[str, Any] = {"mmvp": mmvp_item, "pope": pope_item, "mme": lambda row, answer: {**row, "answer": answer}}
    items = {
        model: {task: [item[task](row, answer(row, 0.4 + 0.2 * k, rng)) for row in rows[task]] for task in rows}
        for k, model in enumerate(models)
    }
    scored = {m: {task: scorers[task](found) for task, found in tasks.items()} for m, tasks in items.items()}
    first, *others = models
    comparisons = {m: {task: compare_task([scored[first][task]], [scored[m][task]]) for task in rows} for m in others}
    for comparison in comparisons.values():
        add_verdicts(comparison)
    results = {
        "config": {
            "models": {model: f"/data/checkpoints/2025/{model}/stage2/llava" for model in models},
            "groups": {model: [model] for model in models},
            "model_hashes": {model: "0123456789abcdef" * 4 for model in models},
            "data": "/data/benchmarks/public",
            "batch_size": 32,
            "device": "cuda",
            "limit": None,
        },
        "decoding": "greedy",
        "conditions": {
            model: {"precision": "bfloat16", "template": "a" * 16, "image_padding": "pad", "data": {"mmvp": "b" * 64}}
            for model in models
        },
        "notes": {"mmvp": ["24 questions, where the published benchmark has 300: not the whole of it"]},
        "differences": [f"{others[0]}: precision float32 ({first}: bfloat16)"],
        "passed_through": {first: {"gqa": {"exact_match": 0.5}, "textvqa_val": {"exact_match": 0.25}}},
        "undecodable": {"mmvp": {"row 3": "image file is truncated (12 bytes not processed)"}},
        "scores": {
            model: {
                task: {
                    "measures": entry.values(),
                    "questions": len(entry.right),
                    "unparsable": len(entry.unparsable),
                    "lmms_eval": {"mme_perception_score": 1234.5, "mme_cognition_score": 321.0},
                }
                for task, entry in tasks.items()
            }
            for model, tasks in scored.items()
        },
        "comparisons": comparisons,
        "packages": {"torch": "2.14.1+cu130", "transformers": "5.24.0", "lmms-eval": "0.5.0"},
    }
    data = {
        task: TaskData(
            task=task,
            name=task,
            table=Dataset.from_list([{"image": row.get("image")} for row in found]),
            rows=found,
            undecodable={},
            notes=[],
            files=None,
            score=scorers[task],
        )
        for task, found in rows.items()
    }
    write_report(results, data, items, scored, out)


def mmvp_rows(rng: np.random.Generator) -> list[dict[str, Any]]:
    return [
        {
            "Index": index,
            "Question": QUESTIONS[index % 3],
            "Options": "(a) left, seen from the one who looks (b) right",
            "Correct Answer": "(a)" if index % 2 else "(b)",
            "Pattern": PATTERNS[(index - 1) // 2 % len(PATTERNS)],
            "image": {"bytes": picture(rng), "path": f"{index}.jpg"},
            "truth": "A" if index % 2 else "B",
        }
        for index in range(1, 109)
    ]


def pope_rows() -> list[dict[str, Any]]:
    return [
        {"category": category, "image_source": f"image {k // 6}", "answer": truth, "truth": truth}
        for category in POPE_CATEGORIES
        for k, truth in enumerate(("yes", "no") * 30)
    ]


def mme_rows() -> list[dict[str, Any]]:
    return [
        {"category": category, "image": f"{category}/{k}.png", "target": truth, "truth": truth}
        for category in ("existence", "commonsense_reasoning", "numerical_calculation")
        for k in range(20)
        for truth in ("Yes", "No")
    ]


def picture(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 36, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def answer(row: dict[str, Any], skill: float, rng: np.random.Generator) -> str:
    """The right one as often as the skill says, else one of all kinds."""
    return row["truth"] if rng.random() < skill else str(rng.choice(ANSWERS))


# Runs in the report. The policy turns every request to elsewhere into an event (and into a message of the console).
PROBE = r"""
<meta http-equiv="Content-Security-Policy" content="default-src data: 'unsafe-inline'">
<script>
const fetched = [];
document.addEventListener("securitypolicyviolation", event => fetched.push(event.blockedURI));
const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
const pen = canvas.getContext("2d", {willReadFrequently: true});

function rgba(colour) {
  pen.clearRect(0, 0, 1, 1);
  pen.fillStyle = colour;
  pen.fillRect(0, 0, 1, 1);
  const [red, green, blue, alpha] = pen.getImageData(0, 0, 1, 1).data;
  return [red, green, blue, alpha / 255];
}
function over(top, ground) {
  return [0, 1, 2].map(k => top[3] * top[k] + (1 - top[3]) * ground[k]).concat(1);
}
function ancestors(element) {
  return element ? [element, ...ancestors(element.parentElement)] : [];
}
function backgroundOf(element) {
  const layers = ancestors(element).map(one => rgba(getComputedStyle(one).backgroundColor));
  return layers.reverse().reduce((ground, layer) => over(layer, ground), rgba("Canvas"));
}
function luminance(colour) {
  const [red, green, blue] = colour.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}
function contrast(element, colour) {
  const ground = backgroundOf(element), ink = rgba(colour);
  ink[3] *= ancestors(element).reduce((product, one) => product * getComputedStyle(one).opacity, 1);
  const [light, dark] = [luminance(over(ink, ground)), luminance(ground)].sort((a, b) => b - a);
  return (light + 0.05) / (dark + 0.05);
}
// Text that leaves a box which cannot be scrolled is cut or lies on something else.
function leaves(rect, element) {
  for (const box of ancestors(element)) {
    const style = getComputedStyle(box), bounds = box.getBoundingClientRect();
    if (/auto|scroll/.test(style.overflowX)) return false;
    if (style.display.startsWith("inline") || style.display === "contents") continue;
    if (rect.left < bounds.left - 2 || rect.right > bounds.right + 2) return true;
    if (rect.top < bounds.top - 4 || rect.bottom > bounds.bottom + 4) return true;
  }
  return rect.left < -1 || rect.right > innerWidth + 1;
}
function* texts() {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || element.closest("script, style, svg")) continue;
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    yield {element, text, rects: [...range.getClientRects()], colour: getComputedStyle(element).color};
  }
  // matplotlib draws letters as shapes, in a group per text.
  for (const element of document.querySelectorAll("svg g[id^=text_]")) {
    const colour = getComputedStyle(element.querySelector("use, path, text") ?? element).fill;
    yield {element, text: `svg ${element.id}`, rects: [element.getBoundingClientRect()], colour};
  }
}
addEventListener("load", () => setTimeout(() => {
  const found = {width: innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches, fetched};
  found.scrollWidth = document.documentElement.scrollWidth;
  found.scrolled = [...document.querySelectorAll("body *")].filter(box => box.scrollWidth > box.clientWidth + 1
    && /auto|scroll/.test(getComputedStyle(box).overflowX)).length;
  found.brokenImages = [...document.images].filter(image => !image.naturalWidth).length;
  found.texts = 0; found.cut = []; found.faint = [];
  for (const {element, text, rects, colour} of texts()) {
    found.texts += 1;
    const name = `${element.tagName}.${element.getAttribute("class") ?? ""}`.toLowerCase();
    const where = `${name}: ${text.slice(0, 60)}`;
    if (!rects.length || rects.some(rect => leaves(rect, element))) found.cut.push(where);
    const ratio = contrast(element, colour);
    if (!(ratio >= 4.5)) found.faint.push(`${ratio.toFixed(2)} ${where}`);
  }
  parent.postMessage(found, "*");
}, 100));
</script>
"""
AROUND = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><pre></pre>
<script>
const all = [];
addEventListener("message", event => {
  all.push(event.data);
  document.querySelector("pre").textContent = JSON.stringify(all);
});
</script>
%s"""


def look(page: str, folder: Path, scheme: str) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """What the probe found at each width, and the messages of the console."""
    probed = html.escape(page.replace("<head>", f"<head>{PROBE}", 1))
    frames = [f'<iframe style="width: {w}px; height: 3000px; border: 0" srcdoc="{probed}"></iframe>' for w in WIDTHS]
    around = folder / "around.html"
    around.write_text(AROUND % "\n".join(frames), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", "--enable-logging=stderr"]
    command += [
        "--v=0",
        "--hide-scrollbars",
        "--virtual-time-budget=10000",
        "--window-size=1400,2000",
        "--dump-dom",
        around.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, encoding="utf-8")
    written = re.search(r"<pre>(.*?)</pre>", done.stdout, flags=re.DOTALL)
    assert written and written[1], f"nothing was found out: {done.stderr[-2000:]}"
    messages = re.findall(r":CONSOLE[:(]\d+.*", done.stderr)
    return {found["width"]: found for found in json.loads(html.unescape(written[1]))}, messages


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`looked(number of models, scheme)`, each only once."""

    @functools.cache
    def call(count: int, scheme: str) -> tuple[dict[int, dict[str, Any]], list[str]]:
        folder = tmp_path_factory.mktemp("browser")
        write_page(folder, MODELS[:count])
        return look((folder / "report.html").read_text(encoding="utf-8"), folder, scheme)

    return call


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("count", [2, 3])
def test_page_is_readable(looked: Any, count: int, scheme: str, width: int):
    widths, messages = looked(count, scheme)
    found = widths[width]
    assert found["dark"] == (scheme == "dark") and found["texts"] > 150
    assert messages == [] and found["fetched"] == [] and found["brokenImages"] == 0
    assert found["scrollWidth"] <= width
    assert found["cut"] == []
    assert found["faint"] == []
    assert width < 1280 or found["scrolled"] == 0  # there is room for every column of a table


BAD = """<!doctype html><html><head><style>
body { margin: 0; color: #fff; background: #777; } @media (prefers-color-scheme: dark) { body { background: #fff; } }
</style></head><body>
<p style="color: #000">fine</p><p>faint</p>
<div style="width: 60px; overflow: hidden; white-space: nowrap; color: #000">cut at the end of its box</div>
<div style="width: 900px; color: #000">wider than a telephone</div>
<div style="width: 60px; overflow: auto; white-space: nowrap; color: #000">to be scrolled</div>
<img src="http://127.0.0.1:9/a.png"><img src="data:image/png;base64,AAAA">
<script>console.error("broken")</script></body></html>"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_bad_pages_are_seen(tmp_path: Path, scheme: str):
    widths, messages = look(BAD, tmp_path, scheme)
    wide, narrow = (widths[width] for width in WIDTHS)
    assert wide["scrollWidth"] == 1280 and narrow["scrollWidth"] == 900
    for found in (wide, narrow):
        assert found["cut"] == ["div.: cut at the end of its box"]
        assert found["faint"] == ["4.48 p.: faint" if scheme == "light" else "1.00 p.: faint"]
        assert found["fetched"] == ["http://127.0.0.1:9/a.png"] and found["brokenImages"] == 2
        assert found["scrolled"] == 1
    assert sum("broken" in message for message in messages) == 2
