"""Compresses documents into memories, answers questions about them, and chats with them.

uiollms compress book.txt -o book.mem
uiollms ask book.mem "Who wrote the letter?" "And why?"
uiollms ask book.mem another.mem "Where do the two disagree?"
uiollms chat --memory book.mem

The default model is that of smollm2-8x.json, in the working directory or of this package
(SmolLM2-135M with the shipped adapter). --env_conf FILE selects the model of another config of
train.py, and --model FOLDER a model saved by save_pretrained. Only the model that made a memory can
read it.
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

from uiollms.build import describe_weights, load_trained
from uiollms.cli.common import Output, output_arguments
from uiollms.cli.options import MAX_SEED, file_path, fraction, temperature, whole_number
from uiollms.config.load import load_env_config
from uiollms.data.prompts import conversation_text, following_ids
from uiollms.data.readers.fields import check_text
from uiollms.data.readers.json_lines import MOST_TEXT
from uiollms.data.tokens import continuation_ids, tokenize
from uiollms.files.errors import ConfigError
from uiollms.files.reading import read_text
from uiollms.model.memory import Memory, join
from uiollms.model.memory_lm import MemoryLM
from uiollms.model.state import MemoryState
from uiollms.runs.checks import check_folder
from uiollms.weights.base_models import check_tokenizer
from uiollms.weights.model_folder import load_tokenizer

DEFAULT_CONFIG = "smollm2-8x.json"
MAX_LINE = 2**20  # characters of a turn of a chat
# Placeholder of the answer before. The text of a later turn follows it in the chat template.
ANSWER = "ANSWER"


def main(arguments: list[str] | None = None, stdin: TextIO | None = None) -> None:
    args = make_parser().parse_args(arguments)
    args.run(args, Output.from_arguments(args), stdin or sys.stdin)


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="uiollms", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="compress | ask | chat")

    def command(
        name: str, run: Any, help: str, example: str, json_output: str, quiet: str
    ) -> argparse.ArgumentParser:
        description = f"{help[0].upper()}{help[1:]}.\n\nexample: uiollms {example}"
        subparser = commands.add_parser(
            name, help=help, description=description, formatter_class=raw
        )
        subparser.set_defaults(run=run)
        model_options(subparser)
        output_arguments(subparser, json_output, quiet)
        return subparser

    compress = command(
        "compress",
        run_compress,
        "compress text files into one memory",
        "compress book.txt -o book.mem",
        "the contents of the memory, as one JSON object",
        "print no text and no progress bars",
    )
    compress.add_argument(
        "files",
        nargs="+",
        type=file_path,
        metavar="FILE",
        help="UTF-8 text; several files are compressed separately and joined",
    )
    compress.add_argument(
        "-o",
        "--output",
        required=True,
        type=file_path,
        metavar="NAME.mem",
        help="file that the memory is written to",
    )

    json_output = "every answer and the contents of memory, as one JSON object each"
    quiet = "print the answers only"
    ask = command(
        "ask",
        run_ask,
        "answer questions about memories, each question separately",
        'ask book.mem "Who wrote the letter?" "And why?"',
        json_output,
        quiet,
    )
    ask.add_argument(
        "items",
        nargs="+",
        metavar="NAME.mem | QUESTION",
        help="memories, which are joined, and questions",
    )
    generation_options(ask)

    chat = command(
        "chat",
        run_chat,
        "chat: answer every line of the input; the whole chat becomes memory",
        "chat --memory book.mem",
        json_output,
        quiet,
    )
    chat.add_argument(
        "--memory",
        nargs="+",
        type=file_path,
        default=[],
        metavar="NAME.mem",
        help="memories that the chat starts with",
    )
    generation_options(chat)
    return parser


def model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `open_model` reads."""
    models = parser.add_mutually_exclusive_group()
    models.add_argument(
        "--env_conf",
        metavar="FILE",
        default=DEFAULT_CONFIG,
        help=f"environment config ({DEFAULT_CONFIG})",
    )
    models.add_argument("--model", metavar="FOLDER", help="a model saved by save_pretrained")


