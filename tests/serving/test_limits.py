"""Tests what the server refuses and bounds: who calls, how much is sent, how many wait."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import openai
import pytest
import torch
from server import TEXT, running

from uiollms import __main__ as program
from uiollms.cli import serve
from uiollms.cli.common import reporting_errors
from uiollms.files.errors import ConfigError
from uiollms.serving.server import check_token, open_socket
from uiollms.serving.settings import Settings
from uiollms.serving.turns import Turns

LONG = dict(prompt="The clocks", max_tokens=500, temperature=0)


# ---- who calls -----------------------------------------------------------------------------------


def test_with_a_token_every_path_of_the_api_needs_it(tiny):
    with running(*tiny, Path("memories"), token="a-secret?") as server:
        assert server.http.get("/v1/models").status_code == 200
        for given in (
            "",
            "Bearer",
            "Bearer a-secret",
            "Bearer a-secret??",
            "Basic a-secret?",
            "a-secret?",
        ):
            for path in (
                "/v1/models",
                "/v1/memories",
                "/v1/nothing",
                "//v1/models",
                "/v1/../v1/models",
            ):
                found = httpx2.get(server.url + path, headers={"Authorization": given})
                assert found.status_code == 401, (path, given)
            found = httpx2.post(
                f"{server.url}/v1/memories", headers={"Authorization": given}, files={"file": b"x"}
            )
            assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
        wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            wrong.models.list()
        page = httpx2.get(server.url)  # contains no data, and asks for the token
        assert (
            page.status_code == 200
            and "script-src 'sha256-" in page.headers["content-security-policy"]
        )
        assert httpx2.get(server.url, headers={"Host": "example.org"}).status_code == 200
        assert not list(Path("memories").glob("mem-*"))


def test_without_a_token_host_and_origin_must_be_this_machine(served):
    for host in ("localhost", f"127.0.0.1:{served.port}", "[::1]:80", "LOCALHOST"):
        assert served.http.get("/v1/models", headers={"Host": host}).status_code == 200
    for host in (
        "example.org",
        "127.0.0.1.example.org",
        "localhost@example.org:80",
        "[::1",
        "",
        "0.0.0.0",
    ):
        found = served.http.get("/v1/models", headers={"Host": host})
        assert found.status_code in (400, 403), host
    for origin in (
        "http://example.org",
        "null",
        "http://localhost:1",
        f"http://localhost:{served.port}",
    ):
        found = served.http.post("/v1/memories", files={"file": b"x"}, headers={"Origin": origin})
        assert found.json()["error"]["code"] == "wrong_origin"
    found = served.http.post("/v1/memories", files={"file": b"x"}, headers={"Origin": served.url})
    assert found.status_code == 202
    assert "access-control-allow-origin" not in found.headers


def test_a_token_is_needed_beyond_this_machine():
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_token(host, None)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", ""):
        check_token(host, "long-enough")
        with pytest.raises(
            ConfigError, match=r"^--host .*: other machines can reach it.*UIOLLMS_TOKEN"
        ):
            check_token(host, None)
    for token in ("short", "with spaces in it", "ünicode-ünicode", "line\nbreak-line"):
        with pytest.raises(ConfigError, match="^--token, UIOLLMS_TOKEN"):
            check_token("127.0.0.1", token)
    with (
        open_socket("127.0.0.1", 0) as taken,
        pytest.raises(ConfigError, match="cannot listen there"),
    ):
        open_socket("127.0.0.1", taken.getsockname()[1])


def test_the_command_reports_what_is_missing_before_it_loads(workspace, monkeypatch, capsys):
    assert (
        reporting_errors(
            lambda: program.main(["serve", "--host", "0.0.0.0", "--env_conf", "no.json"])
        )
        == 2
    )
    assert "a token is needed" in capsys.readouterr().err
    monkeypatch.setitem(serve.PACKAGES, "no_such_module", "no-such-package")
    assert reporting_errors(lambda: program.main(["serve"])) == 2
    expected = 'serve needs no-such-package, not installed here: pip install "uiollms[serve]"\n'
    assert capsys.readouterr().err == expected


# ---- how much is sent ----------------------------------------------------------------------------


def test_uploads_that_are_too_large_leave_nothing(tiny):
    with running(*tiny, Path("memories"), max_upload=100_000) as server:

        def parts(size: int):
            yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
            for _ in range(size // 1000):
                yield b"x" * 1000
            yield b"\r\n--x--\r\n"

        form = {"content-type": "multipart/form-data; boundary=x"}
        for size in (101_000, 10_000_000):
            stated = server.http.post("/v1/memories", files={"file": ("a", b"x" * size)})
            streamed = server.http.post("/v1/memories", content=parts(size), headers=form)
            as_json = server.http.post("/v1/memories", json=dict(text="x" * size))
            for found in (stated, streamed, as_json):
                assert found.status_code == 413 and found.json()["error"]["code"] == "too_large"
        assert (
            server.http.post("/v1/completions", json=dict(prompt="x" * 5_000_000)).status_code
            == 413
        )
        assert [path.name for path in Path("memories").iterdir()] == [".lock"]
        assert (
            server.http.post("/v1/memories", content=parts(100_000), headers=form).status_code
            == 202
        )


def test_forms_without_a_document_are_refused(served):
    for options in (
        dict(files={"other": b"x"}),
        dict(data={"file": "x"}),
        dict(content=b"x"),
        dict(json=[]),
    ):
        assert served.http.post("/v1/memories", **options).status_code == 400
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert served.http.post("/v1/memories", content=b"nonsense", headers=form).status_code == 400
    files = [("file", ("a", b"x")), ("file", ("b", b"x"))]
    assert served.http.post("/v1/memories", files=files).status_code == 400


def test_an_upload_that_does_not_arrive_is_ended(tiny):
    with running(*tiny, Path("memories"), timeout=0.3) as server:

        def stalled():
            yield b"--x\r\n"
            time.sleep(1)
            yield b""

        form = {"content-type": "multipart/form-data; boundary=x"}
        found = server.http.post("/v1/memories", content=stalled(), headers=form)
        assert found.status_code == 408 and found.json()["error"]["code"] == "timeout"
        server.service.settings = Settings()  # a busy disk may need more than 0.3 seconds
        assert server.upload()["status"] == "ready"


def test_more_memories_than_allowed_are_refused(tiny):
    with running(*tiny, Path("memories"), max_memories=1) as server:
        first = server.upload()["id"]
        found = server.http.post("/v1/memories", files={"file": b"x"})
        assert found.status_code == 409 and found.json()["error"]["code"] == "too_many_memories"
        assert {p.suffix for p in Path("memories").glob("mem-*")} == {".json", ".mem"}
        server.http.delete(f"/v1/memories/{first}")
        assert server.upload()["status"] == "ready"


# ---- how many wait, and how long -----------------------------------------------------------------


def in_background(function) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_a_full_queue_refuses_with_retry_after(tiny):
    with running(*tiny, Path("memories"), max_active=1, max_waiting=1) as server:
        statuses = []

        def ask() -> None:
            statuses.append(server.http.post("/v1/completions", json=LONG).status_code)

        with server.service.turns:  # no answer proceeds
            threads = [in_background(ask) for _ in range(2)]
            while server.service.engine.num_jobs < 2:
                time.sleep(0.01)
            found = server.http.post("/v1/completions", json=LONG | dict(stream=True))
            assert found.status_code == 429 and found.headers["retry-after"] == "5"
            assert found.json()["error"]["code"] == "queue_full"
        for thread in threads:
            thread.join()
        assert statuses == [200, 200]
        server.idle()
        assert server.http.post("/v1/completions", json=LONG).status_code == 200


def test_an_answer_that_takes_too_long_is_ended(tiny):
    with running(*tiny, Path("memories"), timeout=0.3, max_active=1) as server:
        with server.service.turns:
            found = server.http.post("/v1/completions", json=LONG)
            assert found.status_code == 504 and found.json()["error"]["code"] == "timeout"
            waiting = server.http.post("/v1/completions", json=LONG | dict(stream=True))
            assert waiting.status_code == 504
        server.idle()


CLIENT = """
import sys, httpx2
url, stream = sys.argv[1], sys.argv[2] == "stream"
body = dict(prompt="The clocks", max_tokens=900, temperature=0, stream=stream)
print("connected", flush=True)
with httpx2.stream("POST", url + "/v1/completions", json=body, timeout=600) as response:
    for line in response.iter_lines():
        print(line, flush=True)
