"""Where documents come from: JSON lines, hub datasets, tokenised beacon samples."""
