"""Shows the machine, and which kernels attention takes in each precision. Prints JSON lines.

    python -m benchmarks.gpu_kernels

The first line describes the machine and the versions. A line per precision has the kernel that SDPA
chooses with and without a mask, whether rows read memory in place by flash calls
(src/uiollms/kernels/flash_calls.py), and the attention operators of a training step with their
calls. On a GPU the attention kernels that ran in the step are listed too.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
import transformers
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from benchmarks.measure import machine
from benchmarks.models import llama_shape, random_document
from uiollms import MemoryConfig, MemoryLM, Sample, gradient_step
from uiollms.files.json_files import as_json
from uiollms.kernels.devices import disable_cudnn_attention
from uiollms.kernels.flash_calls import supports_flash

PRECISIONS = (torch.bfloat16, torch.float32)  # in fp16 nothing is trained
# Words in the names of the kernels of attention: flash-attn's, torch's memory-efficient ones, and
# cuDNN's.
ATTENTION = ("flash", "fmha", "attention")


def sdpa_choice(dtype: torch.dtype, device: torch.device, masked: bool) -> str:
    """Returns the name of the kernel that SDPA chooses for rows that read memory."""
    query = torch.zeros(2, 4, 64, 64, dtype=dtype, device=device, requires_grad=True)
    key = torch.zeros(2, 4, 96, 64, dtype=dtype, device=device)
    mask = torch.ones(2, 1, 64, 96, dtype=torch.bool, device=device) if masked else None
    chosen = torch._fused_sdp_choice(query, key, key, mask)
    return next(name for name, kind in SDPBackend.__members__.items() if kind.value == chosen)


def attention_of_a_step(dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, int]]:
    """Returns the attention operators of a training step and, on a GPU, its attention kernels, each
    with the number of its calls."""
    torch.manual_seed(0)
    memory = MemoryConfig(chunk_size=64, num_memory=8, lora_rank=4, lora_alpha=8)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(llama_shape(256, 4, 3, 512, 307), dtype=dtype)
    model = MemoryLM(base, memory).to(device)
    model.chunk_batch = 4
    sample = Sample.language_modeling(random_document(model, 8 * 64), 64)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=kinds) as profiled:
        gradient_step(model, sample, estimator="exact", report_all=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    operators: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in profiled.events():
        on_gpu = event.device_type == DeviceType.CUDA
        if not any(word in event.name.lower() for word in ATTENTION):
            continue
        if on_gpu or event.name.startswith("aten::"):
            (kernels if on_gpu else operators)[event.name[:120]] += 1
    return dict(operators=dict(operators), kernels=dict(kernels))


def describe(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = dict(precision=str(dtype))
    found |= dict(masked_sdpa=sdpa_choice(dtype, device, True))
    found |= dict(plain_sdpa=sdpa_choice(dtype, device, False))
    head = torch.empty(0, 64, dtype=dtype, device=device)
    return found | dict(flash_calls=supports_flash(head)) | attention_of_a_step(dtype, device)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda")
    return parser


def main(arguments: list[str] | None = None) -> None:
    device = torch.device(make_parser().parse_args(arguments).device)
    disable_cudnn_attention()
    print(as_json(machine() | dict(transformers=transformers.__version__)), flush=True)
    for dtype in PRECISIONS:
        print(as_json(describe(dtype, device)), flush=True)


if __name__ == "__main__":
    main()
