"""Readers of documents: JSON lines, hub datasets and tokenised beacon samples."""
