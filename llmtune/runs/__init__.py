"""The account of a run on disk: its directory, its events, and the index over all runs."""

from llmtune.runs.directory import STATUSES, RunDirectory, choose_directory, derive_name, is_run
from llmtune.runs.documents import as_json, number
from llmtune.runs.events import EVENTS
from llmtune.runs.redaction import redact
from llmtune.runs.store import RunRecord, RunStore

__all__ = [
    "EVENTS",
    "STATUSES",
    "RunDirectory",
    "RunRecord",
    "RunStore",
    "as_json",
    "choose_directory",
    "derive_name",
    "is_run",
    "number",
    "redact",
]
