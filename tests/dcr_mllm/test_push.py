"""What `push` uploads: finished directories, without machine paths and training files, with a card that says n."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from dcr_mllm.errors import UserError
from dcr_mllm.machine_paths import name_of, without_paths
from dcr_mllm.model_card import origin_paths
from dcr_mllm.push import push, uploads
from dcr_mllm.runs import hash_directory
from tests.fake_models import write_json, write_projector, write_safetensors, write_tower

BASE = "/home/ada/cache/models--openai--clip-vit-large-patch14/snapshots/0a1b2c"
CARD = "---\nlibrary_name: transformers\nbase_model: {base}\ntags: [clip, dcr]\n---\n# A tower\n\n`{base}` after DCR.\n"


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A finished tower in a run, with everything around it that must not leave."""
    path = write_tower(tmp_path / "run/tower")
    write_json(tmp_path / "run/finished.json", {})
    (tmp_path / "run/config.yaml").write_text("run: run\n")
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**config, "_name_or_path": "/home/ada/work/towers/base"})
    record = {
        "config": {"data": "/data/cc3m/{00000..00331}.tar", "tower": BASE},
        "base_tower": {"path": BASE, "sha256": "0" * 64},
        "steps": {"tower": 3},
    }
    write_json(path / "provenance.json", record)
    (path / "README.md").write_text(CARD.format(base=BASE))
    for name in ("optimizer.pt", "trainer_state.json", "training_args.bin", "rng_state.pth", ".cache/x.json"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"{}")
    return path


def sent(directory: Path, repo_id: str = "me/tower", **options: Any) -> dict[str, bytes]:
    files, _ = uploads(directory, repo_id, **options)
    return {u.name: u.content if isinstance(u.content, bytes) else u.content.read_bytes() for u in files}


def front(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_nothing_of_the_machine_and_of_training_leaves(tower: Path):
    files, left = uploads(tower, "me/tower")
    assert {u.name for u in files} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "provenance.json",
        "tokenizer.json",
    }  # fmt: skip
    assert set(left) == {"optimizer.pt", "trainer_state.json", "training_args.bin", "rng_state.pth", ".cache/x.json"}
    contents = sent(tower)
    for name, content in contents.items():
        if not name.endswith(".safetensors"):
            assert not any(word in content.decode() for word in ("/home", "ada", "/data", "snapshots")), name
    record = json.loads(contents["provenance.json"])
    assert (
        record["base_tower"]["path"] == "openai/clip-vit-large-patch14" and record["base_tower"]["sha256"] == "0" * 64
    )
    assert record["config"]["data"] == "{00000..00331}.tar"
    assert contents["model.safetensors"] == (tower / "model.safetensors").read_bytes()
    assert (tower / "README.md").read_text() == CARD.format(base=BASE)  # what lies on disk is as it was


