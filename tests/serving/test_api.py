"""Tests the answers of the server, with OpenAI's own client."""

import io
import json

from server import NAME

from uiollms.cli.chat import main


def test_answers_equal_those_of_ask(served, tiny, capsys):
    model, _ = tiny
    model.save_pretrained("model", include_base=True, tokenizer=tiny[1])
    capsys.readouterr()
    (path,) = served.service.store.folder.glob("*.mem")
    options = ["--model", "model", "--max_new_tokens=9", "--json"]
    for question in ("Why?", "Who was it? " * 12):  # the second is longer than a chunk
        main(["ask", str(path), question, *options], io.StringIO())
        expected = json.loads(capsys.readouterr().out)
        found = served.openai.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": question}],
            max_tokens=9,
            temperature=0,
            extra_body={"memory": served.book},
        )
        (choice,) = found.choices
        assert choice.message.content.strip() == expected["answer"]
        assert choice.finish_reason in ("stop", "length")
