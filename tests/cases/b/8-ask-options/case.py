"""Options and input of compress, ask and chat that no model can serve: exit 2 and one line; values without a meaning are not taken."""
from tiny import *
workspace(tasks=[]); bad = []
import uiollms.__main__
C = lambda *a: (lambda: call("uiollms.__main__", *a, "--env_conf", "env.json"))
assert forked(lambda: call("train.py", "--env_conf", "env.json"), timeout=60)[0] == 0
Path("t.txt").write_text("It was a day. " * 20); assert forked(C("compress", "t.txt", "-o", "t.mem"), timeout=60)[0] == 0
def trial(name, function, want=(2,), stdin=None):
    code, text, _ = forked(function, timeout=30, stdin=stdin)
    if code not in want or "Traceback" in text: bad.append(f"{name} ({'taken' if code == 0 else last(text)[:40]})")
for option in ("--max_new_tokens=0", "--max_new_tokens=-5", "--temperature=-1", "--temperature=nan", "--temperature=1e-300", "--seed=99999999999999999999"):
    trial(option, C("ask", "t.mem", "Who?", option, *([] if "max_new" in option else ["--max_new_tokens=3"])), want=(0, 2) if "1e-300" in option else (2,))
for option in ("--top_p=0", "--top_p=2", "--top_p=nan", "--temperature=inf"):
    trial(option, C("ask", "t.mem", "Who?", option, "--max_new_tokens=3", *(["--temperature=1"] if "top_p" in option else [])))
trial("a question that is not UTF-8", C("ask", "t.mem", "a\udcff", "--max_new_tokens=3"), want=(0, 2))
Path("in").write_bytes(b"hello\n\xff\xfe\n"); trial("chat input that is not UTF-8", C("chat", "--max_new_tokens=3"), want=(0, 2), stdin="in")
trial("compress a\\0b", C("compress", "a\0b", "-o", "x.mem")); trial("-o a\\0b", C("compress", "t.txt", "-o", "a\0b.mem"))
trial("data -n -1", lambda: call("uiollms.cli.data", "--sample", "files:book*.txt", "-n", "-1"))
trial("--device_memory 1e999GiB", lambda: call("train.py", "--env_conf", "env.json", "--dry_run", "--device_memory=1e999GiB"))
verdict(not bad, f"{len(bad)} of 16: {'; '.join(bad)[:420]}")
