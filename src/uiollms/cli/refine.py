"""Goes on training the memory of one document, with all weights frozen, by context distillation.

uiollms refine book.mem -o refined.mem --steps 200
uiollms refine book.mem -o refined.mem --steps 400 --resume
uiollms refine book.mem -o refined.mem --control other.mem --json

Two eighths of the document's passages are not trained on. One selects the step with the best slots,
which are the result. The other measures them: the bound is the NLL of these passages after the
control's memory minus their NLL after the memory itself, in nats a token. The control is another
document, or by default the tokens of the document in random order. The NLL after as many raw tokens
as the memory has slots, which are those before the passage, stands beside.
"""

from __future__ import annotations

import argparse
import time

import torch

from uiollms.cli.chat import model_options, open_model
from uiollms.cli.common import Output, output_arguments
from uiollms.cli.options import file_path, fraction, whole_number
from uiollms.files.errors import ConfigError
from uiollms.model.memory import Memory
from uiollms.model.memory_lm import MemoryLM
from uiollms.training.refine import Refinement, Settings

SAVE_EVERY = 20  # steps; the slots are also tried at these steps


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    output = Output.from_arguments(args)
    if args.output.suffix != ".mem":
        raise ConfigError(f"--output {args.output}: the file name of a memory must end in .mem")
    if args.output.resolve() == args.memory.resolve():
        raise ConfigError(f"--output {args.output}: is the memory itself; choose another name")
    state_path = args.output.with_name(args.output.name + ".state")
    if args.resume and not state_path.exists():
        raise ConfigError(f"{state_path}: not found; begin without --resume")
    memory = Memory.load(args.memory)
    other = Memory.load(args.control) if args.control else None
    model, _ = open_model(args, output)
    settings = Settings(args.passage_size, args.passages, args.lr, args.seed)
    refinement = Refinement(model, memory, settings, args.memory)
    if other is None:
        control = shuffled_tokens(model, memory, args.seed)
    else:
        other.check(model, args.control)
        control = other
    nll = dict(
        control=refinement.nll(list(control.slots)),
        recent=refinement.nll_of_recent(),
        before=refinement.nll(list(memory.slots)),
    )
    if args.resume:
        refinement.load_state(state_path)
    began = time.monotonic()
    for _ in (bar := output.bar(range(refinement.num_steps, args.steps), unit="step")):
        loss = refinement.step()
        bar.set_postfix_str(f"KL {loss:.4f}", refresh=False)
        if refinement.num_steps % SAVE_EVERY == 0 or refinement.num_steps == args.steps:
            refinement.select()
            refinement.save_state(state_path)
    refinement.memory().save(args.output)
    nll["after"] = refinement.nll(refinement.best_slots())
    report(args, output, refinement, nll, time.monotonic() - began)


def shuffled_tokens(model: MemoryLM, memory: Memory, seed: int) -> Memory:
    """Compresses the memory's tokens in random order."""
    assert memory.chunk_ids is not None
    text = memory.chunk_ids.flatten()
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))
    return model.compress(text[order], source="its tokens in random order")


def report(
    args: argparse.Namespace,
    output: Output,
    refinement: Refinement,
    nll: dict[str, float],
    seconds: float,
) -> None:
    """Prints the result. nll: of the measuring passages after the control, after as many recent raw
    tokens as slots, after the memory as it was (before) and after the refined one."""
    bound = {when: nll["control"] - nll[when] for when in ("before", "after")}
    name = args.control.name if args.control else "its tokens in random order"
    output.print_text(
        f"{args.output}: the slots of step {refinement.best_step} of {refinement.num_steps}, "
        f"{seconds:.1f} s\n"
        f"NLL of {len(refinement.held_out)} held-out passages, nats a token: "
        f"{nll['before']:.4f} -> {nll['after']:.4f}; after the control ({name}) "
        f"{nll['control']:.4f}; after as many recent raw tokens as slots {nll['recent']:.4f}\n"
        f"bound {bound['before']:+.4f} -> {bound['after']:+.4f}"
    )
    output.print_json(
        memory=str(args.output),
        control=name,
        steps=refinement.num_steps,
        best_step=refinement.best_step,
        seconds=round(seconds, 3),
        passages=len(refinement.held_out),
        nll=nll,
        bound=bound,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uiollms refine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("memory", type=file_path, metavar="NAME.mem", help="memory that `uiollms compress` made")
    add("-o", "--output", required=True, type=file_path, metavar="NAME.mem", help="refined memory")
    model_options(parser)
    add("--control", type=file_path, metavar="NAME.mem", help="memory of another document")
    add("--steps", type=whole_number(), default=200, metavar="N", help="steps in all (200)")
    defaults = Settings()
    add(
        "--passage_size",
        type=whole_number(2),
        default=defaults.passage_size,
        metavar="N",
        help=f"tokens of a passage ({defaults.passage_size})",
    )
    add(
        "--passages",
        type=whole_number(),
        default=defaults.num_passages,
        metavar="N",
        help=f"passages of a step ({defaults.num_passages})",
    )
    add(
        "--lr",
        type=fraction,
        default=defaults.lr,
        metavar="X",
        help=f"learning rate, for slots divided by their root mean square ({defaults.lr})",
    )
    add("--seed", type=whole_number(0), default=0, metavar="N", help="seed of the passages (0)")
    add(
        "--resume",
        action="store_true",
        help=f"continue from NAME.mem.state, which is written every {SAVE_EVERY} steps",
    )
    output_arguments(parser, "the result, as one JSON object", "print no text and no progress bar")
    return parser
