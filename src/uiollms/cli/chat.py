"""Compress documents once, ask them often, chat with them in mind.

python -m uiollms compress book.txt -o book.mem
python -m uiollms ask book.mem "Who wrote the letter?" "And why?"
python -m uiollms ask book.mem another.mem "Where do the two disagree?"
python -m uiollms chat --memory book.mem

Run where smollm2-8x.json lies (SmolLM2-135M with the shipped adapter), or say which model:
--env_conf FILE for a config of train.py, --model FOLDER for one saved by save_pretrained. A
memory can be read only by the model that made it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from uiollms.build import load_trained, weights_words
from uiollms.cli.common import Output, output_arguments
from uiollms.cli.options import SEEDS, place, share, temperature, whole
from uiollms.config.load import load_env_config
from uiollms.data.readers.json_lines import MOST_TEXT, check_text
from uiollms.data.tokens import continuation_ids, first_ids, plain_ids, tokenize
from uiollms.files.errors import ConfigError
from uiollms.files.reading import read_text
from uiollms.model.memory import Memory, join
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.state import MemoryState
from uiollms.runs.checks import check_folder
from uiollms.weights.base_models import check_tokenizer
from uiollms.weights.model_folder import load_tokenizer

DEFAULT_CONFIG = "smollm2-8x.json"
LONGEST_LINE = 2**20  # characters of a turn of a chat
# stands for the answer before, where the text of a later turn is cut out of the chat template
ANSWER = "ANSWER"


def main(arguments: list[str] | None = None, stdin: TextIO | None = None) -> None:
    args = make_parser().parse_args(arguments)
    args.run(args, Output.of(args), stdin or sys.stdin)


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m uiollms", description=__doc__, formatter_class=raw
    )
    commands = parser.add_subparsers(required=True, metavar="compress | ask | chat")

    def command(
        name: str, run: Any, help: str, example: str, shown: str, quiet: str
    ) -> argparse.ArgumentParser:
        description = f"{help[0].upper()}{help[1:]}.\n\nexample: python -m uiollms {example}"
        own = commands.add_parser(name, help=help, description=description, formatter_class=raw)
        own.set_defaults(run=run)
        which = own.add_mutually_exclusive_group()
        which.add_argument(
            "--env_conf",
            metavar="FILE",
            default=DEFAULT_CONFIG,
            help=f"environment config ({DEFAULT_CONFIG})",
        )
        which.add_argument("--model", metavar="FOLDER", help="a model saved by save_pretrained")
        output_arguments(own, shown, quiet)
        return own

    what, example = "compress text files into one memory", "compress book.txt -o book.mem"
    own = command(
        "compress",
        run_compress,
        what,
        example,
        "what the memory holds, as one JSON object",
        "no progress bar, no words",
    )
    own.add_argument(
        "files",
        nargs="+",
        type=place,
        metavar="FILE",
        help="UTF-8 text; several are compressed each and joined",
    )
    own.add_argument(
        "-o",
        "--output",
        required=True,
        type=place,
        metavar="NAME.mem",
        help="where the memory goes",
    )

    shown, quiet = "every answer and what is held, a JSON object each,", "the answers alone"
    what, example = (
        "ask memories, each question on its own",
        'ask book.mem "Who wrote the letter?" "And why?"',
    )
    own = command("ask", run_ask, what, example, shown, quiet)
    own.add_argument(
        "items",
        nargs="+",
        metavar="NAME.mem | QUESTION",
        help="memories (joined if several) and questions",
    )
    generation_options(own)

    what, example = (
        "chat: a line in, an answer out, all of it held in memory",
        "chat --memory book.mem",
    )
    own = command("chat", run_chat, what, example, shown, quiet)
    own.add_argument(
        "--memory",
        nargs="+",
        type=place,
        default=[],
        metavar="NAME.mem",
        help="documents to have in mind",
    )
    generation_options(own)
    return parser


def generation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max_new_tokens", type=whole(), default=200, metavar="N", help="longest answer (200)")
    add(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="of sampling; 0 = greedy (0)",
    )
    add(
        "--top_p",
        type=share,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens of share P (1)",
    )
    add("--seed", type=whole(0, SEEDS), default=0, metavar="N", help="of sampling (0)")


# ---- commands ------------------------------------------------------------------------------------


def run_compress(args: argparse.Namespace, output: Output, stdin: TextIO) -> None:
    if args.output.suffix != ".mem":
        raise ConfigError(f"--output {args.output}: the name of a memory ends in .mem")
    check_output(args.output)
    texts = [read_text(path, MOST_TEXT) for path in args.files]
    model, tokenizer = open_model(args, output)
    began = time.monotonic()
    parts = []
    for path, text in zip(args.files, texts, strict=True):
        ids = tokenize(tokenizer, text)
        check_fits(model, len(ids), path)
        shown = dict(desc=path.name, unit="chunk", unit_scale=model.chunk_batch, leave=False)
        parts.append(model.compress(ids, source=path.name, progress=partial(output.bar, **shown)))
    memory = join(parts)
    check_fits(model, memory.num_tokens, "the files together")
    memory.save(args.output)
    seconds = time.monotonic() - began
    held = dict(
        tokens=memory.num_tokens - len(memory.open_ids),
        slots=memory.num_slots,
        open_tokens=len(memory.open_ids),
    )
    output.say(f"{args.output}: {in_words(held)}, {seconds:.1f} s")
    sources = [source.model_dump() for source in memory.sources]
    output.result(memory=str(args.output), sources=sources, held=held, seconds=round(seconds, 3))


def run_ask(args: argparse.Namespace, output: Output, stdin: TextIO) -> None:
    paths = [Path(item) for item in args.items if item.endswith(".mem")]
    questions = [item for item in args.items if not item.endswith(".mem")]
    if not paths or not questions:
        raise ConfigError(
            f"ask: {'no memory (NAME.mem)' if questions else 'no question'} among: "
            f"{' '.join(args.items)}"
        )
    for question in questions:
        check_text(question, "ask: the question")
    model, tokenizer, state = open_memories(args, output, paths)
    for question in questions:
        ids = first_turn(tokenizer, question, state)
        if output.has_words:
            print(f"{question}\n> ", end="", flush=True)
        answer(args, output, model, tokenizer, state, ids, question)


def run_chat(args: argparse.Namespace, output: Output, stdin: TextIO) -> None:
    model, tokenizer, state = open_memories(args, output, args.memory)
    if args.memory:
        say_held(output, state)
    last = None  # the token that the model said last and has not read yet
    for line in lines_of(stdin, prompt="you> " if output.has_words and stdin.isatty() else ""):
        ids = (
            first_turn(tokenizer, line, state)
            if last is None
            else later_turn(tokenizer, line, last)
        )
        state, last = answer(args, output, model, tokenizer, state, ids, line)
        say_held(output, state)


# ---- the parts they share ------------------------------------------------------------------------


def answer(
    args: argparse.Namespace,
    output: Output,
    model: MemoryLM,
    tokenizer: Any,
    state: MemoryState,
    ids: Tensor,
    question: str,
) -> tuple[MemoryState, Tensor]:
    """Read `ids` [1, T] after `state`, write the answer as it comes, or as JSON when it is
    there; the advanced state and the last token [1, 1], which it has not read."""
    check_fits(
        model,
        state.num_tokens + ids.shape[1] + args.max_new_tokens - 1,
        "the question and a longest answer",
    )
    sampling = (
        dict(do_sample=True, temperature=args.temperature, top_p=args.top_p)
        if args.temperature
        else dict(do_sample=False)
    )
    # Without a chat template nothing says where an answer ends: it is the rest of the line.
    stop: dict[str, Any] = (
        {} if tokenizer.chat_template else dict(stop_strings=["\n"], tokenizer=tokenizer)
    )
    streamer = (
        None if output.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    began = time.monotonic()
    said = model.generate(
        ids,
        state=state,
        max_new_tokens=args.max_new_tokens,
        streamer=streamer,
        return_dict_in_generate=True,
        generator=torch.Generator().manual_seed(args.seed),
        **sampling,
        **stop,
    )
    new, seconds = said.sequences[0, ids.shape[1] :], round(time.monotonic() - began, 3)
    text, held = (
        tokenizer.decode(new, skip_special_tokens=True).strip(),
        held_by(said.past_key_values),
    )
    output.result(question=question, answer=text, new_tokens=len(new), held=held, seconds=seconds)
    return said.past_key_values, said.sequences[:, -1:]


def first_turn(tokenizer: Any, question: str, state: MemoryState) -> Tensor:
    """[1, T] token ids of a question behind `state`. What the tokenizer starts every text with
    (BOS, a space, for some) stands at the start of the stream and nowhere else."""
    text, start = turn_text(tokenizer, [question]), first_ids(tokenizer)
    if state.num_tokens:  # a chat template may write BOS too
        text = text.removeprefix("".join(tokenizer.convert_ids_to_tokens(start)))
        return torch.tensor([continuation_ids(tokenizer, text)], dtype=torch.int64)
    ids = plain_ids(tokenizer, text)
    return torch.tensor([ids if ids[: len(start)] == start else start + ids], dtype=torch.int64)


def later_turn(tokenizer: Any, question: str, last: Tensor) -> Tensor:
    """[1, T] token ids of a question behind an answer whose last token [1, 1] has not been read
    yet."""
    text = turn_text(tokenizer, ["-", ANSWER, question]).partition(ANSWER)[2]
    ids = torch.tensor([continuation_ids(tokenizer, text)], dtype=torch.int64)
    return ids if torch.equal(ids[:, :1], last) else torch.cat([last, ids], dim=1)


def turn_text(tokenizer: Any, said: list[str]) -> str:
    """The user's and the model's words in turn, up to where the model speaks: in the tokenizer's
    chat template, or in plain words without one."""
    if not tokenizer.chat_template:
        return "".join(
            f" {s}" if i % 2 else f"\n\nQuestion: {s}\nAnswer:" for i, s in enumerate(said)
        )
    turns = [{"role": ("user", "assistant")[i % 2], "content": s} for i, s in enumerate(said)]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def open_model(
    args: argparse.Namespace, output: Output
) -> tuple[MemoryLM, PreTrainedTokenizerBase]:
    """The model that the arguments name, whose weights are the command's first line, and its
    tokenizer."""
    if args.model:
        model, tokenizer = (
            MemoryLM.from_pretrained(args.model, device_map="auto"),
            load_tokenizer(args.model),
        )
        check_tokenizer(tokenizer, model.config, args.model)
        output.say(weights_words(args.model, model))
        return model, tokenizer
    if args.env_conf == DEFAULT_CONFIG and not Path(DEFAULT_CONFIG).exists():
        raise ConfigError(
            f"there is no {DEFAULT_CONFIG} here; say which model: --env_conf FILE, or --model "
            "FOLDER"
        )
    model, tokenizer, weights = load_trained(load_env_config(args.env_conf), args.env_conf)
    output.say(weights_words(weights, model))
    return model, tokenizer


def open_memories(
    args: argparse.Namespace, output: Output, paths: list[Path]
) -> tuple[MemoryLM, PreTrainedTokenizerBase, MemoryState]:
    """The model, its tokenizer, and a stream that holds the memories; files are read before the
    model is loaded."""
    memories = [Memory.load(path) for path in paths]
    model, tokenizer = open_model(args, output)
    for path, memory in zip(paths, memories, strict=True):
        memory.check(model, path)
    if not memories:
        return model, tokenizer, model.new_state()
    joined = join(memories)
    check_fits(model, joined.num_tokens, "the memories together")
    return model, tokenizer, joined.state(model)


def check_fits(model: MemoryLM, num_tokens: int, what: str | Path) -> None:
    try:
        model.check_length(num_tokens)
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from None


def check_output(path: Path) -> None:
    """Raises ConfigError where no memory can be written, or would replace anything else."""
    check_folder(path.parent, path.parent)
    if os.path.lexists(path):
        try:
            Memory.load(path)
        except ConfigError as error:
            what = f"--output {path}: would be replaced, but it is no memory ({error})"
            raise ConfigError(f"{what}; move it, or choose another name") from None


def lines_of(stdin: TextIO, prompt: str) -> Iterator[str]:
    """Lines with something on them, up to the end of the input or /quit. Raises ConfigError for one
    that is no text in the input's encoding."""
    for number in count(1):
        print(prompt, end="", flush=True)
        where = f"stdin: line {number}"
        try:
            line = stdin.readline(LONGEST_LINE + 1)
        except UnicodeDecodeError as error:
            what = f"not text in {error.encoding}; PYTHONUTF8=1 reads UTF-8"
            raise ConfigError(f"{where}: {what}") from None
        if len(line) > LONGEST_LINE:
            remedy = "compress longer texts and give them with --memory"
            raise ConfigError(f"{where}: more than {LONGEST_LINE:,} characters; {remedy}")
        mark = "\ufeff" if number == 1 else ""  # PowerShell's pipes begin with one
        text = line.removeprefix(mark).strip()
        if not line or text == "/quit":
            return
        if text:
            check_text(text, where)
            yield text


def held_by(state: MemoryState) -> dict[str, int]:
    """tokens: in memory slots; slots: of a layer; open_tokens: of the chunk that is not full
    yet, held as they are."""
    open_tokens = state.open_ids.shape[1]
    return dict(
        tokens=state.num_tokens - open_tokens, slots=state.num_slots, open_tokens=open_tokens
    )


def say_held(output: Output, state: MemoryState) -> None:
    output.say(f"[held: {in_words(held_by(state))}]")


def in_words(held: dict[str, int]) -> str:
    return (
        f"{held['tokens']:,} tokens in {held['slots']:,} memory slots (+ {held['open_tokens']:,} "
        "open tokens)"
    )
