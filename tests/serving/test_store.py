"""Tests the documents on disk: restarts, kills, and names that are meant to do harm."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import torch
from server import NAME, TEXT, running

from uiollms.files.errors import ConfigError
from uiollms.model.memory import Memory
from uiollms.weights.adapters import save_weights

LONG = "It was a bright cold day. " * 35  # 57 chunks


def test_memories_are_found_again_after_a_restart(tiny):
    body = dict(prompt="The clocks", max_tokens=9)
    with running(*tiny, Path("memories")) as server:
        book, failed = server.upload(), server.upload(b"\xff")
        answer = server.http.post("/v1/completions", json=body | dict(memory=book["id"])).json()
    with running(*tiny, Path("memories")) as server:
        assert server.wait(book["id"]) == book | dict(status="ready")
        assert server.wait(failed["id"])["error"] == failed["error"]
        again = server.http.post("/v1/completions", json=body | dict(memory=book["id"])).json()
    assert again["choices"] == answer["choices"] and again["usage"] == answer["usage"]


def start(*options: str) -> tuple[subprocess.Popen, httpx2.Client]:
    """Starts `uiollms serve` as a user does. Returns the process and a client."""
    command = [sys.executable, "-m", "uiollms", "serve", "--env_conf", "env.json", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--folder", "memories", "--json", *options],
        stdout=subprocess.PIPE,
        text=True,
        # A shell that put this test into the background lets its children ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    line = json.loads(process.stdout.readline())
    assert (line["model"], line["folder"]) == ("env", "memories")
    return process, httpx2.Client(base_url=line["address"], timeout=60)


def interrupt(end: signal.Signals) -> tuple[str, set[str]]:
    """Starts a server and ends it while it compresses documents, of which the last one waits.
    Returns its id, and the endings of its files that stay."""
    process, client = start()
    for _ in range(8):
        made = client.post("/v1/memories", files={"file": ("book.txt", LONG)}).json()
    process.send_signal(end)
    assert process.wait() == (-signal.SIGKILL if end == signal.SIGKILL else 130)
    return made["id"], {path.suffix for path in Path("memories").glob(f"{made['id']}*")}


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_server_that_was_ended_compresses_the_document_again(tiny, end):
    """SIGKILL kills the server; SIGINT ends it in order."""
    model, tokenizer = tiny
    save_weights(model, "out/ckp")
    id, names = interrupt(end)
    # In order, a server may compress the last document before it ends.
    assert names == {".json", ".txt"} or (end == signal.SIGINT and names == {".json", ".mem"})
    (Path("memories") / "mem-0123456789abcdef.txt").write_text("its record was never written")
    with running(model, tokenizer, Path("memories")) as server:
        assert server.wait(id)["status"] == "ready"
        ids = [document["id"] for document in server.http.get("/v1/memories").json()["data"]]
        assert len(ids) == 8
        found = Memory.load(Path("memories") / f"{id}.mem", model)
        expected = model.compress(LONG, tokenizer, source="book.txt")
        assert torch.equal(found.slots, expected.slots)
        for each in ids:
            assert server.wait(each)["status"] == "ready"
            server.http.delete(f"/v1/memories/{each}")
    assert [path.name for path in Path("memories").iterdir()] == [".lock"]


def test_a_document_that_is_deleted_meanwhile_leaves_nothing(tiny):
    with running(*tiny, Path("memories")) as server:
        with server.service.turns:  # its compression waits
            made = server.http.post("/v1/memories", files={"file": ("book.txt", LONG)}).json()
            server.service.store.delete(made["id"])
        assert server.upload()["status"] == "ready"  # the first is over
        assert len(list(Path("memories").glob("mem-*"))) == 2


def test_records_that_are_damaged_are_not_trusted(tiny):
    model, tokenizer = tiny
    with running(model, tokenizer, Path("memories")) as server:
        ids = [server.upload()["id"] for _ in range(4)]
    missing, changed, damaged, other = (Path("memories") / f"{id}.mem" for id in ids)
    missing.unlink()
    data = bytearray(changed.read_bytes())
    data[-5] ^= 1
    changed.write_bytes(data)
    damaged.with_suffix(".json").write_text('{"name": "../../etc/passwd"}')
    record = json.loads(other.with_suffix(".json").read_text())
    record["made_by"]["adapter"] = "0" * 16
    other.with_suffix(".json").write_text(json.dumps(record))
    with running(model, tokenizer, Path("memories")) as server:
        found = {d["id"]: d for d in server.http.get("/v1/memories").json()["data"]}
        assert found.keys() == {ids[0], ids[1], ids[3]}
        assert found[ids[0]]["error"] == "its file is missing; upload it again"
        assert found[ids[3]]["error"] == "another model made it; upload the document again"
        body = dict(model=NAME, prompt="x", max_tokens=2)
        for id, message in ((ids[1], "damaged: not the bytes"), (ids[3], "another model")):
            refused = server.http.post("/v1/completions", json=body | dict(memory=id))
            assert refused.status_code == 409 and message in refused.json()["error"]["message"]
            assert str(Path("memories").resolve()) not in refused.text


def test_a_folder_serves_one_server(tiny):
    with running(*tiny, Path("memories")):
        with pytest.raises(ConfigError, match="--folder memories: another server uses it"):
            with running(*tiny, Path("memories")):
                pass
    Path("file").write_text("")
    with pytest.raises(ConfigError, match="^file: cannot be written"):
        with running(*tiny, Path("file")):
            pass


HOSTILE = [
    "../../../../etc/passwd",
    "..\\..\\windows\\win.ini",
    "/etc/passwd",
    "<img src=x onerror=alert(1)>.txt",
    "a\u202etxt.exe",
    "nul\0byte.txt",
    "line\r\nbreak: header",
    "\x1b[31mred",
    "x" * 5000,
    "mem-0123456789abcdef.mem",
    ".lock",
    "CON",
    "",
]


def test_hostile_names_are_text_and_never_paths(tiny):
    """Each name in JSON, where all characters arrive, and as the file name of a form."""
    with running(*tiny, Path("deep/memories")) as server:
        before = {p for p in Path().rglob("*") if "deep" not in p.parts}
        stored = 0
        for name in HOSTILE:
            as_json = server.http.post("/v1/memories", json=dict(text=TEXT, name=name))
            as_form = server.http.post("/v1/memories", files={"file": (name or "x", TEXT)})
            assert as_json.status_code == 202
            assert as_form.status_code == (400 if len(name) == 5000 else 202)  # a header's length
            for made in [as_json] + [as_form] * (as_form.status_code == 202):
                stored += 1
                found = server.wait(made.json()["id"])
                assert found["status"] == "ready", found
                assert found["name"].isprintable() and 0 < len(found["name"]) <= 255
                if made is as_json and name.isprintable() and 0 < len(name) <= 255:
                    assert found["name"] == name
        for id in ("..%2f..%2fetc%2fpasswd", "%00", "mem-0", "x" * 5000, "..", "%2e%2e"):
            for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/chunks/0")):
                found = server.http.request(method, f"/v1/memories/{id}{path}")
                assert found.status_code in (404, 405, 307), (id, method)
        names = {path.name for path in Path("deep/memories").iterdir()}
        assert all(name == ".lock" or name[:4] == "mem-" for name in names)
        assert len(names) == 1 + 2 * stored  # a record and a memory each
        assert {p for p in Path().rglob("*") if "deep" not in p.parts} == before
