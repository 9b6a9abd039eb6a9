"""Compresses caches with a press of kvpress, and runs rows of tokens after them. A program of its
own, for the Python of an environment that has kvpress and imports nothing of uiollms:

    python press_worker.py FOLDER

kvpress needs an older transformers than uiollms may have, and replaces attention functions when it
is imported. FOLDER contains jobs.json and jobs.safetensors, which `presses.py` describes; the
worker writes results.safetensors and then results.json there.

Shapes: T tokens of a context, R tokens of a row, N scored tokens of a row, D hidden size, L layers,
H key/value heads.
"""

import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

JUST_BELOW = 1e-9  # of a ratio, so that products with lengths do not round to the next integer


def make_press(name: str, arguments: dict[str, Any], context: int, slots: int) -> Any:
    """Returns a press that keeps `slots` of `context` keys and values of each head and layer.
    Presses compute int(T * (1 - ratio)), and those that mask drop int(L * H * T * ratio) of all
    keys. Raises ValueError for an unknown name."""
    import kvpress

    known = sorted(n for n in vars(kvpress) if n.endswith("Press") and n != "BasePress")
    if name not in known:
        raise ValueError(f"kvpress has no {name}; it has {', '.join(known)}")
    ratio = (context - slots) / context - JUST_BELOW
    return getattr(kvpress, name)(**arguments, compression_ratio=ratio)


def kept_slots(model: Any, cache: Any, context: int, slots: int) -> tuple[float, bool]:
    """Returns the mean number of slots that a head of a layer kept, and whether the others were
    only masked. Raises ValueError if it differs from `slots`: for caches of one length at all, for
    others by more than 1 in the mean."""
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    heads = cache.layers[0].keys.shape[1]
    masks = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    masked = sum(len(mask[0]) for mask in masks if mask is not None) / heads
    kept = (sum(lengths) - masked) / len(lengths)
    exact = len(set(lengths)) == 1 and not masked
    if kept != slots if exact else abs(kept - slots) > 1:
        raise ValueError(f"the press kept {kept:g} of {context} slots, {slots} were to be kept")
    return kept, bool(masked)


class Model:
    """The base, with one press."""

    def __init__(self, jobs: dict[str, Any]) -> None:
        from transformers import AutoModelForCausalLM

        self.device = torch.device(jobs["device"])
        self.base = AutoModelForCausalLM.from_pretrained(
            jobs["base"], dtype=getattr(torch, jobs["dtype"]), attn_implementation="sdpa"
        )
        torch.nn.Module.to(self.base, self.device).eval()
        self.name, self.arguments = jobs["press"], jobs["arguments"]

    def compress(self, context: torch.Tensor, slots: int) -> tuple[Any, float, bool]:
        """Returns the cache of a context [T], how many slots a head of a layer keeps in the mean,
        and whether the others are only masked."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in self.base.model.layers:
            layer.self_attn.masked_key_indices = None  # of the context before
        if not len(context):
            return cache, 0.0, False
        if len(context) <= slots:
            self.base.model(input_ids=context[None], past_key_values=cache)
            return cache, float(len(context)), False
        press = make_press(self.name, self.arguments, len(context), slots)
        with press(self.base):
            self.base.model(input_ids=context[None], past_key_values=cache)
        return cache, *kept_slots(self.base, cache, len(context), slots)

    def read(self, ids: torch.Tensor, cache: Any, start: int) -> torch.Tensor:
        """Returns the normed hidden states [R, D] of tokens [R] at positions `start` .. after what
        the cache contains, and adds them to it."""
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        return self.base.model(
            input_ids=ids[None], past_key_values=cache, position_ids=positions
        ).last_hidden_state[0]

    def measure(self, context: torch.Tensor, row: torch.Tensor, slots: int, steps: int) -> Any:
        """Returns seconds to compress a context [T], seconds a token of the row read one by one,
        with logits, and the bytes by which memory rises above the loaded model. With a press that
        only masks, memory is None."""
        with PeakMemory(self.device) as peak:
            start = self.now()
            cache, kept, masked = self.compress(context, slots)
            compressed = self.now()
            for i in range(1 + steps):
                if i == 1:  # the first one makes space in the cache
                    first = self.now()
                hidden = self.read(row[i : i + 1], cache, len(context) + i)
                self.base.lm_head(hidden)
            last = self.now()
        return dict(
            slots=kept,
            compress_seconds=compressed - start,
            token_seconds=(last - first) / steps,
            peak_bytes=None if masked else peak.bytes,
        )

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class PeakMemory:
    """Measures how far memory rises within a context, as the class of the same name does that
    measures uiollms."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
            return self
        trim_heap()
        self.start = self.peak = resident_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, resident_bytes())

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.start
            return
        self.done.set()
        self.thread.join()
        self.bytes = max(self.peak, resident_bytes()) - self.start


def trim_heap() -> None:
    """Returns freed memory to the system, where the C library can."""
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def main(folder: Path) -> None:
    jobs = json.loads((folder / "jobs.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "jobs.safetensors")
    torch.set_num_threads(jobs["threads"])
    model = Model(jobs)
    hidden, slots = {}, []
    with torch.no_grad():
        for i, num_slots in enumerate(jobs["slots"]):
            context, row, scored = (
                tensors[f"{i}.{name}"].to(model.device) for name in ("context", "row", "scored")
            )
            cache, kept, _ = model.compress(context, num_slots)
            hidden[str(i)] = model.read(row, cache, len(context))[scored].cpu().contiguous()
            slots.append(kept)
        cost = None
        if jobs["measured"] is not None:
            i = jobs["measured"]
            context, row = (tensors[f"{i}.{n}"].to(model.device) for n in ("context", "row"))
            cost = model.measure(context, row, jobs["slots"][i], jobs["steps"])
    save_file(hidden, folder / "results.safetensors")
    (folder / "results.json").write_text(json.dumps(dict(slots=slots, cost=cost)), encoding="utf-8")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main(Path(sys.argv[1]))
