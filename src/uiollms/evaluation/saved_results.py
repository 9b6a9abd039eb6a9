"""Every scored token's NLL in a file beside test.json, written and read.

Shapes: T' scored tokens of a document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from uiollms.evaluation.results import DocumentScore, TaskResult
from uiollms.evaluation.summaries import ABOUT, MOST_POSITIONS, checked_about
from uiollms.files.atomic import replacing

OF = "of"


def save_token_nlls(results: Sequence[TaskResult], path: Path, of: str = "") -> None:
    """Every scored token's NLL in a safetensors file: `<r>.<d>.<mode>.nll` [T'] float32, nats,
    of result r (0-based, in the order of test.json's results) and document d in a mode; beside
    each `.positions` [T'] int64; with a teacher also `.loss`. The file's metadata describes the
    results: {"0": '{"task": ..., "task_type": ..., "truncation": ..., "chunk_size": ...,
    "protocol": ...}'}, and holds the sha256 of test.json's text, `of`, as "of"."""
    tensors = {}
    for r, result in enumerate(results):
        for mode, scores in result.scores.items():
            for d, document in scores.items():
                key = f"{r}.{d}.{mode}"
                tensors[f"{key}.nll"] = document.nll.contiguous()
                tensors[f"{key}.positions"] = document.positions.clone()  # shared by the modes
                if not torch.equal(document.loss, document.nll):
                    tensors[f"{key}.loss"] = document.loss.contiguous()
    about = {
        str(r): json.dumps(dict(zip(ABOUT, x.about, strict=True))) for r, x in enumerate(results)
    }
    with replacing(path) as work:
        save_file(tensors, work, about | {OF: digest(of.encode())})


def load_token_nlls(path: Path, of: bytes | None = None) -> list[TaskResult]:
    """The results of which `save_token_nlls` wrote the file, with all its numbers (texts and
    right answers are not among them). of: the bytes of test.json, or None. Raises KeyError for
    another file's metadata, ValueError for what is not such a file or belongs to another
    test.json."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if of is not None and metadata.pop(OF, digest(of)) != digest(of):
            raise ValueError("it is of another evaluation than test.json, or that was edited since")
        about = {int(r): json.loads(text) for r, text in metadata.items() if r != OF}
        results = [TaskResult(*checked_about(about[r])) for r in range(len(about))]
        for key in (key for key in file.keys() if key.endswith(".nll")):
            r, d, mode, _ = key.split(".")
            nll, positions = file.get_tensor(key), file.get_tensor(f"{r}.{d}.{mode}.positions")
            loss = f"{r}.{d}.{mode}.loss"
            score = DocumentScore(
                nll, file.get_tensor(loss) if loss in file.keys() else nll, positions
            )
            if (
                not nll.is_floating_point()
                or nll.dim() != 1
                or not len(nll)
                or positions.shape != nll.shape
            ):
                raise ValueError(f"{key} and its positions are no numbers of the same tokens")
            if (
                positions.dtype != torch.int64
                or not 0 < positions.min() <= positions.max() < MOST_POSITIONS
            ):
                raise ValueError(f"{key}: its positions are none of a document")
            results[int(r)].scores.setdefault(mode, {})[int(d)] = score
    return results


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
