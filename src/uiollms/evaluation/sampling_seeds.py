"""Seeds of lm-eval's requests, so that an answer does not depend on other requests."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch


def repetitions(requests: Sequence[Any]) -> list[int]:
    """How often each request occurs before itself in the list. lm-eval repeats a request by
    listing the same object again."""
    counts: Counter[int] = Counter()
    found = []
    for request in requests:
        found.append(counts[id(request)])
        counts[id(request)] += 1
    return found


def sampling_seed(ids: list[int], settings: dict[str, Any], repetition: int) -> int:
    """The seed that a request is sampled with. It depends on the prompt, the settings, the number
    of earlier repetitions and torch's seed (lm-eval's --seed), but not on other requests."""
    text = json.dumps(
        [torch.initial_seed(), ids, settings, repetition], sort_keys=True, default=str
    )
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
