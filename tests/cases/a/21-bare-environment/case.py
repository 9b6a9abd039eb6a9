"""A container's bare environment: LC_ALL=C, no HOME to write to, HF_HOME elsewhere and empty, read-only working copy's caches; UTF-8
data all the same. Only UIOLLMS_CACHE and the run folder may be written."""
import sys; sys.path.insert(0, __file__.rsplit("/", 2)[0] + "/_lib")
from lib import *

at = work()
tiny(at / "model")
workspace(at, at / "model", task=dict(task_name="files:rows.jsonl"))
import datasets
rows = [dict(text=f"{i} À la carte — 東京. " + TEXT * 2) for i in range(3)]
(at / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
env = dict(LC_ALL="C", LANG="C", HOME="/proc/nowhere", HF_HOME=str(at / "hf"), UIOLLMS_CACHE=str(at / "cache"))
wrong = []
for command in (["train.py", "--env_conf", "env.json"], ["test.py", "--env_conf", "env.json"], ["-m", "uiollms", "report", "out", "--no_attention"],
                ["-m", "uiollms.data", "--sample", "files:rows.jsonl"]):
    code, out, err = run(*command, cwd=at, env=env)
    if code: wrong.append(f"{' '.join(command[:2])}: exit {code}, {last(err, 100)}")
verdict(not wrong, " | ".join(wrong) or "all came through")
