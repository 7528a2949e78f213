"""``llmtune checkpoints``."""
