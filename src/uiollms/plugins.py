"""Plugins: corpora, tasks and gradient estimators of other packages.

A package offers them as entry points, each of which names a class:

    [project.entry-points."uiollms.corpora"]
    quotes = "uiollms_quotes:Quotes"

As soon as the package is installed, a config can use the corpus by the name `plugin:quotes`. The
class is derived from `CorpusPlugin`, `TaskPlugin` or `EstimatorPlugin`. All three are pydantic
models: the fields that a class adds are the plugin's options, which a config sets in
`corpus_options`, `task_options` or `estimator_options`. Fields are strict, and unknown options are
errors. Methods raise `ConfigError` for faults that the user can mend.

Names with `plugin:` never hide those of this package, so a config without them does not look for
plugins. A plugin's module is imported when the plugin is used. The checks before a run do that too,
before a model is loaded. Each of several processes imports it for itself, and must get the same
results from it.
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from uiollms.config.corpora import PLUGIN, Checked, CorpusEntry, TaskEntry
from uiollms.config.load import parse
from uiollms.config.sections import TrainSection
from uiollms.files.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from uiollms.data.documents import Corpus, Document
    from uiollms.data.sample import Sample
    from uiollms.training.estimators import Estimator


class Plugin(Checked):
    """The base class of all plugins. kind: the last part of the group of their entry points; field:
    the field of a config that contains their options."""

    kind: ClassVar[str]
    field: ClassVar[str]


class CorpusPlugin(Plugin):
    """A corpus.

    task: the task of its documents, see `Document.task`. Documents for language modelling can be
    used for every task of plain text, others only for their own.
    """

    kind = "corpora"
    field = "corpus_options"
    task: ClassVar[str] = "language modeling"

    def open(self) -> Corpus:
        """Returns a sequence of `Document`. Its length is known at once, and a document is read at
        every access, in the same order on every machine. Only a part of the documents is read at
        a time, so the sequence need not hold them in memory."""
        raise NotImplementedError

    def missing(self) -> str | None:
        """Describes in one line what `open` lacks on this machine and how to get it. Returns None
        if it lacks nothing. It is called before a model is loaded."""
        return None


class TaskPlugin(Plugin):
    """A task: how a document becomes a sample, which determines the loss. The same sample is
    trained on and evaluated; the result of an evaluation is the mean loss over scored tokens.

    accepts: the tasks of the documents that it takes, see `Document.task`
    """

    kind = "tasks"
    field = "task_options"
    accepts: ClassVar[tuple[str, ...]] = ("language modeling",)

    def make_sample(
        self,
        document: Document,
        tokenizer: PreTrainedTokenizerBase,
        chunk_size: int,
        length: int,
        rng: random.Random,
    ) -> Sample:
        """Returns the sample of a document. A document that is too short for the task gives a
        sample in which no scored row reads a memory, such as `Sample.document(input_ids,
        chunk_size)`; training and evaluation skip it.

        length: the largest number of tokens that may be read of the document
        rng: the document's random numbers, the same whenever the document is read; in evaluations
            they depend only on its number

        Raises ValueError, to which the document's source is added, for a document that is faulty.
        """
        raise NotImplementedError


class EstimatorPlugin(Plugin):
    """A gradient estimator."""

    kind = "estimators"
    field = "estimator_options"

    def make_estimator(self, S: int) -> Estimator:
        """Returns the estimator. S: `train.tbptt`. The weights that it draws are [N, N] float64,
        finite, and zero on and above the diagonal."""
        raise NotImplementedError


Kind = TypeVar("Kind", bound=Plugin)
KINDS: tuple[type[Plugin], ...] = (CorpusPlugin, TaskPlugin, EstimatorPlugin)


def is_plugin(name: str) -> bool:
    """Whether a name in a config is that of a plugin. Case and spaces before the colon do not
    matter, as in all names of corpora."""
    head, colon, _ = name.partition(":")
    return "".join(head.lower().split()) + colon == PLUGIN


@dataclass(frozen=True)
class Installed:
    """A plugin that an installed package offers. package: the package and its version, such as
    "uiollms-quotes 0.1.0"."""

    name: str
    package: str
    entry: EntryPoint

    @property
    def title(self) -> str:
        return f"{PLUGIN}{self.name} of {self.package}"

    def load(self, base: type[Kind]) -> type[Kind]:
        """Imports the class. Raises ConfigError, which names the package and the cause, if that
        fails or if the class is not derived from `base`."""
        try:
            found = self.entry.load()
        except Exception as error:
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"{self.title}: {self.entry.value} cannot be imported ({cause}); mend or update "
                "the package"
            ) from None
        if not (isinstance(found, type) and issubclass(found, base)):
            raise ConfigError(
                f"{self.title}: {self.entry.value} is not derived from uiollms.{base.__name__}, as "
                f"the entry points of the group uiollms.{base.kind} must be"
            )
        return found


def installed_plugins(base: type[Plugin]) -> list[Installed]:
    """The plugins of a kind on this machine, by name. Nothing is imported."""
    found = [
        Installed(entry.name, f"{entry.dist.name} {entry.dist.version}", entry)
        for entry in entry_points(group=f"uiollms.{base.kind}")
        if entry.dist is not None
    ]
    return sorted(found, key=lambda plugin: (plugin.name, plugin.package))


def find_plugin(base: type[Plugin], name: str, built_in: Collection[str]) -> Installed:
    """Finds the plugin of a name in a config, "plugin:quotes". Raises ConfigError if none or
    several packages offer it, or if its name is one of the `built_in` ones."""
    name = name.partition(":")[2].strip()
    plugins = installed_plugins(base)
    found = [plugin for plugin in plugins if plugin.name == name]
    if found and name in built_in:
        raise ConfigError(
            f"{found[0].title}: this package has a {name!r} itself, and a plugin may not have the "
            f"same name; remove {PLUGIN!r} to use that one, or rename the plugin's entry point"
        )
    if len(found) > 1:
        packages = " and ".join(plugin.package for plugin in found)
        raise ConfigError(f"{PLUGIN}{name} is offered by {packages}; uninstall one of them")
    if not found:
        near = difflib.get_close_matches(name, [plugin.name for plugin in plugins], n=1)
        hint = f"did you mean {PLUGIN}{near[0]}? " if near else ""
        listed = ", ".join(f"{PLUGIN}{plugin.name} ({plugin.package})" for plugin in plugins)
        raise ConfigError(
            f"{PLUGIN}{name} is not installed; {hint}installed are {listed or 'no plugins'}; "
            f"built in are {', '.join(built_in)}; `pip install PACKAGE` installs a package whose "
            f"entry points of the group uiollms.{base.kind} have the name {name}"
        )
    return found[0]


def make_plugin(
    base: type[Kind], name: str, options: Mapping[str, Any] | None, built_in: Collection[str]
) -> Kind:
    """Returns the plugin of a name in a config with its options. Equal arguments return the same
    object. Raises ConfigError as `find_plugin` and `Installed.load` do, and with a line for each
    option that the plugin refuses."""
    return _make_plugin(base, name, json.dumps(options or {}), tuple(built_in))


@cache
def _make_plugin(base: type[Kind], name: str, options: str, built_in: tuple[str, ...]) -> Kind:
    plugin = find_plugin(base, name, built_in)
    return parse(plugin.load(base), json.loads(options), f"{plugin.title}: {base.field}")


def plugin_versions(
    entries: Sequence[CorpusEntry | TaskEntry], train: TrainSection | None = None
) -> dict[str, str | None]:
    """The packages of all plugins that some entries, and the estimator and corpora of a training
    run, use: {"plugin.corpora.quotes": "uiollms-quotes 0.1.0"}. A run records them with its other
    versions."""

    corpora = [entry for stage in train.corpora for entry in stage] if train else []
    used: list[tuple[type[Plugin], str | None]] = []
    for entry in (*entries, *corpora):
        if isinstance(entry, CorpusEntry):
            used += [(CorpusPlugin, entry.name), (TaskPlugin, entry.task)]
        else:
            used += [(CorpusPlugin, entry.task_name), (TaskPlugin, entry.task_type)]
    if train:
        used.append((EstimatorPlugin, train.estimator))
    found = [(base, find_plugin(base, name, ())) for base, name in used if name and is_plugin(name)]
    return {f"plugin.{base.kind}.{plugin.name}": plugin.package for base, plugin in found}
