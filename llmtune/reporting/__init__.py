"""The account of a run for people: what happened, whether it helped, what to do next."""

from llmtune.reporting.data_account import DataAccount, data_account
from llmtune.reporting.facts import Curve, EvaluationRow, Metric, Prediction, RunSummary, Sample, Verdict
from llmtune.reporting.report import write_report
from llmtune.reporting.summary import summarise

__all__ = [
    "Curve",
    "DataAccount",
    "EvaluationRow",
    "Metric",
    "Prediction",
    "RunSummary",
    "Sample",
    "Verdict",
    "data_account",
    "summarise",
    "write_report",
]
