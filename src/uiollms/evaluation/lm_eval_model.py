"""Runs the tasks of lm-eval on a model with memory.

From a shell, use the command `uiollms eval` (uiollms/cli/lm_eval.py):

uiollms eval --model uiollms --model_args env_conf=smollm2-8x.json --tasks arc_easy

In a program, import this module and call lm_eval.simple_evaluate(model="uiollms",
model_args="env_conf=smollm2-8x.json", tasks=...).

Shapes: T tokens, B continuations of one context, V vocabulary, l chunk_size, m num_memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from uiollms.build import load_trained
from uiollms.config.load import load_env_config
from uiollms.data.sample import IGNORED, Sample
from uiollms.data.tokens import common_prefix_length, document_ids, plain_ids
from uiollms.evaluation.base_prompts import (
    ANSWER_MODES,
    base_prompt,
    generate_with_base,
    log_probability,
)
from uiollms.evaluation.sampling_seeds import repetitions, sampling_seed
from uiollms.evaluation.scoring import token_losses
from uiollms.files.errors import ConfigError, shortened
from uiollms.kernels.devices import to_device
from uiollms.kernels.indexing import batched
from uiollms.model.state import MemoryState, select_recent_ids

DEFAULT_NEW_TOKENS = 256  # of generate_until, as in lm-eval's Hugging Face model


@register_model("uiollms")
class HarnessLM(TemplateLM):
    """The model of an environment config, with the interface that lm-eval calls.

    env_conf:   the environment config
    weights:    a checkpoint; by default the weights that test.py evaluates
    batch_size: number of continuations of one context that are scored in one call
    device:     has no effect, because the config's model.device_map places the model (lm-eval's
                command line always passes cuda:0)
    mode:       what answers a request: "memory", or the base after the tokens that
                uiollms/evaluation/base_prompts.py describes ("raw", "window", "recent",
                "streaming", "bm25")
    settings:   fields of the config, as in --set of train.py, such as model.model_dtype=fp32

    Texts up to the capacity are read whole, neither cut nor split into sliding windows: full
    chunks become memory. A longer text raises ConfigError before anything is computed, and so
    does one that is longer than the base's positions in mode "raw". No prompt is truncated.

    Requests are answered in the order of their tokens. If a text begins with the same chunks as
    the text before it, those chunks are not compressed again. An answer depends on its request
    only, not on the order of tasks, on --limit or on other requests. With batch_size 1 this holds
    to the last bit; continuations that are scored in one batch differ by rounding.

    Special tokens are those of lm-eval's Hugging Face model: the tokenizer's tokens at the start
    of a text, and BOS (EOS without one) before an empty context and before a document.
    """

    def __init__(
        self,
        env_conf: str,
        weights: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        mode: str = "memory",
        **settings: Any,
    ) -> None:
        super().__init__()
        if mode not in ANSWER_MODES:
            raise ConfigError(f"mode {mode!r} is unknown; allowed are {', '.join(ANSWER_MODES)}")
        self.mode = mode
        digits = str(batch_size)
        # Longer numbers overflow, or Python refuses to convert them.
        if not digits.isdecimal() or len(digits) > 9 or int(digits) < 1:
            raise ConfigError(
                f"--batch_size {shortened(digits)}: expected a number of at least 1; it is not "
                "chosen automatically"
            )
        self.batch_size = int(batch_size)
        config = load_env_config(
            env_conf, [f"{field}={json.dumps(value)}" for field, value in settings.items()]
        )
        self.tokenizer: Any
        self.model, self.tokenizer, self.weights = load_trained(config, env_conf, weights)
        self.model.eval()
        # The text read last, whose first chunks the next text may repeat, and its state.
        self.last_ids: list[int] = []
        self.state = self.model.new_state()

    # ---- tokens ----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that the first token of a text is predicted from."""
        return (
            self.tokenizer.eos_token_id
            if self.tokenizer.bos_token_id is None
            else self.tokenizer.bos_token_id
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids [T] of a text. Nothing is appended.

        add_special_tokens: whether the tokenizer's tokens start the text; by default they do
                            unless the text contains BOS already
        """
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(
                string, self.tokenizer.decode(self.prefix_token_id)
            )
        return (document_ids if add_special_tokens else plain_ids)(self.tokenizer, string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenises context and continuation as one text -> the token ids of each.

        The text is cut where lm-eval cuts it: spaces at the end of the context belong to the
        continuation. They differ for a token with characters of both, which belongs to the
        continuation here, while lm-eval tokenises the context alone and loses that token.
        """
        stripped = context.rstrip()
        whole = self.tok_encode(context + continuation)
        count = common_prefix_length(self.tok_encode(stripped), whole)
        return whole[:count] or [self.prefix_token_id], whole[count:]

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The turns as text of the tokenizer's chat template. Without a generation prompt the last
        turn is left open."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict[str, Any]:
        """Entries that lm-eval writes into its results."""
        return {
            "weights": self.weights,
            "model_dtype": str(self.model.dtype),
            "mode": self.mode,
        }

    @property
    def max_length(self) -> int:
        """Number of tokens of the longest text: with memory those that become memory count too,
        else those that the base reads (`num_read`)."""
        return self.model.capacity if self.mode == "memory" else self.model.limits.positions

    # ---- the interface that lm-eval calls --------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(texts, context, continuation) of each request -> (log probability of the continuation in
        nats, whether greedy decoding generates it). A context is compressed once for all of its
        continuations."""
        self.check_fits(
            [self.num_read(context) + len(continuation) for _, context, continuation in requests],
            "loglikelihood",
        )
        if self.mode != "memory":
            return self.score_with_base(requests, disable_tqdm)
        answers: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: requests[i][1])
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as progress:
            for context, group in groupby(order, key=lambda i: requests[i][1]):
                logits, state = self.read(context)
                for batch in batched(list(group), self.batch_size):
                    found = self.score_continuations(
                        logits, state, [torch.tensor(requests[i][2]) for i in batch]
                    )
                    for i, answer in zip(batch, found, strict=True):
                        answers[i] = answer
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                    progress.update(len(batch))
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Logs probabilities of whole documents in nats. Each document is scored in one pass, by
        the document protocol after one prefix token, so that every token is scored once, given all
        tokens before it. If the document starts with BOS, this is the prefix token and is not
        scored. (lm-eval's Hugging Face model scores it, after a second BOS.)"""
        documents = [
            self.tok_encode(request.args[0], add_special_tokens=False) for request in requests
        ]
        prefix = [self.prefix_token_id]
        documents = [ids if ids[:1] == prefix else prefix + ids for ids in documents]
        # Without memory too, rows are scored that read as many slots as memory has.
        most = self.model.limits.positions if self.mode == "raw" else self.model.capacity
        self.check_fits([len(ids) for ids in documents], "loglikelihood_rolling", requests, most)
        answers = []
        for request, ids in zip(
            tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm),
            documents,
            strict=True,
        ):
            sample = Sample.document(torch.tensor(ids), self.model.memory_config.chunk_size)
            losses = token_losses(self.model, sample, self.mode)[1]
            answers.append(-losses.double().sum().item())
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt, up to the first of the request's stop strings."""
        prompts = [
            self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests
        ]
        settings = [
            normalize_gen_kwargs(request.args[1], DEFAULT_NEW_TOKENS) for request in requests
        ]
        lengths = [
            self.num_read(ids) + options["max_gen_toks"]
            for ids, options in zip(prompts, settings, strict=True)
        ]
        self.check_fits(lengths, "generate_until (prompt and max_gen_toks)", requests)
        seeds = [
            sampling_seed(ids, options, repetition)
            for ids, options, repetition in zip(
                prompts, settings, repetitions(requests), strict=True
            )
        ]
        answers: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda i: prompts[i])
        for i in tqdm(order, desc="generate_until", disable=disable_tqdm):
            answers[i] = self.answer(prompts[i], **settings[i], seed=seeds[i])
            self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return [answers[i] for i in range(len(requests))]

    def num_read(self, ids: list[int]) -> int:
        """Returns how many tokens of a prompt [T] count against `max_length`."""
        if self.mode == "memory":
            return len(ids)
        return len(base_prompt(ids, self.model.memory_config, self.mode))

    def check_fits(
        self,
        lengths: Sequence[int],
        kind: str,
        requests: Sequence[Any] = (),
        most: int | None = None,
    ) -> None:
        """Raises ConfigError if a request has more tokens than `most`, by default `max_length`. No
        request is truncated.

        requests: lm-eval's, whose task the error names, if they are given
        """
        most = most or self.max_length
        past = [n for n in lengths if n > most]
        if not past:
            return
        number = lengths.index(max(past))
        task = getattr(requests[number], "task_name", None) if requests else None
        limit, other = (
            f"capacity of {most} tokens",
            "a config that compresses harder (smaller num_memory)",
        )
        if self.mode != "memory" and most != self.model.capacity:
            limit, other = f"base's {most} positions (mode {self.mode})", "another mode"
        raise ConfigError(
            f"{kind}: {len(past)} of {len(lengths)} requests are past the {limit}, the longest has "
            f"{max(past)} (number {number}{f' of task {task}' if task else ''}); choose others "
            f"(lm-eval's --samples), or {other}"
        )

    # ---- computation -----------------------------------------------------------------------------

    @torch.no_grad()
    def resume(self, ids: list[int]) -> tuple[MemoryState, Tensor]:
        """The state after the chunks that `ids` share with the text read last, and the remaining
        tokens [1, T'] of `ids`, T' >= 1.

        Several chunks are encoded in one batch, and the last bits of a memory depend on the batch
        size. So only chunks are reused that would be encoded in a batch of the same size again.
        """
        l, m = self.model.memory_config.chunk_size, self.model.memory_config.num_memory
        limit = min(len(ids) - 1, len(self.last_ids)) // l
        chunks = next(
            (
                c
                for c in range(limit)
                if ids[c * l : (c + 1) * l] != self.last_ids[c * l : (c + 1) * l]
            ),
            limit,
        )
        if not chunks == len(ids) // l == len(self.last_ids) // l:
            chunks -= chunks % self.model.chunks_per_batch
        state = self.model.new_state()
        state.memory_keys = [keys[:, :, : chunks * m] for keys in self.state.memory_keys]
        state.memory_values = [values[:, :, : chunks * m] for values in self.state.memory_values]
        state.num_tokens = chunks * l
        state.text = torch.tensor(
            [ids[: chunks * l]], dtype=torch.int64, device=state.open_ids.device
        )
        if chunks:
            state.recent_ids = select_recent_ids(state.text, self.model.memory_config)
        return state, torch.tensor([ids[chunks * l :]])

    @torch.no_grad()
    def read(self, ids: list[int]) -> tuple[Tensor, MemoryState]:
        """Token ids [T] -> the logits [1, 1, V] of the next token, and the state."""
        state, rest = self.resume(ids)
        output = self.model(rest, state, logits_to_keep=1)
        self.last_ids, self.state = ids, output.past_key_values
        return output.logits, self.state

    @torch.no_grad()
    def score_continuations(
        self, logits: Tensor, state: MemoryState, continuations: Sequence[Tensor]
    ) -> Iterator[tuple[float, bool]]:
        """Scores B continuations [T] of any lengths -> for each its log probability in nats, and
        whether each of its tokens is the likeliest. Shorter ones are padded on the right, where
        causal attention hides the padding.

        logits, state: returned by `read` for the context
        """
        targets = pad_sequence(
            list(continuations), batch_first=True, padding_value=IGNORED
        )  # [B, T]
        total = torch.zeros(len(targets), dtype=torch.float64)
        greedy = torch.ones(len(targets), dtype=torch.bool)
        start = 0
        for predicted in self.predictions(logits, state, targets.clamp(min=0)):
            target = to_device(targets[:, start : start + predicted.shape[1]], predicted.device)
            start += predicted.shape[1]
            precise = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
            losses = F.cross_entropy(
                precise.transpose(1, 2), target, ignore_index=IGNORED, reduction="none"
            )
            total -= losses.sum(1).cpu()
            greedy &= ((predicted.argmax(-1) == target) | (target == IGNORED)).all(1).cpu()
        return zip(total.tolist(), greedy.tolist(), strict=True)

    def predictions(self, logits: Tensor, state: MemoryState, ids: Tensor) -> Iterator[Tensor]:
        """Tokens [B, T] after `state` -> the logits that predict them, in parts [B, T', V] of at
        most a chunk."""
        if ids.shape[1]:
            yield logits.expand(len(ids), -1, -1)
        state = state.select(torch.zeros(len(ids), dtype=torch.int64))
        for start in range(0, ids.shape[1] - 1, self.model.memory_config.chunk_size):
            stop = min(start + self.model.memory_config.chunk_size, ids.shape[1] - 1)
            output = self.model(ids[:, start:stop], state)
            state = output.past_key_values
            yield output.logits

    def score_with_base(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """Answers `_loglikelihood_tokens` in a mode without memory, one request after the other."""
        answers = []
        for texts, context, continuation in tqdm(
            requests, desc="loglikelihood", disable=disable_tqdm
        ):
            prompt = base_prompt(context, self.model.memory_config, self.mode)
            answers.append(log_probability(self.model, prompt, continuation))
            self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def answer(
        self, ids: list[int], until: list[str], max_gen_toks: int, seed: int, **options: Any
    ) -> str:
        """Continues the prompt `ids` [T] with transformers' `generate` and lm-eval's stop strings.

        until: stop strings; seed: of sampling; options: further arguments of `generate`
        """
        if not options["do_sample"]:
            options.pop("temperature", None)
        until = handle_stop_sequences(until, eos=self.tokenizer.decode(self.eot_token_id))
        if self.mode == "memory":
            new = self.generate_with_memory(ids, until, max_gen_toks, seed, **options)
        else:
            prompt = base_prompt(ids, self.model.memory_config, self.mode)
            stops = stop_sequences_criteria(self.tokenizer, until, len(prompt), 1)
            options |= dict(max_new_tokens=max_gen_toks, stopping_criteria=stops)
            new = generate_with_base(self.model, prompt, seed, **options)
        return postprocess_generated_text(
            self.tokenizer.decode(new, skip_special_tokens=True), until, None
        )

    def generate_with_memory(
        self, ids: list[int], until: list[str], max_gen_toks: int, seed: int, **options: Any
    ) -> list[int]:
        """Returns the tokens that follow the prompt `ids` [T]."""
        state, rest = self.resume(ids)
        output = self.model.generate(
            rest,
            state=state,
            attention_mask=torch.ones_like(rest),
            max_new_tokens=max_gen_toks,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, until, len(ids), 1),
            generator=torch.Generator().manual_seed(seed),
            return_dict_in_generate=True,
            **options,
        )
        if output.past_key_values.batch_size == 1:  # beam search leaves a state of several rows
            self.last_ids, self.state = ids, output.past_key_values
        return output.sequences[0, rest.shape[1] :].tolist()
