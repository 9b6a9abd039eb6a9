"""The documents of sotu_task.yaml, a task of lm-eval."""

from datasets import Dataset

from uiollms import open_corpus


def documents(**metadata) -> dict[str, Dataset]:
    """The held-out messages as lm-eval's test split.

    metadata: the model's arguments, which lm-eval passes; unused
    """
    texts = [{"text": document.text} for document in open_corpus("sotu.test")]
    return {"test": Dataset.from_list(texts)}
