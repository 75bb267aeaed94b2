"""What README and docs tell people to type: every command is run, dry-run or parsed, in a folder of stand-ins.

The folder holds, under the names that the pages use, tiny models, shards and instruction data: the commands run as they
are written. What downloads is only parsed, what takes long only goes through its own argument parser.
"""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomllib

from dcr_mllm.evaluation import run as evaluation
from dcr_mllm.runs import write_json_atomic
from scripts import config_reference
from tests.benchmarks import ROWS, write_copy_of

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
SCRIPTS = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
COMMANDS = SCRIPTS["entry-points"]["dcr_mllm.commands"]
STAGES = {"scripts/stage1.sh": "stage1_dcr", "scripts/stage2_llava.sh": "stage2_llava"}
CLUSTER = ("scripts/cluster/torchrun_ssh.sh", "scripts/cluster/deepspeed_hostfile.sh")

PARSED_ONLY = {"hf", "pip", "img2dataset"}
"""Download, install, or somebody else's program."""
WITH_STAND_INS = {
    "chat",
    "export-llava",
    "export-open-clip",
    "import-tower",
    "inspect",
    "merge",
    "plan",
    "swap",
    "to-safetensors",
    "validate-instructions",
}
"""Sub-commands that are run; `push` is dry-run."""
NOT_WITH_STAND_INS = ("--architecture", "--tokenizer", "--evaluation", "--base-model")
"""Options whose values no tiny model has: such a command only parses its arguments, as import-open-clip does."""


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}:{'_'.join(self.words[:4])}"


def commands() -> list[Command]:
    """Of all ```bash blocks, and of `code` in the text that begins like a command of ours."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        name = str(page.relative_to(REPO))
        for block in re.finditer(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: block.start()].count("\n") + 2
            for command in block.group(1).replace("\\\n", "").splitlines():
                words = tuple(shlex.split(command, comments=True))
                if words:
                    found.append(Command(name, line, words))
        for span in re.finditer(r"`((?:bash scripts/|python |dcr-mllm |torchrun )[^`]*)`", text):
            line = text[: span.start()].count("\n") + 1
            words = tuple(shlex.split(span.group(1)))
            if "[" not in span.group(1) and "..." not in span.group(1):
                found.append(Command(name, line, words))
    return found


def split(words: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Leading `NAME=VALUE` settings, and the rest without a launcher of processes."""
    settings, rest = {}, list(words)
    while rest and re.fullmatch(r"\w+=.*", rest[0]):
        name, _, settings[name] = rest.pop(0).partition("=")
    if rest[:3] == ["python", "-m", "dcr_mllm.torchrun"]:
        rest = ["torchrun", *rest[3:]]
    if rest and rest[0] == "sbatch":
        script = next(i for i, word in enumerate(rest[1:], 1) if not word.startswith("-"))
        rest = ["bash", rest[script], settings["CONFIG"], *rest[script + 1 :]]
    if rest and rest[0] == "torchrun":
        start = next((i for i, word in enumerate(rest[1:], 1) if word == "-m" or word.endswith(".py")), None)
        assert start is not None, f"torchrun without a program: {words}"
        rest = ["python", *rest[start:]]
    return settings, rest


class Parsed(BaseException):
    """Raised in place of what a program would do after it has read its arguments."""


def as_pickles(source: Path, target: Path) -> Path:
    """The model directory as older repositories have it."""
    import torch
    from safetensors.torch import load_file

    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            torch.save(load_file(file), target / "pytorch_model.bin")
        else:
            (target / file.name).symlink_to(file)
    return target


def hub_folder(hub: Path, kind: str, repository: str) -> Path:
    """Where the Hugging Face cache has the files of a repository."""
    folder = hub / f"{kind}--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots").mkdir()
    return folder / "snapshots" / ("0" * 40)


