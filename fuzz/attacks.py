"""What is tried: hostile configs, options and environments; data; checkpoints, models and
memories; kills."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz.mutate import (
    changed_bytes,
    changed_json,
    changed_tensors,
    doubled_key,
    make_special,
    packed,
)
from fuzz.trials import Step, Trial
from fuzz.world import ASK, COMPRESS, DATA, TEST, TRAIN, call
from uiollms.files.atomic import sha256

BEGIN = [*TRAIN, "--restart"]
GO_ON = [*TRAIN, "--resume"]
PLAN = [*TRAIN, "--dry_run"]
REPORT = ["uiollms.cli.report", "out"]
CONVERT = ["uiollms.cli.convert", "--env_conf", "env.json", "out/ckp", "copy"]
# Fields that stay: a value could lead out of the trial's folder, or rightly ask for hours of
# training.
FIXED = ("run_dir", "save_ckp", "offload_dir", "train_iters")
ABSURD = [
    "-1",
    "0",
    "1.5",
    "1e999",
    "nan",
    "inf",
    "9" * 5000,
    "99999999999999999999",
    "",
    "abc",
    "1e-300",
    "\0",
    "²",
    "0x1",
]
MEMORIES = [
    "1e999GiB",
    "-1GiB",
    "nanGiB",
    "24",
    "24GiB," * 200,
    "0GiB",
    "9999999999TiB",
    "GiB",
    ",",
    "1GiB,x",
]
NUMBERED = [
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_PORT",
    "SLURM_NTASKS",
    "PMI_SIZE",
]
FOLDERS = ["UIOLLMS_CACHE", "UIOLLMS_RAW_DATA", "UIOLLMS_HUB_DIR"]
ASKED = ["--max_new_tokens", "--temperature", "--top_p", "--seed"]
STUDY = ["uiollms.cli.study", "recall"]


def drawn(
    kind: str, seed: int, attack: Callable[[Random, Path], tuple[str, list[Step]]], number: int
) -> Trial:
    rng = Random(f"{seed} {kind} {number}")
    return Trial(kind, number, lambda folder: attack(rng, folder))


def save(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


# ---- configs, options, environments --------------------------------------------------------------


def attack_config(rng: Random, folder: Path) -> tuple[str, list[Step]]:
    what = rng.choice(
        ["field"] * 5 + ["bytes", "twice", "special", "set", "set", "option", "option", "variable"]
    )
    name = rng.choice(["env.json"] * 3 + ["memory.json", "test.json"])
    command = {
        "env.json": rng.choice([BEGIN, BEGIN, PLAN, TEST]),
        "memory.json": BEGIN,
        "test.json": TEST,
    }[name]
    path = folder / name
    good = json.loads(path.read_text(encoding="utf-8"))
    if what == "field":
        put_around(rng, folder)
        save(path, changed_json(rng, good, FIXED))
    elif what == "bytes":
        path.write_bytes(changed_bytes(rng, path.read_bytes()))
    elif what == "twice":
        save(path, doubled_key(rng, good))
        return f"{name} {what}", [Step(command, codes=(2,))]
    elif what == "special":
        what = make_special(rng, path)
        return f"{name} {what}", [Step(command, codes=(2,))]
    elif what == "set":
        put_around(rng, folder)
        field, _, value = flat(rng, changed_json(rng, good, FIXED), good)
        return f"--set {field[:60]}", [Step([*BEGIN, f"--set={field}={value}"])]
    elif what == "option":
        return attack_option(rng)
    else:
        return attack_variable(rng, folder)
    return f"{name} {what}", [Step(command)]


def flat(rng: Random, text: str, good: Any) -> tuple[str, str, str]:
    """A field of the config, and a hostile value for it in JSON."""
    sections = [
        f"{part}.{key}" for part in ("model", "train") if part in good for key in good[part]
    ]
    wild = [
        "train.corpus.0.name",
        "train.corpus.-1.name",
        "train.corpus.9999.name",
        "a" + ".a" * 3000,
        "train.tasks.0.x",
        "",
    ]
    fields = [f for f in (*sections, *wild) if f.split(".")[-1] not in FIXED]
    values = [part for part in text.replace("\0", " ").split("\n") if part.strip()]
    value = rng.choice(values).strip().rstrip(",").partition(": ")[2] or rng.choice(ABSURD)
    return rng.choice(fields or wild), "=", value


def attack_option(rng: Random) -> tuple[str, list[Step]]:
    value = rng.choice(ABSURD)
    kind = rng.choice(["ask", "ask", "data", "memory", "study", "report", "name"])
    if kind == "ask":
        option = rng.choice(ASKED)
        more = [] if option == "--temperature" else ["--temperature=1"]
        return f"ask {option}", [
            Step([*ASK, f"{option}={value}", *more, *["--max_new_tokens=3"] * (option != ASKED[0])])
        ]
    if kind == "data":
        return "data -n", [Step(["uiollms.cli.data", "--sample", "files:book*.txt", f"-n={value}"])]
    if kind == "memory":
        return "--device_memory", [Step([*PLAN, f"--device_memory={rng.choice(MEMORIES)}"])]
    if kind == "study":
        option = rng.choice(["--distances", "--S", "--iterations", "--seeds"])
        bad = rng.choice([v for v in ABSURD if v != "0x1"])
        return f"study {option}", [Step([*STUDY, "--out", "copy", f"{option}={bad}"], codes=(2,))]
    if kind == "report":
        return "report", [Step([*REPORT, f"--attention_tokens={value}"])]
    name = rng.choice(
        [
            "a\0b.mem",
            "a\udcff.mem",
            "pipe.mem",
            ".mem",
            "x" * 300 + ".mem",
            "no/where.mem",
            "a\n\x1b[31m.mem",
        ]
    )
    return "names", [
        Step(rng.choice([[*ASK[:2], name, *ASK[3:]], [*COMPRESS[:2], name, *COMPRESS[3:]]]))
    ]


def attack_variable(rng: Random, folder: Path) -> tuple[str, list[Step]]:
    if rng.random() < 0.3:
        name = rng.choice(FOLDERS)
        kind = make_special(rng, folder / "odd")
        return f"{name} {kind}", [Step(BEGIN, variables={name: str(folder / "odd")})]
    name = rng.choice(NUMBERED)
    value = rng.choice([v for v in ABSURD if "\0" not in v and v not in ("0", "-1", "")])
    return name, [Step(rng.choice([BEGIN, TEST, ASK]), codes=(2,), variables={name: value})]


def put_around(rng: Random, folder: Path) -> None:
    """Things that a path in a config may lead to."""
    if rng.random() < 0.3:
        for name in ("pipe", "zero", "loop"):
            make_special(rng, folder / name)


DATA_FILES = ["book0.txt", "lines.jsonl", "lines.jsonl", "packed.jsonl.gz", "rows.parquet"]
DATA_FILES += ["raw_data/minipile_copy_256.json"]

# ---- data ----------------------------------------------------------------------------------------


def attack_data(rng: Random, folder: Path) -> tuple[str, list[Step]]:
    name = rng.choice(
        [
            "book0.txt",
            "lines.jsonl",
            "lines.jsonl",
            "packed.jsonl.gz",
            "rows.parquet",
            "raw_data/minipile_copy_256.json",
        ]
    )
    path = folder / name
    how = rng.choice(["bytes"] * 6 + ["special", "inside"])
    if how == "special":
        how = make_special(rng, path)
    elif how == "inside" and name in ("lines.jsonl", "packed.jsonl.gz"):
        rows = [
            json.loads(line)
            for line in (folder / "lines.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        lines = [
            rng.choice([changed_json, doubled_key])(rng, row).replace("\n", " ") for row in rows
        ]
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        path.write_bytes(packed(data) if name.endswith(".gz") else data)
    else:
        path.write_bytes(changed_bytes(rng, path.read_bytes()))
    corpus = "minipile copy 256.train" if name.startswith("raw_data") else f"files:{name}"
    if name == "book0.txt" and rng.random() < 0.3:
        return f"compress {how}", [Step(COMPRESS)]
    if rng.random() < 0.2:
        changes = [
            f"--set=train.corpus.0.name={corpus}",
            "--set=train.tasks=[]",
            "--set=train.train_iters=1",
        ]
        return f"train on {name} {how}", [Step([*BEGIN, *changes])]
    return f"{name} {how}", [Step([*DATA, corpus])]


# ---- checkpoints, models, memories ---------------------------------------------------------------


def attack_saved(rng: Random, folder: Path) -> tuple[str, list[Step]]:
    """A file of a checkpoint, of weights, of a base model or of a memory: changed, gone, renamed,
    joined by another, or something else than a file."""
    targets = {
        "out/checkpoints/step-00000002": [*GO_ON, "--set=train.train_iters=3"],
        "out/ckp": rng.choice([TEST, CONVERT, ASK]),
        "base": rng.choice([TEST, PLAN, ASK, BEGIN]),
        "book.mem": ASK,
        "out": rng.choice([[*REPORT, "--no_attention"], GO_ON]),
    }
    place = rng.choice(list(targets))
    command, top = targets[place], folder / place
    files = (
        [top]
        if top.is_file()
        else sorted(p for p in (top.iterdir() if place == "out" else top.rglob("*")) if p.is_file())
    )
    path = rng.choice(files)
    how = rng.choice(["inside"] * 5 + ["gone", "renamed", "extra", "special"])
    if how == "inside":
        change_inside(rng, path)
    elif how == "gone":
        path.unlink()
    elif how == "renamed":
        path.rename(path.with_name("x" + path.name))
    elif how == "extra":
        shutil.copyfile(
            path, path.with_name(rng.choice(["extra", "x" + path.name, "config.json.x"]))
        )
    else:
        how = make_special(rng, path)
    sums = folder / "out/checkpoints/step-00000002/checksums.json"
    if path.is_relative_to(sums.parent) and path != sums and rng.random() < 0.5:
        how += ", sealed again"
        seal_again(sums, path)
    return f"{path.relative_to(folder)} {how}", [Step(command)]


def change_inside(rng: Random, path: Path) -> None:
    if path.suffix == ".json" and rng.random() < 0.7:
        good = json.loads(path.read_text(encoding="utf-8"))
        save(path, rng.choice([changed_json, changed_json, doubled_key])(rng, good))
    elif path.suffix in (".safetensors", ".mem"):
        path.write_bytes(changed_tensors(rng, path.read_bytes()))
    else:
        path.write_bytes(changed_bytes(rng, path.read_bytes()))


def seal_again(sums: Path, path: Path) -> None:
    """Make a changed file's checksum right, as whoever means harm would."""
    listed = json.loads(sums.read_text(encoding="utf-8"))
    if path.is_file() and path.stat().st_size < 2**30:
        listed[path.relative_to(sums.parent).as_posix()] = sha256(path)
        sums.write_text(json.dumps(listed), encoding="utf-8")


