"""Measures training steps of a random model in one process and in two, each pinned to one core.

python benchmarks/scaling.py   # minutes, on a machine whose cores have nothing else to do
python benchmarks/scaling.py --hidden 64 --layers 2 --chunks 4   # seconds, to see that it runs
"""

import argparse
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from transformers import AutoModelForCausalLM, LlamaConfig

from uiollms import MemoryConfig, MemoryLM, Sample, gradient_step
from uiollms.distributed.groups import ALONE, World

MEMORY = MemoryConfig(num_memory=16, chunk_size=128, lora_rank=16, lora_alpha=32)


def make_model(hidden: int, layers: int) -> MemoryLM:
    torch.manual_seed(0)
    heads = dict(num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64)
    sizes = dict(
        vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers
    )
    return MemoryLM(
        AutoModelForCausalLM.from_config(
            LlamaConfig(**sizes, **heads, max_position_embeddings=4096)
        ),
        MEMORY,
    )


def timed(
    rank: int, size: int, mode: str, port: int, args: argparse.Namespace, results: object
) -> None:
    """Measures the median seconds of a training step with its communication, over `args.chunks` + 1
    chunks. In mode "documents" every process has a document; in mode "chunks" they divide one."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    world = World()
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
        )
        world = World(dist.group.WORLD, ranks=size if mode == "chunks" else 1)
    model = make_model(args.hidden, args.layers)
    parameters = list(model.trainable_parameters().values())
    ids = torch.randint(
        3,
        4096,
        (MEMORY.chunk_size * (args.chunks + 1),),
        generator=torch.Generator().manual_seed(world.data.rank),
    )
    sample, seconds = Sample.document(ids, MEMORY.chunk_size), []
    for _ in range(args.repeats + 1):  # the first one warms up
        started = time.perf_counter()
        gradient_step(
            model,
            sample,
            scale=1 / world.data.size,
            group=world.chunks if mode == "chunks" else ALONE,
        )
        world.sum_gradients(parameters)
        model.zero_grad()
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        results.put((statistics.median(seconds[1:]), len(ids) * world.data.size))
    if size > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("hidden", 256), ("layers", 8), ("chunks", 16), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    context = processes.get_context("spawn")
    base = 0.0
    print(
        "| processes | of one document | s a step | tokens / s | against one "
        "|\n|---|---|---|---|---|"
    )
    for size, mode in ((1, "documents"), (2, "documents"), (2, "chunks")):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        results = context.SimpleQueue()
        processes.spawn(timed, (size, mode, port, args, results), nprocs=size)
        seconds, tokens = results.get()
        base = base or tokens / seconds
        sharing = size if mode == "chunks" else 1
        print(
            f"| {size} | {sharing} | {seconds:.3f} | {tokens / seconds:,.0f} | "
            f"{tokens / seconds / base:.2f}x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
