"""Share a model's folder on the Hugging Face hub: download it, describe it in a model card, upload
it."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData, constants, snapshot_download

from uiollms.config.sections import MemoryConfig
from uiollms.files.errors import ConfigError
from uiollms.files.json_files import read_json
from uiollms.weights.base_models import hub_reachable

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CARD = "README.md"


def downloaded_folder(
    name: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a model: `name` itself if it is a path, else the snapshot of the hub id `name`
    in the hub's cache, downloaded if the hub can be reached. Raises ConfigError if that fails."""
    path = Path(name)
    if path.exists() or isinstance(name, Path) or not HUB_ID.fullmatch(name):
        return path
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only or not hub_reachable(),
            )
        )
    except Exception as error:  # the client raises anything for networks, tokens and servers
        reason = " ".join(str(error).split())[:200]
        if not hub_reachable():
            reason = f"{constants.ENDPOINT} cannot be reached, and no such model is in the cache"
        raise ConfigError(
            f"{name}: there is no such folder, and no model of this name can be had from the hub "
            f"({reason}); check the name, the network, and HF_TOKEN if the model is private"
        ) from None


def upload_folder(
    folder: Path, repo_id: str, private: bool | None, token: str | bool | None, **commit: Any
) -> str:
    """Creates the repository if there is none, uploads a model's folder in one commit, and returns
    the commit's address. A model card that is in the repository already stays as it is."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    left_out = [CARD] if api.file_exists(repo_id, CARD) else None
    commit = {"commit_message": "Upload model", **commit}
    info = api.upload_folder(
        repo_id=repo_id, folder_path=folder, ignore_patterns=left_out, **commit
    )
    return str(info.commit_url)


def model_card(memory: MemoryConfig, base: str, results: str | Path | None = None) -> str:
    """The text of a model's README.md. `base` is the name of the base; `results` is the path of a
    test.json that test.py wrote. Raises ConfigError if that file contains no results."""
    hub_id = base if HUB_ID.fullmatch(base) else None
    data = ModelCardData(
        base_model=hub_id, library_name="uiollms", tags=["uiollms", "long-context", "peft"]
    )
    ratio = memory.chunk_size // memory.num_memory
    fields = memory.model_dump(exclude={"schema_"}).items()
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# Learned memory for {base}",
        "",
        f"The model reads a long text in chunks of {memory.chunk_size} tokens. Each chunk is "
        f"compressed to {memory.num_memory} memory slots, {ratio} tokens to a slot. The base is "
        "frozen; the trained weights are LoRA and token embeddings.",
        "",
        "```python",
        "from uiollms import MemoryLM",
        "",
        'model = MemoryLM.from_pretrained("<this repository>")',
        "```",
        "",
        "| compressor | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in fields),
        "",
    ]
    if results is not None:
        lines += ["## Results", "", "| task | tokens | mode | measure | value |"]
        lines += ["|---|---|---|---|---|", *result_rows(Path(results)), ""]
    return "\n".join(lines)


def result_rows(path: Path) -> list[str]:
    """The rows of a model card's table of results. A mode's row contains its perplexity, or every
    number of a task that has none."""
    found = read_json(path)
    entries = found.get("results") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path}: contains no results; give a test.json that test.py wrote")
    rows = []
    for entry in entries:
        named = f"| {entry.get('task')} ({entry.get('task_type')}) | {entry.get('truncation')} "
        for mode, numbers in entry.items():
            if not isinstance(numbers, dict):
                continue
            if "perplexity" in numbers:
                numbers = {"perplexity": numbers["perplexity"]}
            rows += [
                f"{named}| {mode} | {measure} | {value:.4g} |"
                for measure, value in numbers.items()
                if isinstance(value, int | float) and not fnmatchcase(measure, "*documents")
            ]
    return rows
