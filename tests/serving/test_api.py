"""Tests the answers of the server, with OpenAI's own client."""

import io
import json
import os
import re
import subprocess
from pathlib import Path

import openai
import pytest
import torch
from server import NAME, TEXT

from uiollms.cli.chat import main
from uiollms.data.prompts import following_ids
from uiollms.data.tokens import document_ids
from uiollms.model.memory import Memory, join


def chat(served, question: str = "Why?", **options):
    options = dict(max_tokens=9, temperature=0) | options
    extra = {name: options.pop(name) for name in ("memory", "attention") if name in options}
    messages = [{"role": "user", "content": question}]
    return served.openai.chat.completions.create(
        model=NAME, messages=messages, extra_body=extra, **options
    )


def complete(served, prompt="The clocks", **options):
    options = dict(max_tokens=9, temperature=0) | options
    extra = {name: options.pop(name) for name in ("memory", "attention") if name in options}
    return served.openai.completions.create(model=NAME, prompt=prompt, extra_body=extra, **options)


def test_answers_equal_those_of_ask(served, tiny, capsys):
    model, _ = tiny
    model.save_pretrained("model", include_base=True, tokenizer=tiny[1])
    capsys.readouterr()
    (path,) = served.service.store.folder.glob("*.mem")
    options = ["--model", "model", "--max_new_tokens=9", "--json"]
    for question in ("Why?", "Who was it? " * 12):  # the second is longer than a batch of chunks
        main(["ask", str(path), question, *options], io.StringIO())
        expected = json.loads(capsys.readouterr().out)
        (choice,) = chat(served, question, memory=served.book).choices
        assert choice.message.content.strip() == expected["answer"]
        assert choice.finish_reason in ("stop", "length")


def test_completions_equal_those_of_generate(served, tiny):
    """After no memory, one and two, for a text and for its token ids, in one piece and in pieces
    that are read ahead."""
    model, tokenizer = tiny
    other = served.upload("Another book, of other things. " * 5, "other.txt")["id"]
    load = {id: Memory.load(served.service.store.path(id, ".mem")) for id in (served.book, other)}
    for memories in ([], [served.book], [other, served.book]):
        state = join([load[id] for id in memories]).state(model) if memories else model.new_state()
        for prompt in ("The clocks", "Where is it? " * 20):
            ids = following_ids(tokenizer, prompt, state.num_tokens)
            expected = model.generate(
                torch.tensor([ids]), state=state, max_new_tokens=9, do_sample=False
            )
            text = tokenizer.decode(expected[0, len(ids) :], skip_special_tokens=True)
            for given in (prompt, ids):
                found = complete(served, given, memory=memories)
                assert found.choices[0].text == text
                assert found.usage.prompt_tokens == len(ids)
                assert found.usage.completion_tokens == expected.shape[1] - len(ids)
                assert found.usage.memory_tokens == state.num_tokens


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_p": 0.9, "seed": 3}])
def test_streaming_equals_not_streaming(served, options):
    options |= dict(max_tokens=60, memory=served.book)
    usage = dict(stream=True, stream_options={"include_usage": True})
    (whole,) = complete(served, **options).choices
    *chunks, last = complete(served, **options, **usage)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text != ""
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert not last.choices and last.usage.completion_tokens <= 60
    (whole,) = chat(served, **options).choices
    *chunks, last = chat(served, **options, **usage)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.message.content
    assert len({chunk.id for chunk in chunks}) == 1


def test_an_answer_ends_before_its_stop_string(served):
    whole = complete(served, max_tokens=80, memory=served.book).choices[0].text
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    for stream in (False, True):
        found = complete(
            served, max_tokens=80, memory=served.book, stop=[stop, "@@@"], stream=stream
        )
        choices = [chunk.choices[0] for chunk in found] if stream else found.choices
        assert "".join(choice.text for choice in choices) == expected
        assert choices[-1].finish_reason == "stop"


def test_a_seed_decides_a_sampled_answer(served):
    def sample(**options) -> str:
        return complete(served, max_tokens=30, temperature=2, **options).choices[0].text

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    assert len({sample() for _ in range(3)}) == 3


REFUSED = [
    (404, "model_not_found", dict(model="gpt")),
    (404, "memory_not_found", dict(memory="mem-0")),
    (404, "memory_not_found", dict(memory="../../etc/passwd")),
    (400, "invalid_request", dict(n=2)),
    (400, "invalid_request", dict(tools=[{"type": "function"}])),
    (400, "invalid_request", dict(logprobs=True)),
    (400, "invalid_request", dict(top_k=5)),
    (400, "invalid_request", dict(temperature=-1)),
    (400, "invalid_request", dict(temperature=1e-9)),
    (400, "invalid_request", dict(top_p=0)),
    (400, "invalid_request", dict(seed=2**63)),
    (400, "invalid_request", dict(stop=[""])),
    (400, "invalid_request", dict(max_tokens="9")),
    (400, "invalid_request", dict(messages=[])),
    (400, "invalid_request", dict(messages=[{"role": "tool", "content": "x"}])),
    (400, "max_tokens_too_large", dict(max_tokens=1025)),
    (400, "context_length_exceeded", dict(max_tokens=900)),
    (400, "context_length_exceeded", dict(messages=[{"role": "user", "content": "x" * 900}])),
]


