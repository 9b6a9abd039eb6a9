"""Samples: the chunks of a document that are compressed, and the rows that are decoded and scored.

Shapes: T tokens of a document, C complete chunks, l chunk_size.
Source: UIO-LLMs section 3.3 and the released program's losses, see the protocols below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # the label of transformers for tokens that are not scored


@dataclass(frozen=True, eq=False)
class Row:
    """The tokens of one decoder call.

    input_ids [T] int64.
    targets [T] int64: the token that each position must predict, -100 for positions that are not
        scored.
    token_weights [T] float64: the weight of each position's NLL in the sample's loss.
    num_memories: the number of the sample's memories, from number `first_memory` on, that the row
        reads.
    start: index of the row's first token in the document.
    repeat: whether the `repeat_token` embedding replaces the first token.
    teacher: (number of the teacher text, index in it) of the row's first token.
    recent: number of first tokens that are repeated from the previous chunk and are not scored
        (see `Sample.with_recent`).
    """

    input_ids: Tensor
    targets: Tensor
    token_weights: Tensor
    num_memories: int
    start: int = 0
    repeat: bool = False
    teacher: tuple[int, int] = (0, 0)
    first_memory: int = 0
    recent: int = 0

    @property
    def memories(self) -> range:
        """The numbers of the chunks whose memories the row reads."""
        return range(self.first_memory, self.first_memory + self.num_memories)

    @property
    def scored(self) -> Tensor:
        """The indices [T'] of the scored positions."""
        return (self.targets != IGNORED).nonzero().squeeze(1)


@dataclass(frozen=True, eq=False)
class Sample:
    """A document in chunks with its loss. The `chunks` [C, l] are compressed, the `rows` are
    decoded and scored. The loss is the sum of token weight * NLL over all rows, in nats.

    teachers: texts of token ids [T'] that the base reads raw, without memory. With them
        (1 - kl_weight) * NLL + kl_weight * KL(teacher || student) replaces NLL.
    documents: the number of chunks of each document, in order, if the sample contains several
        documents (see `joined`).
    start: index in its document of the sample's first token, if the sample is a window of one.
    """

    chunks: Tensor
    rows: tuple[Row, ...]
    teachers: tuple[Tensor, ...] = ()
    kl_weight: float = 0.0
    documents: tuple[int, ...] = ()
    start: int = 0

    @classmethod
    def joined(cls, samples: Sequence[Sample]) -> Sample:
        """Joins several samples with the same `kl_weight` to one whose loss is the sum of their
        losses. Chunks, rows and teachers are concatenated; every row still reads the memories of
        its document.

            chunks [0 1] [2 3] and chunk [7 8], with a row each that reads all
            -> chunks [0 1] [2 3] [7 8], rows that read chunks 0 and 1, and chunk 2
        """
        chunks = texts = 0
        rows: list[Row] = []
        for sample in samples:
            assert sample.kl_weight == samples[0].kl_weight
            for row in sample.rows:
                first = chunks + row.first_memory if row.num_memories else 0
                rows.append(
                    replace(
                        row, first_memory=first, teacher=(texts + row.teacher[0], row.teacher[1])
                    )
                )
            chunks, texts = chunks + len(sample.chunks), texts + len(sample.teachers)
        return cls(
            torch.cat([sample.chunks for sample in samples]),
            tuple(rows),
            tuple(text for sample in samples for text in sample.teachers),
            samples[0].kl_weight,
            tuple(len(sample.chunks) for sample in samples),
        )

    @property
    def chunk_numbers(self) -> list[int]:
        """The number of every chunk within its document."""
        return [
            number for count in self.documents or (len(self.chunks),) for number in range(count)
        ]

    @property
    def num_scored(self) -> int:
        return sum(len(row.scored) for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """The number of tokens that the decoder reads, without recent tokens. For plain text it is
        the document's length."""
        return sum(len(row.input_ids) - row.recent for row in self.rows)

    def with_recent(self, count: int) -> Sample:
        """Puts the last `count` tokens (at most a chunk) of the chunks that a row reads before
        every row that directly follows them in the text: a document's rows except the first,
        questions and probes, but not copies. They are not scored; the teacher's text does not
        change.

            chunks [0 1 2 3], rows [0 1 2 3] and [4 5] scored at 5, count 2
            -> the second row is [2 3 4 5]
        """
        rows = [self._with_recent(row, count) for row in self.rows] if count else self.rows
        return replace(self, rows=tuple(rows))

    def _with_recent(self, row: Row, count: int) -> Row:
        if not row.num_memories or row.start != row.num_memories * self.chunks.shape[1]:
            return row
        text, index = row.teacher
        return replace(
            row,
            input_ids=torch.cat([self.chunks[row.memories.stop - 1][-count:], row.input_ids]),
            targets=F.pad(row.targets, (count, 0), value=IGNORED),
            token_weights=F.pad(row.token_weights, (count, 0)),
            start=row.start - count,
            teacher=(text, index - count),
            recent=count,
        )

    @classmethod
    def language_modeling(cls, input_ids: Tensor, chunk_size: int) -> Sample:
        """The paper's protocol. The loss is the sum over chunks of the mean NLL of all tokens
        except the chunk's first.

            ids 0..9, chunk_size 4 -> reads [0 1 2 3] scores 1 2 3, 1/3 each
                                    | reads [4 5 6 7] scores 5 6 7, 1/3 each
                                    | reads [8 9] scores 9, weight 1

        Tokens 4 and 8 are never scored. A last chunk of one token scores nothing.
        """
        ids = flatten_ids(input_ids)
        targets = torch.full_like(ids, IGNORED)
        targets[:-1] = ids[1:]
        targets[chunk_size - 1 :: chunk_size] = IGNORED
        counts = [max(1, len(part) - 1) for part in ids.split(chunk_size)]
        weights = torch.tensor([1 / n for n in counts], dtype=torch.float64).repeat_interleave(
            chunk_size
        )[: len(ids)]
        return cls._cut(ids, targets, weights, chunk_size)

    @classmethod
    def document(cls, input_ids: Tensor, chunk_size: int) -> Sample:
        """Our protocol. Every token except the document's first is scored exactly once; the loss
        is their mean NLL.

            ids 0..9, chunk_size 4 -> reads [0 1 2 3] scores 1 2 3 4, 1/9 each
                                    | reads [4 5 6 7] scores 5 6 7 8, 1/9 each
                                    | reads [8 9] scores 9, 1/9

        Token 4 is predicted from chunk 0, whose last token is 3.
        """
        return cls.beacon(input_ids, flatten_ids(input_ids), chunk_size)

    @classmethod
    def later(cls, input_ids: Tensor, chunk_size: int) -> Sample:
        """As `document`, without the tokens that are predicted without memory: those of the first
        chunk, and the next one, which the chunk's last token predicts.

            ids 0..9, chunk_size 4 -> reads [0 1 2 3] scores nothing
                                    | reads [4 5 6 7] scores 5 6 7 8, 1/5 each
                                    | reads [8 9] scores 9, 1/5
        """
        labels = flatten_ids(input_ids).clone()
        labels[: chunk_size + 1] = IGNORED
        return cls.beacon(input_ids, labels, chunk_size)

    @classmethod
    def beacon(cls, input_ids: Tensor, labels: Tensor, chunk_size: int) -> Sample:
        """A tokenised document with labels (Activation Beacon, Zhang et al. 2024). The labels [T]
        are not shifted, and -100 for tokens that are not scored. The loss is the mean NLL of the
        document's scored tokens.

            ids 0..5, labels -100 -100 -100 -100 4 5, chunk_size 4
            -> reads [0 1 2 3] scores 4, 1/2
             | reads [4 5] scores 5, 1/2
        """
        ids, labels = flatten_ids(input_ids), flatten_ids(labels)
        if len(ids) != len(labels):
            raise ValueError(
                f"a sample needs one label per token, found {len(ids)} tokens and {len(labels)} "
                "labels"
            )
        targets = torch.full_like(ids, IGNORED)
        targets[:-1] = labels[1:]
        count = max(1, int((targets != IGNORED).sum()))
        weights = torch.full((len(ids),), 1 / count, dtype=torch.float64)
        return cls._cut(ids, targets, weights, chunk_size)

    @classmethod
    def question_answering(
        cls,
        prompt: Tensor,
        response: Tensor,
        chunk_size: int,
        train_prompt: bool = False,
        truncation: int | None = None,
    ) -> Sample:
        """A prompt and its response. The response is scored, and with `train_prompt` the prompt
        too, but no token of chunk 0, which reads no memory. The loss is the mean NLL of the scored
        tokens. If the sample is longer than `truncation` tokens, the prompt loses its middle.

            prompt 0 1 2 3 4, response 5 6, chunk_size 4
            -> reads [0 1 2 3] scores nothing
             | reads [4 5 6] scores 5 6, 1/2 each

            truncation 5 -> prompt 0 3 4: 5 - 2 = 3 tokens, 1 of its start and 2 of its end
        """
        prompt, response = (torch.as_tensor(side).cpu().flatten() for side in (prompt, response))
        ids = torch.cat([prompt, response])
        labels = ids.clone()
        if not train_prompt:
            labels[: len(prompt)] = IGNORED
        return cls._answered(ids, labels, len(response), chunk_size, truncation)

    @classmethod
    def conversation(
        cls, input_ids: Tensor, labels: Tensor, chunk_size: int, truncation: int | None = None
    ) -> Sample:
        """A conversation with labels [T], which are -100 except for the assistant's tokens. These
        are scored, but no token of chunk 0, which reads no memory. The loss is their mean NLL. What
        follows the last answer is left out. If the rest is longer than `truncation` tokens, the
        part before the last answer loses its middle, as the prompt of `question_answering` does.

            ids 0..8, labels at 2 3 and 6 7, chunk_size 4
            -> reads [0 1 2 3] scores nothing
             | reads [4 5 6 7] scores 6 7, 1/2 each

            truncation 5 -> 0 4 5 6 7: 5 - 2 = 3 tokens before the answer 6 7, 1 of the start
        """
        ids, labels = flatten_ids(input_ids), flatten_ids(labels)
        scored = (labels != IGNORED).nonzero().flatten().tolist()
        stop = scored[-1] + 1 if scored else len(ids)
        start = stop
        while start and labels[start - 1] != IGNORED:
            start -= 1
        return cls._answered(ids[:stop], labels[:stop], stop - start, chunk_size, truncation)

    @classmethod
    def _answered(
        cls, ids: Tensor, labels: Tensor, answer: int, chunk_size: int, truncation: int | None
    ) -> Sample:
        """A document that ends with an answer of `answer` tokens. If it is longer than
        `truncation`, the part before the answer loses its middle. Chunk 0 is not scored."""
        if truncation is not None and len(ids) > truncation:
            length = truncation - answer  # of the part before the answer
            if length < 1:
                raise ValueError(
                    f"the response has {answer} tokens, truncation {truncation} leaves no tokens "
                    "for a prompt"
                )
            stop = len(ids) - answer - (length - length // 2)
            ids, labels = (torch.cat([side[: length // 2], side[stop:]]) for side in (ids, labels))
        labels = labels.clone()
        labels[: chunk_size + 1] = IGNORED  # the token after chunk 0 is predicted in chunk 0
        return cls.beacon(ids, labels, chunk_size)

    def distilled(self, kl_weight: float = 1.0) -> Sample:
        """Adds a teacher: the base, which reads the whole document raw. The target distribution of
        a token is the teacher's prediction at the same position of the document."""
        text = torch.cat([row.input_ids for row in self.rows])
        rows = tuple(replace(row, teacher=(0, row.start)) for row in self.rows)
        return replace(self, rows=rows, teachers=(text,), kl_weight=kl_weight)

    @classmethod
    def memory_utilization(cls, context: Tensor, probe: Tensor, chunk_size: int) -> Sample:
        """Measures whether memory changes predictions as the raw context does. The context's
        complete chunks are compressed, and a probe of random tokens (at most a chunk) is decoded.
        The loss is the mean KL(teacher || student) over the probe; the teacher reads the same
        chunks raw before it. Raises ValueError without a complete chunk or for a longer probe.

            context 0..9, probe 60 61 62, chunk_size 4
            -> compresses [0 1 2 3] [4 5 6 7]
             | reads [60 61 62], scored at 60 and 61 against a teacher that reads 0..7 60 61 62
        """
        context, probe = flatten_ids(context), flatten_ids(probe)
        chunks = context[: len(context) // chunk_size * chunk_size].view(-1, chunk_size)
        if not len(chunks) or len(probe) > chunk_size:
            raise ValueError(
                f"memory utilization needs a complete chunk of {chunk_size} tokens and a probe of "
                "at most as many, found "
                f"{len(context)} and {len(probe)}"
            )
        targets = torch.full_like(probe, IGNORED)
        targets[:-1] = probe[1:]
        weights = torch.full((len(probe),), 1 / max(1, len(probe) - 1), dtype=torch.float64)
        row = Row(
            probe, targets, weights, len(chunks), start=chunks.numel(), teacher=(0, chunks.numel())
        )
        return cls(chunks, (row,), (torch.cat([chunks.flatten(), probe]),), kl_weight=1.0)

    @classmethod
    def questions(
        cls,
        context: Tensor,
        pairs: Sequence[tuple[Tensor, Tensor]],
        chunk_size: int,
        kl_weight: float = 0.0,
    ) -> Sample:
        """News question answering. The context's complete chunks are compressed once; each pair of
        question and answer is a separate row that reads all memories. The loss is the sum over
        answers of their mean NLL. A question that does not fit a chunk with its answer loses its
        start. With kl_weight the teacher reads the same context raw. Raises ValueError without a
        complete chunk, or for an answer that fills a chunk.

            context 0..7, pairs (20 21, 22 23), chunk_size 4
            -> compresses [0 1 2 3] [4 5 6 7]
             | reads [20 21 22 23] scores 22 23, 1/2 each
        """
        chunks = flatten_ids(context)[: len(flatten_ids(context)) // chunk_size * chunk_size].view(
            -1, chunk_size
        )
        if not len(chunks):
            raise ValueError(
                f"news question answering needs a complete chunk of {chunk_size} tokens, found "
                f"{len(context)}"
            )
        rows: list[Row] = []
        teachers: list[Tensor] = []
        for question, answer in pairs:
            if len(answer) >= chunk_size or not len(answer):
                raise ValueError(
                    f"an answer must have 1 to {chunk_size - 1} tokens, to fit a chunk; found "
                    f"{len(answer)}"
                )
            question = question[max(0, len(question) + len(answer) - chunk_size) :]
            ids = torch.cat([question, answer])
            targets = torch.full_like(ids, IGNORED)
            targets[:-1] = ids[1:]
            targets[: max(0, len(question) - 1)] = IGNORED
            weights = torch.full(
                (len(ids),), 1 / max(1, int((targets != IGNORED).sum())), dtype=torch.float64
            )
            rows.append(
                Row(
                    ids,
                    targets,
                    weights,
                    len(chunks),
                    chunks.numel(),
                    teacher=(len(teachers), chunks.numel()),
                )
            )
            teachers.append(torch.cat([chunks.flatten(), ids]))
        return cls(chunks, tuple(rows), tuple(teachers) if kl_weight else (), kl_weight)

    @classmethod
    def copy(cls, input_ids: Tensor, chunk_size: int) -> Sample:
        """Auto encoding (paper Table 1) and longdata copy. All complete chunks are compressed; then
        each is reproduced from all memories and its previous true tokens. The first chunk starts
        with the `repeat_token` embedding, later chunks with the last token of the previous chunk.
        The loss is the sum of the chunks' mean NLL. Raises ValueError without a complete chunk.

            ids 0..9, chunk_size 4 -> compresses [0 1 2 3] [4 5 6 7]
                                    | reads [repeat 0 1 2] scores 0 1 2 3, 1/4 each
                                    | reads [3 4 5 6] scores 4 5 6 7, 1/4 each
        """
        ids = flatten_ids(input_ids)
        chunks = ids[: len(ids) // chunk_size * chunk_size].view(-1, chunk_size)
        if not len(chunks):
            raise ValueError(
                f"copying needs a complete chunk of {chunk_size} tokens, found {len(ids)} tokens"
            )
        weights = torch.full((chunk_size,), 1 / chunk_size, dtype=torch.float64)
        fed = torch.cat([ids[:1], ids])  # the repeat token replaces the first one
        rows = tuple(
            Row(
                fed[start : start + chunk_size],
                ids[start : start + chunk_size],
                weights,
                len(chunks),
                start,
                repeat=start == 0,
            )
            for start in range(0, chunks.numel(), chunk_size)
        )
        return cls(chunks, rows)

    @classmethod
    def _cut(cls, ids: Tensor, targets: Tensor, weights: Tensor, chunk_size: int) -> Sample:
        """Cuts a document into rows, of which row t reads the memories of chunks 0 .. t-1. The last
        chunk is not compressed, since no row would read its memory."""
        parts = zip(
            ids.split(chunk_size), targets.split(chunk_size), weights.split(chunk_size), strict=True
        )
        rows = tuple(
            Row(*part, num_memories=t, start=t * chunk_size) for t, part in enumerate(parts)
        )
        return cls(ids[: (len(rows) - 1) * chunk_size].view(-1, chunk_size), rows)


def flatten_ids(ids: Tensor) -> Tensor:
    """Converts [T] or [1, T] to [T] on the CPU. Raises ValueError for other shapes and for an empty
    document."""
    ids = torch.as_tensor(ids).cpu()
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or len(ids) == 0:
        raise ValueError(
            f"a sample is one document, [T] or [1, T] with T >= 1; found shape {list(ids.shape)}"
        )
    return ids


# Who is scored in plain text, by the names in configs. protocols.py has those with a length. Under
# "beacon" the same tokens are scored as under "document", and the mean over documents differs
# (evaluation/results.py).
PROTOCOLS: dict[str, Callable[[Tensor, int], Sample]] = {
    "paper": Sample.language_modeling,
    "document": Sample.document,
    "later": Sample.later,
    "beacon": Sample.document,
}
