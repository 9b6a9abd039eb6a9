"""The names of corpora, registered when `uiollms.data` is imported."""
