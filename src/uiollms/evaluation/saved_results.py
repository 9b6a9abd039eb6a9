"""Writes and reads the file next to test.json that contains the NLL of every scored token.

Shapes: T' scored tokens of a document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from uiollms.evaluation.results import ScoredTask, TaskScores
from uiollms.evaluation.statistics import DocumentScore
from uiollms.evaluation.summaries import MAX_POSITIONS, TASK_KEYS, checked_task
from uiollms.files.atomic import atomic_file

DIGEST_KEY = "of"  # of the metadata: the sha256 of test.json


def save_token_nlls(results: Sequence[TaskScores], path: Path, test_json: str = "") -> None:
    """Writes the NLL of every scored token into a safetensors file.

    For result r (0-based, in the order of test.json's results) and document d, in every mode:

    `<r>.<d>.<mode>.nll`        [T'] float32, nats
    `<r>.<d>.<mode>.positions`  [T'] int64
    `<r>.<d>.<mode>.loss`       [T'] float32, only where the task distils a teacher

    The metadata describes the results: {"0": '{"task": ..., "task_type": ..., "truncation": ...,
    "chunk_size": ..., "protocol": ...}'}. Its entry "of" is the sha256 of the text `test_json`.
    """
    tensors = {}
    for r, result in enumerate(results):
        for mode, scores in result.scores.items():
            for d, document in scores.items():
                key = f"{r}.{d}.{mode}"
                tensors[f"{key}.nll"] = document.nll.contiguous()
                # The modes share one tensor of positions, which safetensors would refuse.
                tensors[f"{key}.positions"] = document.positions.clone()
                if not torch.equal(document.loss, document.nll):
                    tensors[f"{key}.loss"] = document.loss.contiguous()
    metadata = {
        str(r): json.dumps(dict(zip(TASK_KEYS, astuple(result.task), strict=True)))
        for r, result in enumerate(results)
    }
    metadata[DIGEST_KEY] = digest(test_json.encode())
    with atomic_file(path) as work:
        save_file(tensors, work, metadata)


def load_token_nlls(path: Path, test_json: bytes | None = None) -> list[TaskScores]:
    """Reads the scores that `save_token_nlls` wrote. Texts and right answers are not in the file.

    test_json: the bytes of the test.json that the file has to belong to, or None to skip this
    check. Raises KeyError if the metadata is of another kind of file, ValueError if the tensors
    are, or if the file belongs to another test.json.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if test_json is not None and metadata.pop(DIGEST_KEY, None) not in (
            None,  # earlier versions wrote none
            digest(test_json),
        ):
            raise ValueError(
                "it belongs to another evaluation than test.json, or test.json was edited since"
            )
        found = {int(r): json.loads(text) for r, text in metadata.items() if r != DIGEST_KEY}
        tasks = [ScoredTask(*checked_task(found[r])) for r in range(len(found))]
        scores: list[dict[str, dict[int, DocumentScore]]] = [{} for _ in tasks]
        for key in (key for key in file.keys() if key.endswith(".nll")):
            r, d, mode = key.removesuffix(".nll").split(".", 2)  # a press's arguments may have dots
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
                raise ValueError(f"{key} and its positions are not numbers of the same tokens")
            # Copies of chunks count their tokens from 0. No text scores its first token.
            first = 0 if tasks[int(r)].task_type == "auto encoding" else 1
            if (
                positions.dtype != torch.int64
                or not first <= positions.min() <= positions.max() < MAX_POSITIONS
            ):
                raise ValueError(f"{key}: its positions are not those of a document's tokens")
            scores[int(r)].setdefault(mode, {})[int(d)] = score
    return [TaskScores(*result) for result in zip(tasks, scores, strict=True)]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