"""


@pytest.mark.parametrize("form", ["stream", "whole"])
def test_a_killed_client_frees_its_place(served, form):
    """The client is killed with SIGKILL while its answer is generated."""
    turns = served.service.turns
    turns.__enter__()  # the answer waits for its turn
    client = subprocess.Popen([sys.executable, "-c", CLIENT, served.url, form])
    while not served.service.engine.num_jobs:
        assert client.poll() is None
        time.sleep(0.01)
    (job,) = served.service.engine._jobs
    client.kill()
    client.wait()
    while not job.cancelled:
        time.sleep(0.01)
    turns.__exit__()
    served.idle()
    # The 900 tokens were not generated.
    assert served.http.post("/v1/completions", json=LONG | dict(max_tokens=3)).status_code == 200


def test_a_client_that_leaves_in_the_middle_ends_its_answer(served):
    job = None
    with served.http.stream(
        "POST", "/v1/completions", json=LONG | dict(max_tokens=800, stream=True)
    ) as response:
        for line in response.iter_lines():
            if line:
                (job,) = served.service.engine._jobs
                break
    served.idle()
    assert job.cancelled and job.events.qsize() < 700


def test_a_short_answer_does_not_wait_for_a_long_one(served):
    """Both are generated token by token in turns, and a document is compressed between them."""
    with served.http.stream(
        "POST", "/v1/completions", json=LONG | dict(max_tokens=800, stream=True)
    ) as response:
        lines = response.iter_lines()
        next(lines)
        short = served.http.post("/v1/completions", json=LONG | dict(max_tokens=3)).json()
        assert short["choices"][0]["finish_reason"] == "length"
        assert served.upload()["status"] == "ready"
        assert served.service.engine.num_jobs == 1  # the long one is not complete
        assert [line for line in lines if "finish_reason" in line and '"length"' in line]


def test_threads_take_turns_in_order():
    turns, taken = Turns(), []

    def work(name: str) -> None:
        with turns:
            for _ in range(3):
                taken.append(name)
                turns.pass_on()

    with turns:
        threads = []
        for name in "abc":
            threads.append(in_background(lambda name=name: work(name)))
            while len(turns._waiting) < len(threads):
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert "".join(taken) == "abcabcabc"


def test_loaded_memories_stay_within_their_bytes(tiny):
    with running(*tiny, Path("memories")) as server:
        books = [server.upload(f"{i}: {TEXT}")["id"] for i in range(4)]
        states = server.service.states
        size = states.get((books[0],)).num_bytes
        keys = states.get((books[0],)).state.memory_keys
        assert size >= 2 * sum(k.nbytes for k in keys)
        states.size = 2 * size + size // 2  # two of them
        for book in books:
            states.get((book,))
            assert (
                states.num_bytes == sum(s.num_bytes for s in states._loaded.values()) <= states.size
            )
        assert list(states._loaded) == [(books[2],), (books[3],)]
        both = states.get((books[0], books[3]))
        assert torch.equal(states.get((books[0], books[3])).state.open_ids, both.state.open_ids)
        states.size = 1
        assert states.get((books[0],)).chunks and (books[0],) not in states._loaded
        states.size = 3 * size
        states.get((books[1],))
        server.http.delete(f"/v1/memories/{books[1]}")
        assert (books[1],) not in states._loaded
        assert states.num_bytes == sum(s.num_bytes for s in states._loaded.values())