def generation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--max_new_tokens",
        type=whole_number(),
        default=200,
        metavar="N",
        help="tokens of the longest answer (200)",
    )
    add(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="temperature of sampling; 0 is greedy (0)",
    )
    add(
        "--top_p",
        type=fraction,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens whose probabilities sum to P (1)",
    )
    add(
        "--seed",
        type=whole_number(0, MAX_SEED),
        default=0,
        metavar="N",
        help="seed of sampling (0)",
    )


# ---- commands ------------------------------------------------------------------------------------


def run_compress(args: argparse.Namespace, output: Output, stdin: TextIO) -> None:
    if args.output.suffix != ".mem":
        raise ConfigError(f"--output {args.output}: the file name of a memory must end in .mem")
    check_output(args.output)
    texts = [read_text(path, MOST_TEXT) for path in args.files]
    model, tokenizer = open_model(args, output)
    began = time.monotonic()
    parts = []
    for path, text in zip(args.files, texts, strict=True):
        ids = tokenize(tokenizer, text)
        check_fits(model, len(ids), path)
        progress = partial(
            output.bar, desc=path.name, unit="chunk", unit_scale=model.chunk_batch, leave=False
        )
        parts.append(model.compress(ids, source=path.name, progress=progress))
    memory = join(parts)
    check_fits(model, memory.num_tokens, "the files together")
    memory.save(args.output)
    seconds = time.monotonic() - began
    contents = dict(
        tokens=memory.num_tokens - len(memory.open_ids),
        slots=memory.num_slots,
        open_tokens=len(memory.open_ids),
    )
    output.print_text(f"{args.output}: {contents_text(contents)}, {seconds:.1f} s")
    sources = [source.model_dump() for source in memory.sources]
    output.print_json(
        memory=str(args.output), sources=sources, held=contents, seconds=round(seconds, 3)
    )


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
        if output.prints_text:
            print(f"{question}\n> ", end="", flush=True)
        answer(args, output, model, tokenizer, state, ids, question)


def run_chat(args: argparse.Namespace, output: Output, stdin: TextIO) -> None:
    model, tokenizer, state = open_memories(args, output, args.memory)
    if args.memory:
        print_contents(output, state)
    last = None  # the last token of the answer before, which the model has not read yet
    for line in lines_of(stdin, prompt="you> " if output.prints_text and stdin.isatty() else ""):
        ids = (
            first_turn(tokenizer, line, state)
            if last is None
            else later_turn(tokenizer, line, last)
        )
        state, last = answer(args, output, model, tokenizer, state, ids, line)
        print_contents(output, state)


# ---- common functions ----------------------------------------------------------------------------