# ---- kills ---------------------------------------------------------------------------------------


def attack_by_kill(rng: Random, folder: Path, seconds: dict[str, float]) -> tuple[str, list[Step]]:
    """A command is killed at a random moment of the time that it takes (`seconds`); what it has
    written or was writing serves the next commands."""
    name = rng.choice(list(KILLED))
    command, after = KILLED[name]
    if name == "begin":
        shutil.rmtree(folder / "out")
    if name == "compress" and rng.random() < 0.5:
        (folder / "book.mem").unlink()
        after = [(COMPRESS, (0,)), *after]
    moment = rng.uniform(0.0, 0.9 * seconds[name])
    steps = [Step(command, codes=(0,), kill=moment)]
    return f"{name} after {moment:.2f} s", steps + [
        Step(next_one, codes=codes) for next_one, codes in after
    ]


MORE = "--set=train.train_iters=5"
# name -> what is killed, and what has to end with which codes afterwards
KILLED: dict[str, tuple[list[str], list[tuple[list[str], tuple[int, ...]]]]] = {
    "begin": (
        [*TRAIN, MORE],
        [([*GO_ON, MORE], (0,)), (TEST, (0,)), (ASK[:2] + ["book.mem", "Who?"] + ASK[4:], (0, 2))],
    ),
    "resume": ([*GO_ON, MORE], [([*GO_ON, MORE], (0,)), (TEST, (0,))]),
    "restart": ([*BEGIN, MORE], [([*GO_ON, MORE], (0,)), (TEST, (0,))]),
    "test": (TEST, [(TEST, (0,)), ([*REPORT, "--no_attention"], (0,))]),
    "compress": (COMPRESS, [(ASK, (0,)), (COMPRESS, (0,))]),
    "convert": (
        CONVERT,
        [
            (CONVERT, (0,)),
            ([*TEST, "--set=model.save_ckp=copy", "--set=train.run_dir=out/again"], (0,)),
        ],
    ),
    "report": (REPORT, [(REPORT, (0,))]),
}
ATTACKS = {"configs": attack_config, "data": attack_data, "saved": attack_saved}


def time_of(name: str) -> Step:
    """A step that runs undisturbed what would be killed."""
    return Step(KILLED[name][0], codes=(0,))


__all__ = ["ATTACKS", "KILLED", "attack_by_kill", "call", "drawn", "time_of"]
