"""The documents of sotu_task.yaml, a task of lm-eval."""

from datasets import Dataset

from uiollms import open_corpus


def documents(**metadata) -> dict[str, Dataset]:
    """The held-out messages, whole, as lm-eval wants them; metadata: the model's arguments, not
    needed here."""
    return {
        "test": Dataset.from_list(
            [{"text": document.text} for document in open_corpus("sotu.test")]
        )
    }
