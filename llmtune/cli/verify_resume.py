"""``llmtune verify-resume``."""