def write_benchmarks(root: Path) -> None:
    """All MLLM benchmarks in the cache, and drawn ones in `BENCHMARKS/`."""
    from dcr_mllm.evaluation.mllm_tasks import TASKS
    from dcr_mllm.mini import data as mini

    for task in ROWS:
        write_copy_of(task, root / "copies")
        (root / "copies" / task).rename(hub_folder(root / "hub", "datasets", TASKS[task].repository))
    drawn = root / "BENCHMARKS"
    mini.write_mmvp(drawn / "mmvp", "test", 1)
    mini.write_mmvp_vlm(drawn / "mmvp_vlm", "test", 1)
    for task in ("zero_shot", "clustering"):
        mini.write_labelled(drawn / task / "drawn", "test", num_train=20, num_test=20)
    mini.write_captioned(drawn / "retrieval" / "drawn", "test", num_images=10)


def write_finished_run(run: Path, tower: Path) -> None:
    """A run of stage 1 with its tower and projector."""
    from stage1_dcr.projector import Projector

    Projector(24, 32).save(run / "projector")
    shutil.copytree(tower, run / "tower")
    (run / "tower" / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A tower\n")
    write_json_atomic(run / "tower" / "provenance.json", {"config": {"tower": "openai/clip-vit-large-patch14-336"}})


def write_adapter(path: Path, llava: Path) -> None:
    from dcr_mllm.llava import load_llava
    from stage2_llava.config import InstructConfig
    from stage2_llava.tuning import add_adapter

    add_adapter(load_llava(llava), InstructConfig(lora_rank=4, lora_alpha=8), str(llava)).save_pretrained(path)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder in which the paths of the pages exist, with a Hugging Face cache in `hub/`."""
    import torch
    from safetensors.torch import load_file

    from dcr_mllm.open_clip_names import to_open_clip
    from tests.stage2_llava.data import write_data

    names = ("tiny_clip", "tiny_denoiser", "tiny_llava", "tiny_llama", "tiny_qwen", "tiny_shards")
    clip, denoiser, llava, llama, qwen, shards = map(request.getfixturevalue, names)
    root = tmp_path_factory.mktemp("stand-ins")
    data = write_data(root / "data")
    write_benchmarks(root)
    write_finished_run(root / "runs/openai-l14-336", clip)
    write_adapter(root / "ADAPTER", llava)
    torch.save(to_open_clip(load_file(clip / "model.safetensors"), "clip"), root / "DIVA.pt")
    llavas = ("LLAVA", "OLD", "NEW", "A1", "A2", "A3", "B1", "B2", "B3")
    arms = (f"runs/{run}/{arm}/llava" for run in ("mini/stage2", "llava-1.5-7b") for arm in ("baseline", "enhanced"))
    towers = ("TOWER", "BASE", "weights/openai-l14-336", "towers/dcr-openai-l14-224", "towers/diva-openai-l14-224")
    hub = {
        "openai/clip-vit-large-patch14-336": as_pickles(clip, root / "pickles" / "clip"),
        "lmsys/vicuna-7b-v1.5": as_pickles(llama, root / "pickles" / "llama"),
        "openai/clip-vit-large-patch14": clip,
        "Manojb/stable-diffusion-2-1-base": denoiser,
    }
    links = {
        **dict.fromkeys(towers, clip),
        **dict.fromkeys((*llavas, *arms), llava),
        "DENOISER": denoiser,
        "DCR_DIR": root / "pickles" / "clip",
        "weights/vicuna-7b-v1.5": llama,
        "weights/smollm2-135m-instruct": qwen,
        **{f"CC3M/{number:05d}.tar": Path(shards).parent / "00000.tar" for number in range(332)},
        "DATA.json": data / "instruct.json",
        "ROOT": data,
        "PICTURE": data / "images" / "0.png",
        "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": data / "align.json",
        "LLaVA-Pretrain/images": data / "images",
        "LLaVA-Instruct/llava_v1_5_mix665k.json": data / "instruct.json",
        "LLaVA-Instruct/images": data / "images",
        "MMVP_VLM_DIR": root / "BENCHMARKS" / "mmvp_vlm",
        "LABELLED_DIR": root / "BENCHMARKS" / "zero_shot" / "drawn",
        **{str(hub_folder(root / "hub", "models", name).relative_to(root)): path for name, path in hub.items()},
    }
    for name, target in links.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)
    return root


@pytest.fixture
def in_a_copy(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Works in a folder that sees the stand-ins; what a command writes is gone afterwards."""
    import huggingface_hub.constants

    shutil.copytree(stand_ins, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "here" / "hub"))