@pytest.mark.parametrize("stream", [False, True])
def test_refused_requests_get_openais_errors(served, stream):
    body = dict(messages=[{"role": "user", "content": "Hi"}], memory=served.book, stream=stream)
    for status, code, changes in REFUSED:
        found = served.http.post("/v1/chat/completions", json=body | changes)
        error = found.json()["error"]
        assert (found.status_code, error["code"]) == (status, code), changes
        assert error["message"] and {"type", "param"} <= error.keys()
        (name,) = changes
        if code == "invalid_request":
            assert name in error["message"]
    with pytest.raises(openai.NotFoundError, match="the model of this server is 'tiny'"):
        served.openai.completions.create(model="gpt", prompt="x")


def test_bodies_that_are_no_requests_are_refused(served):
    json_type = {"content-type": "application/json"}
    bad = [b"", b"{", b"[" * 100_000, b"\xff", b'{"prompt": []}', b'{"\\ud800": 1, "prompt": "x"}']
    bad += [b'{"prompt": "\\ud800"}', b'{"prompt": "x", "stop": "\\ud800"}']
    for content in bad:
        found = served.http.post("/v1/completions", content=content, headers=json_type)
        assert found.status_code == 400 and found.json()["error"]["message"], content[:20]
    assert served.http.post("/v1/completions", json={"prompt": [10**9]}).status_code == 400
    assert served.http.get("/v1/nothing").json()["error"]["code"] == "invalid_request"
    assert served.http.get("/v1/completions").status_code == 405


def test_fields_without_effect_are_accepted(served):
    neutral = dict(n=1, presence_penalty=0, logit_bias={}, tools=[], logprobs=False, user="me")
    found = chat(served, memory=served.book, **neutral)
    assert (
        found.choices[0].message.content
        == chat(served, memory=served.book).choices[0].message.content
    )
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    messages = [{"role": "user", "content": parts, "name": "me"}]
    body = dict(messages=messages, max_completion_tokens=9, memory=served.book)
    other = served.http.post("/v1/chat/completions", json=body).json()
    assert other["choices"][0]["message"]["content"] == found.choices[0].message.content


def test_models_lists_the_model_with_its_sizes(served):
    (model,) = served.openai.models.list().data
    assert (model.id, model.capacity, model.chunk_size, model.num_memory) == (NAME, 926, 16, 2)


def test_a_document_is_compressed_listed_read_and_deleted(served, tiny):
    model, tokenizer = tiny
    expected = model.compress(TEXT, tokenizer, source="book.txt")
    found = Memory.load(served.service.store.path(served.book, ".mem"), model)
    assert torch.equal(found.slots, expected.slots) and found.sources == expected.sources
    ids = document_ids(tokenizer, TEXT)
    (listed,) = served.http.get("/v1/memories").json()["data"]
    full = len(ids) // 16
    numbers = dict(tokens=len(ids), chunks=full, chunks_done=full, tokens_in=16 * full)
    numbers |= dict(slots_out=2 * full, open_tokens=len(ids) % 16, ratio=8.0, bytes=len(TEXT))
    assert listed | numbers | dict(id=served.book, name="book.txt", status="ready") == listed
    chunk = served.http.get(f"/v1/memories/{served.book}/chunks/2").json()
    assert chunk["text"] == tokenizer.decode(ids[32:48])
    assert served.http.get(f"/v1/memories/{served.book}/chunks/{full}").status_code == 404
    body = dict(name="later", text="A short text.")
    short = served.wait(served.http.post("/v1/memories", json=body).json()["id"])
    assert (short["status"], short["name"], short["slots_out"], short["ratio"]) == (
        "ready",
        "later",
        0,
        None,
    )
    assert chat(served, memory=short["id"]).usage.memory_tokens == 13
    assert served.http.delete(f"/v1/memories/{served.book}").json()["deleted"]
    assert served.http.delete(f"/v1/memories/{served.book}").status_code == 404
    with pytest.raises(openai.NotFoundError, match="there is no memory"):
        chat(served, memory=served.book)
    assert {path.stem for path in served.service.store.folder.glob("mem-*")} == {short["id"]}


def test_documents_that_cannot_be_compressed_fail_with_the_reason(served):
    long, binary = served.upload("x" * 927), served.upload(b"\xff\xfe\x00", "image.png")
    assert long["status"] == binary["status"] == "failed"
    assert "927 tokens, the capacity is 926" in long["error"]
    assert binary["error"] == "the document cannot be read: byte 0 is not UTF-8"
    with pytest.raises(openai.ConflictError, match="is failed: the document has 927 tokens"):
        chat(served, memory=long["id"])


def test_the_examples_of_the_documentation_run(served, capsys):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    (python,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = python.replace("http://127.0.0.1:8000", served.url).replace("smollm2-8x", NAME)
    exec(code, {"memory_id": served.book})
    expected = chat(served, "Who wrote it?", memory=served.book, max_tokens=None)
    assert capsys.readouterr().out == expected.choices[0].message.content + "\n"
    (shell,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    Path("book.txt").write_text(TEXT)
    commands = shell.replace("localhost:8000", f"localhost:{served.port}").replace(" -s ", " -sS ")
    done = subprocess.run(
        ["bash", "-c", commands.replace("\ncurl", "\necho; curl")],
        env=os.environ | {"ID": served.book},
        capture_output=True,
        text=True,
    )
    uploaded, shown, answered = (json.loads(line) for line in done.stdout.splitlines() if line)
    assert uploaded["object"] == "memory" and shown["status"] == "ready", done.stderr
    assert answered["choices"][0]["message"]["content"] == expected.choices[0].message.content