def answer(
    args: argparse.Namespace,
    output: Output,
    model: MemoryLM,
    tokenizer: Any,
    state: MemoryState,
    ids: Tensor,
    question: str,
) -> tuple[MemoryState, Tensor]:
    """Reads `ids` [1, T] after `state` and prints the answer, token by token or as JSON at the
    end. Returns the state, and the last token [1, 1], which the state does not contain yet."""
    check_fits(
        model,
        state.num_tokens + ids.shape[1] + args.max_new_tokens - 1,
        "the question and the longest answer",
    )
    sampling = (
        dict(do_sample=True, temperature=args.temperature, top_p=args.top_p)
        if args.temperature
        else dict(do_sample=False)
    )
    # Without a chat template an answer has no end token. It ends with its line.
    stop: dict[str, Any] = (
        {} if tokenizer.chat_template else dict(stop_strings=["\n"], tokenizer=tokenizer)
    )
    streamer = (
        None if output.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    began = time.monotonic()
    generated = model.generate(
        ids,
        state=state,
        max_new_tokens=args.max_new_tokens,
        streamer=streamer,
        return_dict_in_generate=True,
        generator=torch.Generator().manual_seed(args.seed),
        **sampling,
        **stop,
    )
    new, seconds = generated.sequences[0, ids.shape[1] :], round(time.monotonic() - began, 3)
    state = generated.past_key_values
    output.print_json(
        question=question,
        answer=tokenizer.decode(new, skip_special_tokens=True).strip(),
        new_tokens=len(new),
        held=contents_of(state),
        seconds=seconds,
    )
    return state, generated.sequences[:, -1:]


def first_turn(tokenizer: Any, question: str, state: MemoryState) -> Tensor:
    """Token ids [1, T] of a question after `state`."""
    ids = following_ids(tokenizer, turn_text(tokenizer, [question]), state.num_tokens)
    return torch.tensor([ids], dtype=torch.int64)


def later_turn(tokenizer: Any, question: str, last: Tensor) -> Tensor:
    """Token ids [1, T] of a question after an answer whose last token [1, 1] has not been read
    yet."""
    text = turn_text(tokenizer, ["-", ANSWER, question]).partition(ANSWER)[2]
    ids = torch.tensor([continuation_ids(tokenizer, text)], dtype=torch.int64)
    return ids if torch.equal(ids[:, :1], last) else torch.cat([last, ids], dim=1)


def turn_text(tokenizer: Any, turns: list[str]) -> str:
    """Formats the turns of user and model, alternately, as `conversation_text` does."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": s} for i, s in enumerate(turns)]
    return conversation_text(tokenizer, messages)


def open_model(
    args: argparse.Namespace, output: Output
) -> tuple[MemoryLM, PreTrainedTokenizerBase]:
    """Loads the model that the arguments name, and its tokenizer. Prints which weights it has."""
    if args.model:
        model, tokenizer = (
            MemoryLM.from_pretrained(args.model, device_map="auto"),
            load_tokenizer(args.model),
        )
        check_tokenizer(tokenizer, model.base.config, args.model)
        output.print_text(describe_weights(args.model, model))
        return model, tokenizer
    model, tokenizer, weights = load_trained(load_env_config(args.env_conf), args.env_conf)
    output.print_text(describe_weights(weights, model))
    return model, tokenizer


def open_memories(
    args: argparse.Namespace, output: Output, paths: list[Path]
) -> tuple[MemoryLM, PreTrainedTokenizerBase, MemoryState]:
    """Loads the memories, then the model and its tokenizer -> model, tokenizer, and a state that
    contains the memories."""
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
    """Raises ConfigError if the file cannot be written, or if it exists and is not a memory."""
    check_folder(path.parent, path.parent)
    if os.path.lexists(path):
        try:
            Memory.load(path)
        except ConfigError as error:
            what = f"--output {path}: the existing file is not a memory ({error})"
            raise ConfigError(f"{what}; move it, or choose another name") from None


def lines_of(stdin: TextIO, prompt: str) -> Iterator[str]:
    """Yields the lines that are not blank, up to the end of the input or /quit. Raises ConfigError
    for a line that the input's encoding cannot decode, or that is too long."""
    for number in count(1):
        print(prompt, end="", flush=True)
        where = f"stdin: line {number}"
        try:
            line = stdin.readline(MAX_LINE + 1)
        except UnicodeDecodeError as error:
            what = f"not text in {error.encoding}; PYTHONUTF8=1 reads UTF-8"
            raise ConfigError(f"{where}: {what}") from None
        if len(line) > MAX_LINE:
            remedy = "compress longer texts and give them with --memory"
            raise ConfigError(f"{where}: more than {MAX_LINE:,} characters; {remedy}")
        mark = "\ufeff" if number == 1 else ""  # PowerShell's pipes start with this mark
        text = line.removeprefix(mark).strip()
        if not line or text == "/quit":
            return
        if text:
            check_text(text, where)
            yield text


def contents_of(state: MemoryState) -> dict[str, int]:
    """Numbers that describe a state.

    tokens:      tokens that were compressed into memory slots
    slots:       memory slots per layer
    open_tokens: tokens of the last chunk, which is not full yet and not compressed
    """
    open_tokens = state.open_ids.shape[1]
    return dict(
        tokens=state.num_tokens - open_tokens, slots=state.num_slots, open_tokens=open_tokens
    )


def print_contents(output: Output, state: MemoryState) -> None:
    output.print_text(f"[memory: {contents_text(contents_of(state))}]")


def contents_text(contents: dict[str, int]) -> str:
    return (
        f"{contents['tokens']:,} tokens in {contents['slots']:,} memory slots (+ "
        f"{contents['open_tokens']:,} open tokens)"
    )
