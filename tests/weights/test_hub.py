"""Models on a hub: a server in this process that has the hub's addresses for uploads and
downloads. The hub itself is not reached."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import random_ids
from test_model_folder import model  # noqa: F401  # a fixture

from uiollms import ConfigError, MemoryLM
from uiollms.weights.adapters import WEIGHT_FILES

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Answers huggingface_hub's requests for one repository, whose files are in memory."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}

    def log_message(self, *_) -> None:
        pass

    def reply(self, value=None, code: int = 200, body: bytes = b"", **headers: str) -> None:
        body = body if value is None else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.reply({"url": f"http://{self.headers['Host']}/someone/small"})
        elif "/preupload/" in self.path:
            names = [entry["path"] for entry in json.loads(body)["files"]]
            kind = {"uploadMode": "regular", "shouldIgnore": False}
            self.reply({"files": [{"path": name, **kind} for name in names]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[entry["value"]["path"]] = content
            address = f"http://{self.headers['Host']}/someone/small/commit/{COMMIT}"
            self.reply({"commitUrl": address, "commitOid": COMMIT})
        else:  # validate-yaml
            self.reply({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            if name not in self.files:
                self.reply({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                return
            etag = f'"{hash(self.files[name]) & 0xFFFFFFFF:08x}"'
            self.reply(body=self.files[name], ETag=etag, X_Repo_Commit=COMMIT)
        elif "/tree/" in path:
            self.reply(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in self.files.items()
                ]
            )
        else:
            siblings = [{"rfilename": name} for name in self.files]
            self.reply({"id": "someone/small", "sha": COMMIT, "siblings": siblings})

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[dict[str, str]]:
    """Yields the environment of a process for which the server is the hub."""
    monkeypatch.setattr(Hub, "files", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        **{name: value for name, value in os.environ.items() if not name.endswith("_proxy")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_TOKEN": "hf_none",
    }
    server.shutdown()
    server.server_close()


def run(environment: dict[str, str], program: str, *arguments: str) -> str:
    """Runs a program in a new process, because huggingface_hub reads the environment once."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


PUSH = """
import sys, torch
from uiollms import MemoryLM
model = MemoryLM.from_pretrained(sys.argv[1], dtype="float64")
print(model.push_to_hub("someone/small", results=sys.argv[2], token="hf_none"))
"""
LOAD = """
import sys, torch
from uiollms import MemoryLM
from uiollms.weights.model_folder import load_tokenizer
model = MemoryLM.from_pretrained("someone/small", dtype="float64", revision="main", token="hf_none")
load_tokenizer("someone/small")
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[1])).logits, sys.argv[2])
"""


@torch.no_grad()
def test_a_model_is_pushed_and_loaded(hub, model, tmp_path):  # noqa: F811
    model.save_pretrained(tmp_path / "model")
    result = dict(task="sotu", task_type="perplexity", truncation=100, memory={"perplexity": 20.5})
    (tmp_path / "test.json").write_text(json.dumps({"results": [result]}))
    paths = str(tmp_path / "model"), str(tmp_path / "test.json")
    assert run(hub, PUSH, *paths).strip().endswith(COMMIT)
    saved = {*WEIGHT_FILES, "base.json", "config.json", "model.safetensors", "README.md"}
    assert Hub.files.keys() == saved
    card = Hub.files["README.md"].decode()
    assert "library_name: uiollms" in card and "| num_memory | 2 |" in card
    assert "| sotu (perplexity) | 100 | memory | perplexity | 20.5 |" in card
    Hub.files["README.md"] = b"edited on the hub"
    run(hub, PUSH, *paths)
    assert Hub.files["README.md"] == b"edited on the hub"

    ids = random_ids(1, 40)
    torch.save(ids, tmp_path / "ids")
    run(hub, LOAD, str(tmp_path / "ids"), str(tmp_path / "logits"))
    assert torch.equal(torch.load(tmp_path / "logits"), model(ids).logits)
    # Offline the cache has it; HF_HUB_OFFLINE allows no request.
    run(hub | {"HF_HUB_OFFLINE": "1"}, LOAD, str(tmp_path / "ids"), str(tmp_path / "again"))
    assert torch.equal(torch.load(tmp_path / "again"), model(ids).logits)


TRAIN = """
import sys, torch
from transformers import Trainer, TrainingArguments
from uiollms import MemoryLM
class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        ids = torch.arange(3, 43) + index
        return dict(input_ids=ids, labels=ids)
model = MemoryLM.from_pretrained(sys.argv[1], dtype="float32")
arguments = TrainingArguments(
    output_dir=sys.argv[2], max_steps=2, save_steps=1, report_to="none", use_cpu=True,
    hub_model_id="someone/small", hub_token="hf_none",
)
trainer = Trainer(model=model, args=arguments, train_dataset=Texts())
trainer.train()
trainer.push_to_hub()
torch.save(model.memory_state_dict(), sys.argv[3])
"""


def test_a_trainer_pushes_its_model(hub, model, tmp_path):  # noqa: F811
    model.save_pretrained(tmp_path / "model")
    paths = [str(tmp_path / name) for name in ("model", "run", "trained", "ids", "logits")]
    run(hub, TRAIN, *paths[:3])
    saved = {*WEIGHT_FILES, "base.json", "config.json", "model.safetensors", "README.md"}
    assert Hub.files.keys() == {*saved, "training_args.bin"}  # no checkpoints
    model.load_memory_state_dict(torch.load(paths[2]))
    ids = random_ids(1, 40)
    torch.save(ids, paths[3])
    run(hub, LOAD, *paths[3:])
    assert torch.equal(torch.load(paths[4]), model(ids).logits)


def test_arguments_of_a_trainer(model, tmp_path):  # noqa: F811
    folder = tmp_path / "model"
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(str(folder), state_dict=state, is_main_process=False)
    assert not folder.exists()
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True)
    loaded = MemoryLM.from_pretrained(folder, dtype=torch.float64).memory_state_dict()
    for name, tensor in model.memory_state_dict().items():
        assert torch.equal(loaded[name].double(), tensor.double() + 1)
    with pytest.raises(ValueError, match="state_dict lacks decoder.repeat_token"):
        del state["decoder.repeat_token"]
        model.save_pretrained(folder, state_dict=state)
    with pytest.raises(ValueError, match="safetensors only"):
        model.save_pretrained(folder, safe_serialization=False)


def test_a_model_card_that_was_edited_stays(model, tmp_path):  # noqa: F811
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("edited")
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() == "edited"
    (tmp_path / "test.json").write_text("[]")
    with pytest.raises(ConfigError, match="contains no results; give a test.json"):
        model.save_pretrained(tmp_path / "model", results=tmp_path / "test.json")


def test_the_group_can_read_what_is_saved(model, tmp_path):  # noqa: F811
    old = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path / "model", include_base=True)
    finally:
        os.umask(old)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*")}
    modes[tmp_path / "model"] = (tmp_path / "model").stat().st_mode & 0o777
    wrong = {
        str(path): oct(mode)
        for path, mode in modes.items()
        if mode != (0o750 if path.is_dir() else 0o640)
    }
    assert wrong == {}


def test_gradient_checkpointing(model):  # noqa: F811
    assert model.supports_gradient_checkpointing and not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.checkpointing and model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.checkpointing and not model.is_gradient_checkpointing
