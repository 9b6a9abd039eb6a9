"""The attacks: hostile configs, options and environment variables, hostile data, damaged
checkpoints, models and memories, and kills. Each attack changes a copy of the workspace and returns
a description and the steps to run."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz.mutate import (
    make_special,
    mutate_bytes,
    mutate_json,
    mutate_tensors,
    repeat_key,
)
from fuzz.trials import Step, Trial
from fuzz.workspace import ASK, COMPRESS, DATA, TEST, TRAIN
from uiollms.files.atomic import sha256

BEGIN = [*TRAIN, "--restart"]
GO_ON = [*TRAIN, "--resume"]
PLAN = [*TRAIN, "--dry_run"]
REPORT = ["uiollms.cli.report", "out"]
CONVERT = ["uiollms.cli.convert", "--env_conf", "env.json", "out/ckp", "copy"]
# These fields are not changed. A value could lead out of the folder of the trial, or correctly
# require hours of training.
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
ASK_OPTIONS = ["--max_new_tokens", "--temperature", "--top_p", "--seed"]
STUDY = ["uiollms.cli.study", "recall"]


def draw_trial(
    kind: str, seed: int, attack: Callable[[Random, Path], tuple[str, list[Step]]], number: int
) -> Trial:
    """Returns the trial of this number, which depends on seed, kind and number alone."""
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
        make_path_targets(rng, folder)
        save(path, mutate_json(rng, good, FIXED))
    elif what == "bytes":
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    elif what == "twice":
        save(path, repeat_key(rng, good))
        return f"{name} {what}", [Step(command, codes=(2,))]
    elif what == "special":
        what = make_special(rng, path)
        return f"{name} {what}", [Step(command, codes=(2,))]
    elif what == "set":
        make_path_targets(rng, folder)
        field, value = draw_override(rng, mutate_json(rng, good, FIXED), good)
        return f"--set {field[:60]}", [Step([*BEGIN, f"--set={field}={value}"])]
    elif what == "option":
        return attack_option(rng)
    else:
        return attack_variable(rng, folder)
    return f"{name} {what}", [Step(command)]


def draw_override(rng: Random, text: str, good: Any) -> tuple[str, str]:
    """Returns a field of the config and a hostile value for it in JSON."""
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
    return rng.choice(fields or wild), value


def attack_option(rng: Random) -> tuple[str, list[Step]]:
    value = rng.choice(ABSURD)
    kind = rng.choice(["ask", "ask", "data", "memory", "study", "report", "name"])
    if kind == "ask":
        option = rng.choice(ASK_OPTIONS)
        more = [] if option == "--temperature" else ["--temperature=1"]
        if option != "--max_new_tokens":
            more.append("--max_new_tokens=3")
        return f"ask {option}", [Step([*ASK, f"{option}={value}", *more])]
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
    commands = [[*ASK[:2], name, *ASK[3:]], [*COMPRESS[:2], name, *COMPRESS[3:]]]
    return "names", [Step(rng.choice(commands))]


def attack_variable(rng: Random, folder: Path) -> tuple[str, list[Step]]:
    if rng.random() < 0.3:
        name = rng.choice(FOLDERS)
        kind = make_special(rng, folder / "odd")
        return f"{name} {kind}", [Step(BEGIN, variables={name: str(folder / "odd")})]
    name = rng.choice(NUMBERED)
    value = rng.choice([v for v in ABSURD if "\0" not in v and v not in ("0", "-1", "")])
    return name, [Step(rng.choice([BEGIN, TEST, ASK]), codes=(2,), variables={name: value})]


def make_path_targets(rng: Random, folder: Path) -> None:
    """Sometimes makes special files to which a path in a config may lead."""
    if rng.random() < 0.3:
        for name in ("pipe", "zero", "loop"):
            make_special(rng, folder / name)


# ---- data ----------------------------------------------------------------------------------------


DATA_FILES = ["book0.txt", "lines.jsonl", "lines.jsonl", "packed.jsonl.gz", "rows.parquet"]
DATA_FILES += ["raw_data/minipile_copy_256.json"]


def attack_data(rng: Random, folder: Path) -> tuple[str, list[Step]]:
    name = rng.choice(DATA_FILES)
    path = folder / name
    how = rng.choice(["bytes"] * 6 + ["special", "inside"])
    if how == "special":
        how = make_special(rng, path)
    elif how == "inside" and name in ("lines.jsonl", "packed.jsonl.gz"):
        rows = [
            json.loads(line)
            for line in (folder / "lines.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        lines = [rng.choice([mutate_json, repeat_key])(rng, row).replace("\n", " ") for row in rows]
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
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
    """Attacks a file of a checkpoint, of weights, of a base model or a memory. The file is changed,
    deleted, renamed, joined by another file, or replaced by a special file."""
    targets = {
        "out/checkpoints/step-00000002": [*GO_ON, "--set=train.train_iters=3"],
        "out/ckp": rng.choice([TEST, CONVERT, ASK]),
        "base": rng.choice([TEST, PLAN, ASK, BEGIN]),
        "book.mem": ASK,
        "out": rng.choice([[*REPORT, "--no_attention"], GO_ON]),
    }
    target = rng.choice(list(targets))
    command, top = targets[target], folder / target
    inner = top.iterdir() if target == "out" else top.rglob("*")
    files = [top] if top.is_file() else sorted(path for path in inner if path.is_file())
    path = rng.choice(files)
    how = rng.choice(["inside"] * 5 + ["gone", "renamed", "extra", "special"])
    if how == "inside":
        mutate_file(rng, path)
    elif how == "gone":
        path.unlink()
    elif how == "renamed":
        path.rename(path.with_name("x" + path.name))
    elif how == "extra":
        name = rng.choice(["extra", "x" + path.name, "config.json.x"])
        shutil.copyfile(path, path.with_name(name))
    else:
        how = make_special(rng, path)
    sums = folder / "out/checkpoints/step-00000002/checksums.json"
    if path.is_relative_to(sums.parent) and path != sums and rng.random() < 0.5:
        how += ", with a new checksum"
        renew_checksum(sums, path)
    return f"{path.relative_to(folder)} {how}", [Step(command)]


def mutate_file(rng: Random, path: Path) -> None:
    if path.suffix == ".json" and rng.random() < 0.7:
        good = json.loads(path.read_text(encoding="utf-8"))
        save(path, rng.choice([mutate_json, mutate_json, repeat_key])(rng, good))
    elif path.suffix in (".safetensors", ".mem"):
        path.write_bytes(mutate_tensors(rng, path.read_bytes()))
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))


def renew_checksum(sums: Path, path: Path) -> None:
    """Writes the correct checksum of a changed file, as an attacker would."""
    checksums = json.loads(sums.read_text(encoding="utf-8"))
    if path.is_file() and path.stat().st_size < 2**30:
        checksums[path.relative_to(sums.parent).as_posix()] = sha256(path)
        sums.write_text(json.dumps(checksums), encoding="utf-8")


# ---- kills ---------------------------------------------------------------------------------------


def attack_with_kill(
    rng: Random, folder: Path, seconds: dict[str, float]
) -> tuple[str, list[Step]]:
    """Kills a command at a random moment. `seconds` are the times that undisturbed commands take.
    The next commands read what it has written or was writing."""
    name = rng.choice(list(KILLABLE))
    command, after = KILLABLE[name]
    if name == "begin":
        shutil.rmtree(folder / "out")
    if name == "compress" and rng.random() < 0.5:
        (folder / "book.mem").unlink()
        after = [(COMPRESS, (0,)), *after]
    moment = rng.uniform(0.0, 0.9 * seconds[name])
    steps = [Step(command, codes=(0,), kill=moment)]
    steps += [Step(following, codes=codes) for following, codes in after]
    return f"{name} after {moment:.2f} s", steps


MORE = "--set=train.train_iters=5"
# name -> the command that is killed, and the next commands with the exit codes that they may have
KILLABLE: dict[str, tuple[list[str], list[tuple[list[str], tuple[int, ...]]]]] = {
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


def undisturbed_step(name: str) -> Step:
    """Returns a step that runs the command without killing it."""
    return Step(KILLABLE[name][0], codes=(0,))
