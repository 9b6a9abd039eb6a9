"""Answers of the base to questions about documents that it reads raw, as a text for training.

A memory that is trained on them learns to answer as the base does with the whole document, so
documents and questions suffice. This is sequence-level distillation (Kim and Rush 2016,
arXiv 1606.07947). The field `teacher` of a corpus distils every token instead.

Shapes: T tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from uiollms.data.chat import check_template
from uiollms.data.documents import ChatDocument, Document
from uiollms.data.tokens import common_prefix_length, plain_ids, tokenize
from uiollms.files.errors import ConfigError


class Teacher:
    """The base as a teacher that answers greedily. What two prompts in a row have in common is read
    once.

    base: a causal language model; max_new_tokens: of an answer
    """

    def __init__(
        self, base: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 64
    ) -> None:
        self.base, self.tokenizer, self.max_new_tokens = base, tokenizer, max_new_tokens
        self.cache = DynamicCache()  # one that keeps all tokens, also of a base with windows
        self.ids_read: list[int] = []

    def answer_document(self, document: Document, num_examples: int = 0) -> Document:
        """Returns the document with answers of the teacher: of a conversation in place of all turns
        of the assistant but the first `num_examples`, of another document in place of its response.
        A user's last message without an answer gets one. Earlier answers are part of the prompt,
        so examples show how to answer.

        Raises ConfigError, which names the document, if it has no question, or if a prompt and its
        answer need more positions than the base has.
        """
        if not isinstance(document, ChatDocument):
            if document.response is None:
                raise ConfigError(
                    f"{document.source}: has no question; its kind is {document.task}"
                )
            ids = tokenize(self.tokenizer, document.text).tolist()
            return replace(document, response=self.answer(ids, document.source))
        check_template(self.tokenizer, self.tokenizer.name_or_path, f"{document.source}: ")
        messages: list[dict[str, Any]] = []
        num_turns = 0
        for message in asking(document.messages):
            if message["role"] == "assistant" and messages:
                num_turns += 1
                if num_turns > num_examples:
                    message = message | {"content": self.reply(messages, document.source)}
            messages.append(message)
        return replace(document, messages=tuple(messages))

    def reply(self, messages: list[dict[str, Any]], source: str) -> str:
        """Returns the assistant's next message after these."""
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.answer(plain_ids(self.tokenizer, str(text)), source)

    @torch.no_grad()
    def answer(self, ids: list[int], source: str = "the prompt") -> str:
        """Returns the greedy answer to a prompt, without white space at its ends. Raises
        ConfigError if both need more positions than the base has."""
        positions = getattr(self.base.config, "max_position_embeddings", None)
        if positions and len(ids) + self.max_new_tokens > positions:
            raise ConfigError(
                f"{source}: a prompt of {len(ids)} tokens and an answer of {self.max_new_tokens} "
                f"need more than the base's {positions} positions; shorten the document"
            )
        shared = common_prefix_length(self.ids_read, ids[:-1])  # the last token is always read
        if surplus := self.cache.get_seq_length() - shared:
            self.cache.crop(-surplus)
        prompt = torch.tensor([ids], device=self.base.device)
        output: Tensor = self.base.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=self.cache,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
        )
        self.ids_read = output[0].tolist()[: self.cache.get_seq_length()]
        answer = output[0, len(ids) :]
        return str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()


def asking(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages with an empty answer after a last message of the user."""
    ends_with_question = bool(messages) and messages[-1]["role"] == "user"
    answer = {"role": "assistant", "content": ""}
    return [*messages, answer] if ends_with_question else [*messages]
