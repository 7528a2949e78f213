"""``llmtune init``: what would come of each answer, the questions worth asking, and the file that is written.

Deciding is apart from asking: a question is a pure function of the situation, and whoever asks hands in how.
"""

from llmtune.wizard.draft import Draft, Wizard, decide
from llmtune.wizard.outlook import Limits, settled
from llmtune.wizard.questions import Question, column_question, data_question, file_question

__all__ = [
    "Draft",
    "Limits",
    "Question",
    "Wizard",
    "column_question",
    "data_question",
    "decide",
    "file_question",
    "settled",
]
