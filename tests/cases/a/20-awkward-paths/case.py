"""Folders with spaces, letters beyond ASCII, # and %, and [brackets] (glob's own signs) in their names: model, config, data, weights,
report, memory; and a `files:` name that is a file is that file, brackets or not."""
import sys; sys.path.insert(0, __file__.rsplit("/", 2)[0] + "/_lib")
from lib import *

top = work()
wrong = []
for name in ("my models ü", "50% #1", "[v1] data"):
    at = top / name
    tiny(at / "tiny model")
    workspace(at, at / "tiny model")
    pattern = f"files:{at}/book0.txt"
    env = json.loads((at / "env.json").read_text())
    env["train"]["corpus"][0]["name"] = pattern
    (at / "env.json").write_text(json.dumps(env))
    for command in (["train.py", "--env_conf", at / "env.json", "--quiet"], ["test.py", "--env_conf", at / "env.json", "--quiet"],
                    ["-m", "uiollms", "compress", at / "book0.txt", "-o", at / "a b.mem", "--env_conf", "env.json", "--quiet"],
                    ["-m", "uiollms", "ask", at / "a b.mem", "Who?", "--env_conf", "env.json", "--max_new_tokens", "2", "--quiet"],
                    ["-m", "uiollms", "report", at / "out", "--no_attention"]):
        code, out, err = run(*command, cwd=at)
        if code:
            wrong.append(f"{name}: {command[0] if command[0] != '-m' else ' '.join(map(str, command[1:3]))} exit {code}, {last(err, 90)}")
            break
verdict(not wrong, " | ".join(wrong) or "all came through")