def test_the_cards_metadata(tower: Path, tmp_path: Path):
    metadata = front(sent(tower)["README.md"])
    assert metadata["base_model"] == "openai/clip-vit-large-patch14" and metadata["license"] == "unknown"
    assert metadata["library_name"] == "transformers" and metadata["tags"] == ["clip", "dcr", "dcr-mllm"]
    assert front(sent(tower, license_id="mit", base_model="a/b")["README.md"])["license"] == "mit"
    base = write_tower(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    write_json(tower / "provenance.json", {"base_tower": {"path": str(base), "sha256": "1" * 64}})
    (tower / "README.md").write_text(CARD.format(base=str(base)))
    metadata = front(sent(tower)["README.md"])
    assert metadata["license"] == "apache-2.0" and "base_model" not in metadata  # a folder's name is no id


def test_the_evaluation_beside_a_tower_is_quoted_with_n_and_interval(tower: Path):
    measure = {
        "base": 21.44, "tower": 21.67, "difference": 0.22, "interval": [-0.51, 0.97], "num_units": 900, "p_holm": 0.77,
    }  # fmt: skip
    results = {
        "towers": {"new": {"description": {"sha256": hash_directory(tower)}}},
        "comparisons": {"new": {"measures": {"mmvp_vlm": measure}, "cautions": ["The run was short."]}},
    }
    write_json(tower.parent / "evaluation/tower_evaluation.json", results)
    card = sent(tower)["README.md"].decode()
    assert "| mmvp_vlm | 900 | 21.4 | 21.7 | +0.2 [-0.5, +1.0] | 0.77 |" in card and "The run was short." in card
    results["towers"]["new"]["description"]["sha256"] = "2" * 64
    write_json(tower.parent / "evaluation/tower_evaluation.json", results)
    with pytest.raises(UserError, match="none of them has the weights"):
        uploads(tower, "me/tower")


def test_the_results_of_llavas_are_quoted_by_their_headline(tower: Path, tmp_path: Path):
    entry = {
        "headline": "pair_accuracy",
        "test": "exact McNemar on 1,500 pairs",
        "p_holm": 0.004,
        "measures": {"pair_accuracy": {"base": 2.0, "model": 4.5, "difference": 2.5, "interval": [1.0, 4.0]}},
    }
    results = {"model_hashes": {"new": hash_directory(tower)}, "comparisons": {"new": {"mmvp": entry}}}
    write_json(tmp_path / "results.json", results)
    card = sent(tower, evaluation=tmp_path / "results.json")["README.md"].decode()
    assert "| mmvp, pair_accuracy | 1,500 pairs | 2.0 | 4.5 | +2.5 [+1.0, +4.0] | 0.004 |" in card


def test_half_written_directories_are_refused(tower: Path, tmp_path: Path):
    (tower / "provenance.json").unlink()
    with pytest.raises(UserError, match="provenance.json is missing: half-written"):
        uploads(tower, "me/tower")
    partial = write_tower(tmp_path / ".tower.partial")
    write_json(partial / "provenance.json", {})
    with pytest.raises(UserError, match="killed command left behind"):
        uploads(partial, "me/tower")
    projector = write_projector(tmp_path / "run/projector")
    assert "config.json" in sent(projector, "me/projector")
    (tmp_path / "run/finished.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        uploads(projector, "me/projector")


def test_a_damaged_or_contradictory_model_is_refused(tower: Path):
    write_json(tower / "tokenizer.json", {"model": {"vocab": {"a": 0, "b": 10}}})
    with pytest.raises(UserError, match="up to id 10, the embedding has 10 rows; mend it"):
        uploads(tower, "me/tower")
    weights = (tower / "model.safetensors").read_bytes()
    (tower / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(UserError, match="is incomplete"):
        uploads(tower, "me/tower")


def test_an_adapter_gets_a_card_of_its_own_and_a_base_that_peft_can_load(tower: Path):
    adapter = tower.parent / "adapter"
    pattern = r"vision_model\.encoder\.layers\.\d+\.(self_attn\.(q_proj|k_proj)|mlp\.(fc1|fc2))"
    config = {"base_model_name_or_path": "/home/ada/base", "r": 16, "lora_alpha": 32, "target_modules": pattern}
    write_json(adapter / "adapter_config.json", config)
    stem = "base_model.model.vision_model.encoder.layers.0.mlp.fc1.lora_"
    write_safetensors(adapter / "adapter_model.safetensors", {f"{stem}A.weight": (16, 8), f"{stem}B.weight": (8, 16)})
    (adapter / "README.md").write_text("---\nbase_model: /home/ada/base\n---\n[More Information Needed]\n")
    files = {u.name: u for u in uploads(adapter, "me/adapter")[0]}
    assert "PEFT cannot load its base 'base' from the hub" in files["adapter_config.json"].note
    contents = sent(adapter, base_model="openai/clip-vit-large-patch14")
    stored = json.loads(contents["adapter_config.json"])
    assert stored["base_model_name_or_path"] == "openai/clip-vit-large-patch14" and stored["target_modules"] == pattern
    card = contents["README.md"].decode()
    assert "More Information" not in card and "rank 16" in card and "/home" not in card
    assert front(contents["README.md"])["base_model"] == "openai/clip-vit-large-patch14"


def test_the_repositorys_id_is_filled_into_an_export_for_open_clip(tmp_path: Path):
    path = tmp_path / "export"
    write_json(path / "open_clip_config.json", {"model_cfg": {"text_cfg": {"hf_tokenizer_name": "OWNER/NAME"}}})
    write_json(path / "provenance.json", {})
    write_safetensors(path / "open_clip_model.safetensors", {"logit_scale": ()})
    (path / "README.md").write_text("---\nlibrary_name: open_clip\n---\nhf-hub:OWNER/NAME\n")
    contents = sent(path, "me/clip")
    assert b"hf-hub:me/clip" in contents["README.md"]
    assert json.loads(contents["open_clip_config.json"])["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "me/clip"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ada/runs/x/tower", "tower"),
        ("C:\\Users\\ada\\tower", "tower"),
        ("~/models/clip", "clip"),
        (BASE, "openai/clip-vit-large-patch14"),
        (f"{BASE}/vocab.json", "vocab.json"),
        ("see `/home/ada/x` and (/mnt/d/y).\n", "see `x` and (y)."),
        ("https://huggingface.co/openai/clip", None),
        ("s3://bucket/cc3m/0.tar", None),
        ("yes and/or no 1/2, </s> image/png", None),
        ("runs/mini/tower", None),
        (r"model\.language_model\..*\.(q|k)_proj", None),
    ],
)
def test_paths_become_names(text: str, expected: str | None):
    found, count = without_paths({"key": [text]})
    if expected is None:
        assert (found["key"][0], count) == (text, 0)
    else:
        assert found["key"][0].strip() == expected and count >= 1
    assert name_of("/") == "root"


def test_origins_are_followed_to_their_beginning(tmp_path: Path):
    aligned, llava = tmp_path / "aligned", tmp_path / "llava"
    write_json(aligned / "provenance.json", {"tower": {"path": BASE}, "llm": {"path": "lmsys/vicuna-7b-v1.5"}})
    record = {"merged_adapter": {"path": "x"}, "base": {"path": str(aligned)}}
    write_json(llava / "provenance.json", record)
    assert list(origin_paths(record)) == [BASE, "lmsys/vicuna-7b-v1.5"]
    assert list(origin_paths({"exported": {"path": str(llava)}, "source": record})) == [BASE, "lmsys/vicuna-7b-v1.5"]


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub as one commit takes; keeps what it is sent in `server.files`."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, Any] = {}
        status = 200
        if self.path == "/api/repos/create":
            request = json.loads(body)
            self.server.created.append(request)
            answer = {"url": f"http://{self.headers['Host']}/{request.get('organization')}/{request['name']}"}
            status = 409 if request["name"] == "taken" else 200
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            answer = {"files": files}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            answer = {"commitUrl": f"http://{self.headers['Host']}/me/tower/commit/1", "commitOid": "1" * 40}
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = HTTPServer(("127.0.0.1", 0), FakeHub)
    server.files, server.created = {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_test",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "dcr_mllm.push", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_client_sends_exactly_the_list(tower: Path, hub: Any):
    done = run(hub, str(tower), "me/tower", "--private")
    assert done.returncode == 0, done.stderr
    assert hub.created[0]["name"] == "tower" and hub.created[0]["organization"] == "me"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert hub.files == sent(tower)
    assert "provenance.json  (3 paths of this machine left out" in done.stdout and "optimizer.pt" in done.stdout


def test_a_dry_run_sends_nothing_and_an_existing_repository_is_kept(tower: Path, hub: Any):
    done = run(hub, str(tower), "me/tower", "--dry-run")
    assert done.returncode == 0 and "model.safetensors" in done.stdout and not hub.created and not hub.files
    done = run(hub, str(tower), "me/taken")
    assert done.returncode == 2 and "me/taken exists already; --update" in done.stderr and not hub.files


def test_wrong_names_are_refused_before_anything_is_sent(tower: Path):
    for name in ("tower", "me/to wer", "me/a/b"):
        with pytest.raises(UserError, match="repository"):
            push(tower, name, dry_run=True)