@pytest.mark.parametrize("command", commands(), ids=str)
def test_command(command: Command, in_a_copy: None, monkeypatch: pytest.MonkeyPatch):
    settings, words = split(command.words)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    head, *arguments = words
    if head == "bash":
        script, *arguments = arguments
        assert (REPO / script).is_file(), f"{script} does not exist"
        subprocess.run(["bash", "-n", REPO / script], check=True)
        if script in STAGES:
            dry_run(STAGES[script], arguments)
        elif script in CLUSTER or script.endswith(".sbatch"):
            dry_run(settings.get("STAGE", "stage1_dcr"), arguments)
    elif head == "dcr-mllm":
        name, *arguments = arguments
        assert name in COMMANDS, f"dcr-mllm has no command {name}"
        sub_command(name, arguments, monkeypatch)
    elif head == "python" and arguments[0] == "-m" and arguments[1] in STAGES.values():
        dry_run(arguments[1], arguments[2:])
    elif head == "python" and arguments[:2] == ["-m", "dcr_mllm.evaluation.tower"]:
        assert importlib.import_module(arguments[1]).main([*arguments[2:], "--seeds", "1"]) == 0
    elif head == "python" and arguments[0] == "-m":
        with only_parsing(monkeypatch):
            importlib.import_module(arguments[1]).main(arguments[2:])
    elif head == "python" and arguments[0] == "eval/run.py":
        assert evaluation.main([*arguments[1:], "--dry-run"]) == 0
    elif head == "python":
        monkeypatch.setattr(sys, "argv", arguments)
        with only_parsing(monkeypatch):
            runpy.run_path(str(REPO / arguments[0]), run_name="__main__")
    else:
        assert head in PARSED_ONLY, f"no rule for {head}: add one"


def sub_command(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    main = entry_point(COMMANDS[name])
    if name in STAGES.values():
        dry_run(name, arguments)
    elif not arguments:
        return  # only its name is in the text
    elif not set(NOT_WITH_STAND_INS).isdisjoint(arguments) or name not in {*WITH_STAND_INS, "push"}:
        with only_parsing(monkeypatch):
            main(arguments)
    else:
        monkeypatch.setattr("builtins.input", lambda *_: "")  # nothing more to ask
        for made in arguments[1:2] if name in ("to-safetensors", "import-tower") else ():
            Path(made).unlink(missing_ok=True)  # the stand-in of what it makes
        assert main(arguments if name != "push" else [*arguments, "--dry-run"]) == 0


def dry_run(stage: str, arguments: list[str]) -> None:
    if not any(word.startswith("run=") for word in arguments):  # away with the stand-ins of what it makes
        for made in ["runs"] if stage == "stage1_dcr" else ["runs/mini/stage2", "runs/llava-1.5-7b"]:
            shutil.rmtree(made, ignore_errors=True)
    main = importlib.import_module(f"{stage}.__main__").main
    assert main([*arguments, *([] if "--dry-run" in arguments else ["--dry-run"])]) == 0


def entry_point(target: str) -> Callable[[list[str]], int]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


@contextmanager
def only_parsing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs a program until its parser has accepted the arguments."""

    def stopping(parse):
        def parse_and_stop(self, *args, **kwargs):
            parse(self, *args, **kwargs)
            raise Parsed

        return parse_and_stop

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
    with pytest.raises(Parsed):
        yield


def test_every_config_key_is_on_its_page():
    assert config_reference.PAGE.read_text(encoding="utf-8") == config_reference.render(), (
        "docs/configuration.md is out of date: run python scripts/config_reference.py"
    )


def test_every_config_key_says_what_it_means():
    from stage1_dcr.config import Stage1Config
    from stage2_llava.config import Stage2Config

    silent = [key for cls in (Stage1Config, Stage2Config) for key, _, _, note in config_reference.rows(cls) if not note]
    assert not silent


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken
