"""Tasks: how a document becomes chunks to compress and rows to score, and who is scored when.

Shapes: T tokens of a document, C complete chunks, l chunk_size.
Source: UIO-LLMs section 3.3 and the released program's losses, see the protocols below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # transformers' label for "not scored"


@dataclass(frozen=True, eq=False)
class Row:
    """One decoder call. input_ids [T] int64; targets [T] int64: the token that each position
    must predict, -100 where nothing is scored; token_weights [T] float64: the weight of that
    position's NLL in the sample's loss; num_memories: how many of the sample's chunks, from
    number `first_memory` on, it reads; start: the place of its first token in the document;
    repeat: its first token is replaced by the `repeat_token` embedding; teacher: (which of the
    sample's teacher texts, where in it) the row's first token stands, for losses with a teacher;
    recent: how many of its first tokens are those of the chunk before, fed again and not scored
    (see `Sample.with_recent`)."""

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
        """The numbers of the chunks whose memories it reads."""
        return range(self.first_memory, self.first_memory + self.num_memories)

    @property
    def scored(self) -> Tensor:
        """Indices [T'] of the positions that are scored."""
        return (self.targets != IGNORED).nonzero().squeeze(1)


@dataclass(frozen=True, eq=False)
class Sample:
    """A document cut into chunks with its loss: `chunks` [C, l] are compressed, `rows` are
    decoded and scored. The loss is the sum over all rows of token weight * NLL (nats).

    With `teachers`, token texts [T'] that the base reads raw, without memory, NLL is replaced by
    (1 - kl_weight) * NLL + kl_weight * KL(teacher || student).

    documents: how many of the chunks, in order, each document has, where the sample holds
    several (see `joined`)."""

    chunks: Tensor
    rows: tuple[Row, ...]
    teachers: tuple[Tensor, ...] = ()
    kl_weight: float = 0.0
    documents: tuple[int, ...] = ()

    @classmethod
    def joined(cls, samples: Sequence[Sample]) -> Sample:
        """Several samples with one `kl_weight` as one, whose loss is the sum of theirs: chunks,
        rows and teachers behind each other, every row still reading its own document's memories.

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
        """The place of every chunk in its document."""
        return [
            number for count in self.documents or (len(self.chunks),) for number in range(count)
        ]

    @property
    def num_scored(self) -> int:
        return sum(len(row.scored) for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens that the decoder reads, recent ones not again: for plain text the document's."""
        return sum(len(row.input_ids) - row.recent for row in self.rows)

    def with_recent(self, count: int) -> Sample:
        """With the last `count` tokens of the chunks that it reads (at most a chunk of them) in
        front of every row that goes on where these end: a document's rows but the first,
        questions and probes, but no copies. They are not scored, and the teacher's text stays as
        it is.

            chunks [0 1 2 3], rows [0 1 2 3] and [4 5] scored at 5, count 2
            -> the second row is [2 3 4 5]
        """
        rows = [self._with_recent(row, count) for row in self.rows] if count else self.rows
        return replace(self, rows=tuple(rows))

    def _with_recent(self, row: Row, count: int) -> Row:
        if not row.num_memories or row.start != row.num_memories * self.chunks.shape[1]:
            return row
        text, place = row.teacher
        return replace(
            row,
            input_ids=torch.cat([self.chunks[row.memories.stop - 1][-count:], row.input_ids]),
            targets=F.pad(row.targets, (count, 0), value=IGNORED),
            token_weights=F.pad(row.token_weights, (count, 0)),
            start=row.start - count,
            teacher=(text, place - count),
            recent=count,
        )

    @classmethod
    def language_modeling(cls, input_ids: Tensor, chunk_size: int) -> Sample:
        """The paper's protocol: per chunk the mean NLL of all tokens but its first; the means
        are summed.

            ids 0..9, chunk_size 4 -> reads [0 1 2 3] scores 1 2 3, 1/3 each
                                    | reads [4 5 6 7] scores 5 6 7, 1/3 each
                                    | reads [8 9] scores 9, weight 1

        Tokens 4 and 8 are never scored. A last chunk of one token scores nothing.
        """
        ids = flat(input_ids)
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
        """Our protocol: every token but the document's first is scored exactly once; the loss is
        their mean NLL.

            ids 0..9, chunk_size 4 -> reads [0 1 2 3] scores 1 2 3 4, 1/9 each
                                    | reads [4 5 6 7] scores 5 6 7 8, 1/9 each
                                    | reads [8 9] scores 9, 1/9

        Token 4 is predicted from chunk 0, whose last token is 3.
        """
        return cls.beacon(input_ids, flat(input_ids), chunk_size)

    @classmethod
    def later(cls, input_ids: Tensor, chunk_size: int) -> Sample:
        """As `document`, without the tokens that no memory is read for: those of the first
        chunk, and the one behind it, which its last token predicts.

            ids 0..9, chunk_size 4 -> reads [0 1 2 3] scores nothing
                                    | reads [4 5 6 7] scores 5 6 7 8, 1/5 each
                                    | reads [8 9] scores 9, 1/5
        """
        labels = flat(input_ids).clone()
        labels[: chunk_size + 1] = IGNORED
        return cls.beacon(input_ids, labels, chunk_size)

    @classmethod
    def beacon(cls, input_ids: Tensor, labels: Tensor, chunk_size: int) -> Sample:
        """Pre-tokenised with labels (Activation Beacon, Zhang et al. 2024): labels [T], not
        shifted, -100 where not scored, are shifted over the whole document; the loss is the mean
        NLL over the document's scored tokens.

            ids 0..5, labels -100 -100 -100 -100 4 5, chunk_size 4
            -> reads [0 1 2 3] scores 4, 1/2
             | reads [4 5] scores 5, 1/2
        """
        ids, labels = flat(input_ids), flat(labels)
        if len(ids) != len(labels):
            raise ValueError(
                f"a sample needs one label a token, found {len(ids)} tokens and {len(labels)} "
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
        """Prompt, then response; the response is scored (with `train_prompt` the prompt too),
        but nothing in chunk 0, which reads no memory. The loss is the mean NLL of the scored
        tokens. A prompt that makes the sample longer than `truncation` tokens keeps its two
        ends.

            prompt 0 1 2 3 4, response 5 6, chunk_size 4
            -> reads [0 1 2 3] scores nothing
             | reads [4 5 6] scores 5 6, 1/2 each

            truncation 5 -> prompt 0 3 4: 5 - 2 = 3 tokens, 1 of its start and 2 of its end
        """
        prompt, response = (torch.as_tensor(side).cpu().flatten() for side in (prompt, response))
        if truncation is not None and len(prompt) + len(response) > truncation:
            room = truncation - len(response)
            if room < 1:
                raise ValueError(
                    f"the response has {len(response)} tokens, truncation {truncation} leaves no "
                    "room for a prompt"
                )
            prompt = torch.cat([prompt[: room // 2], prompt[len(prompt) - (room - room // 2) :]])
        ids = torch.cat([prompt, response])
        labels = ids.clone()
        if not train_prompt:
            labels[: len(prompt)] = IGNORED
        labels[: chunk_size + 1] = IGNORED  # the token after chunk 0 is predicted in chunk 0
        return cls.beacon(ids, labels, chunk_size)

    def distilled(self, kl_weight: float = 1.0) -> Sample:
        """The same document and scored tokens, taught by the base reading all of it raw: row t's
        token i has the teacher's prediction at the same place of the document."""
        text = torch.cat([row.input_ids for row in self.rows])
        rows = tuple(replace(row, teacher=(0, row.start)) for row in self.rows)
        return replace(self, rows=rows, teachers=(text,), kl_weight=kl_weight)

    @classmethod
    def memory_utilization(cls, context: Tensor, probe: Tensor, chunk_size: int) -> Sample:
        """The context's complete chunks are compressed; a probe of random tokens (at most a
        chunk) then shows whether memory moves the predictions as the raw context does: mean
        KL(teacher || student) over the probe, whose teacher reads the same chunks raw in front
        of it. Raises ValueError without a complete chunk or with a longer probe.

            context 0..9, probe 60 61 62, chunk_size 4
            -> compresses [0 1 2 3] [4 5 6 7]
             | reads [60 61 62], scored at 60 and 61 against a teacher that reads 0..7 60 61 62
        """
        context, probe = flat(context), flat(probe)
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
        asked: Sequence[tuple[Tensor, Tensor]],
        chunk_size: int,
        kl_weight: float = 0.0,
    ) -> Sample:
        """News question answering: the context's complete chunks are compressed once; each
        (question, answer) is then asked of a copy of that memory, none seeing the others; the
        answers are scored, every one's mean loss, summed. A question that does not fit a chunk
        with its answer loses its start. With kl_weight the teacher reads the same context raw.
        Raises ValueError without a complete chunk, or for an answer that fills a chunk.

            context 0..7, asked (20 21, 22 23), chunk_size 4
            -> compresses [0 1 2 3] [4 5 6 7]
             | reads [20 21 22 23] scores 22 23, 1/2 each
        """
        chunks = flat(context)[: len(flat(context)) // chunk_size * chunk_size].view(-1, chunk_size)
        if not len(chunks):
            raise ValueError(
                f"news question answering needs a complete chunk of {chunk_size} tokens, found "
                f"{len(flat(context))}"
            )
        rows: list[Row] = []
        teachers: list[Tensor] = []
        for question, answer in asked:
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
        """Auto-encoding (paper Table 1) and longdata copy: all complete chunks are compressed,
        then each is reproduced from all memories, given its true tokens so far. The first chunk
        starts with the `repeat_token` embedding, a later one with the last token of the chunk
        before. The loss is every chunk's mean NLL, summed. Raises ValueError if no chunk is
        full.

            ids 0..9, chunk_size 4 -> compresses [0 1 2 3] [4 5 6 7]
                                    | reads [repeat 0 1 2] scores 0 1 2 3, 1/4 each
                                    | reads [3 4 5 6] scores 4 5 6 7, 1/4 each
        """
        ids = flat(input_ids)
        chunks = ids[: len(ids) // chunk_size * chunk_size].view(-1, chunk_size)
        if not len(chunks):
            raise ValueError(
                f"copying needs a complete chunk of {chunk_size} tokens, found {len(ids)} tokens"
            )
        weights = torch.full((chunk_size,), 1 / chunk_size, dtype=torch.float64)
        fed = torch.cat([ids[:1], ids])  # its first token only holds the place of the repeat token
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
        """Row t reads the memories of chunks 0 .. t-1; the last chunk's memory would have no
        reader."""
        parts = zip(
            ids.split(chunk_size), targets.split(chunk_size), weights.split(chunk_size), strict=True
        )
        rows = tuple(
            Row(*part, num_memories=t, start=t * chunk_size) for t, part in enumerate(parts)
        )
        return cls(ids[: (len(rows) - 1) * chunk_size].view(-1, chunk_size), rows)


def flat(ids: Tensor) -> Tensor:
    """[T] or [1, T] -> [T], on the CPU. Raises ValueError for anything else, and for an empty
    document."""
    ids = torch.as_tensor(ids).cpu()
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or len(ids) == 0:
        raise ValueError(
            f"a sample is one document, [T] or [1, T] with T >= 1; found shape {list(ids.shape)}"
        )
    return ids


# Who is scored in plain text, by the names in configs.
PROTOCOLS: dict[str, Callable[[Tensor, int], Sample]] = {
    "paper": Sample.language_modeling,
    "document": Sample.document,
    "later": Sample.later,
}
