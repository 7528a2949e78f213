"""Our own side: what a user of llmtune gets who fixes the batch, the rank and the rate, and nothing that is for speed.

The one file here that imports llmtune. It runs in the environment of the benchmark itself.
"""

from __future__ import annotations

from llmtune.heap import restart_with_tuned_heap

restart_with_tuned_heap()  # as the command llmtune does for itself

from pathlib import Path  # noqa: E402

from common import Conversation, gate, read_job  # noqa: E402

TALK, JOB = Conversation(), read_job()

from llmtune import FineTuner  # noqa: E402

settings = {
    "model.id": JOB["model"],
    "data.path": JOB["texts"],
    "data.supervise": "all" if JOB["masked"] else "text",
    "data.eval_fraction": 0.0,
    "train.method": JOB["mode"],
    "train.max_steps": JOB["steps"],
    "train.global_batch_size": JOB["batch"],
    "train.learning_rate": JOB["learning_rate"],
    "train.schedule": "constant",
    "train.warmup_ratio": 0.0,
    "train.weight_decay": 0.0,
    "train.seed": JOB["seed"],
    "train.device": "cpu",
    "train.threads": JOB["threads"],
    "adapter.rank": JOB["rank"],
    "adapter.alpha": JOB["alpha"],
    "adapter.dropout": 0.0,
    "adapter.targets": ["all-linear"],
    "evaluate.num_samples": 0,
    "save.every_steps": JOB["steps"],
    "recover.resume": "never",
    "recover.hang_seconds": 1e7,  # it is stopped while others are timed
    "monitor.report": False,
    "output.dir": str(Path(JOB["work"]) / "run"),
    "output.root": JOB["work"],
}
packages = ("llmtune", "torch", "transformers", "peft", "accelerate")
FineTuner(callbacks=[gate(JOB, TALK, *packages, counts=False)], **settings).train()
