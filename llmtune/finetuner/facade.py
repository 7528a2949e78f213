"""The facade. ``train`` tells the story of one run, in order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.collector import importing
from llmtune.config import RunConfig, load_config
from llmtune.console import quieten_libraries, speaker
from llmtune.data import DataReport
from llmtune.errors import CheckpointError, ConfigError, HardwareError, did_you_mean
from llmtune.evaluation import Metric
from llmtune.finetuner import account, continuing, facts, rows
from llmtune.finetuner.result import RunResult
from llmtune.finetuner.training_rows import TrainingRows
from llmtune.hardware import Hardware, launch_shortfall, tf32_products, yield_cores
from llmtune.hardware.processes import stoppable
from llmtune.planning import Plan, PlanRequest, make_plan
from llmtune.runs import RunDirectory, is_run

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llmtune.finetuner.continuing import Continued
    from llmtune.finetuner.tuned import TunedRun, Verdict
    from llmtune.training import Ranks, TrainingJob


class FineTuner:
    """Fine-tune a language model on your data.

        tuner = FineTuner("data.jsonl", preset="quality")
        result = tuner.train()

    Args:
        data: A path (jsonl, json, csv, tsv, parquet, arrow, txt, md, a directory or a glob of these), a
            ``datasets.Dataset`` or ``DatasetDict``, or a list of dicts. May be left out when the configuration names
            it.
        callbacks: ``transformers.TrainerCallback`` objects of your own.
        metrics: Your own quality measures by name: ``fn(answers, references) -> float``, computed on greedy answers to
            held-out prompts at every evaluation. ``metric="name"`` lets one choose the best checkpoint.
        config: A YAML file of ``RunConfig`` keys, or several; where they disagree the later one is taken.
        env: Which of the ``environments:`` of the files to use.
        **settings: ``RunConfig`` keys, in full or by a unique leaf name: ``learning_rate=1e-4, rank=16``.

    Raises:
        ConfigError: A key or value that cannot be used; all of them at once.
    """

    def __init__(
        self,
        data: Any = None,
        *,
        callbacks: Sequence[TrainerCallback] = (),
        metrics: Mapping[str, Metric] | None = None,
        config: str | Path | Sequence[str | Path] | RunConfig | None = None,
        env: str | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(data, str | os.PathLike):
            settings["data.path"], data = os.fspath(data), None
        if isinstance(config, RunConfig):
            if given := [*settings, *(["env"] if env else [])]:
                raise ConfigError("FineTuner", [f"got a RunConfig and also {', '.join(given)}; give one of them"])
            self.config = config
        else:
            self.config = load_config(settings, file=config, env=env, where="FineTuner")
            for note in self.config.origin.notes:
                speaker.say(note)
        self._data, self._callbacks, self._metrics = data, tuple(callbacks), dict(metrics or {})
        self._run_dir: Path | None = None
        self._continues = False  # whether a run was named to be continued
        self._tuned: TunedRun | None = None

    def check(self) -> DataReport:
        """Read every row and report every problem, with file and line.

        Raises:
            DataError: The data cannot be found, or its format cannot be recognised.
        """
        inputs = rows.inputs_of(self.config, self._data)
        rows.tell_reading(inputs)
        return rows.check_data(inputs, compare=True)

    def plan(self, hardware: Hardware | None = None) -> Plan:
        """Everything ``train`` would do, each number with its reason.

        No weights are loaded, and nothing is downloaded for a catalogued model.

        Args:
            hardware: Plan for this machine instead of the present one.
        """
        machine = facts.machine_of(self.config, hardware)
        inputs = rows.inputs_of(self.config, self._data)
        rows.tell_reading(inputs)
        model = facts.model_of(self.config, machine, inputs, download=False)
        data = facts.data_of(self.config, model, inputs)
        account.tell_unused(data.unused)
        return facts.plan_of(self.config, machine, model, data, processes=1)

    def train(self) -> RunResult:
        """Plan, train, keep the best, and leave an account of it; continues an unfinished run of the same command.

        Raises:
            LlmtuneError: One of the tree in ``llmtune.errors``; the run directory holds the failure report.
        """
        yield_cores()
        with importing():
            quieten_libraries()
            from peft import get_peft_model  # noqa: F401  what else a training needs, all of it
            from transformers import AutoModelForCausalLM  # noqa: F401

            from llmtune.training import Ranks, run_training

        machine = facts.machine_of(self.config)
        if machine.device.index:
            raise HardwareError(
                f"one process trains on the first GPU it sees, and {machine.device} was asked for; make it the first: "
                f"CUDA_VISIBLE_DEVICES={machine.device.index} with device=cuda"
            )
        ranks = Ranks(on_cpu=machine.device.type == "cpu")
        speaker.muted = not ranks.is_main
        if shortfall := launch_shortfall(os.environ):
            speaker.warn(shortfall)
        self._require_metric()
        account.require_writable(self.config)
        inputs = rows.inputs_of(self.config, self._data)
        rows.tell_reading(inputs)
        report = rows.check_data(inputs)
        report.raise_if_bad(self.config.data.on_bad_row)
        speaker.say(f"data: {report.rows:,} rows, {report.format} ({report.reason})")
        machine = ranks.from_main(machine)
        model = facts.model_of(self.config, machine, inputs, download=True)  # by the facts that `plan` chooses by
        machine = ranks.from_main(facts.measured(self.config, machine) if ranks.is_main else machine)
        with ranks.main_first():  # the main process tokenises, the others map its files
            data = facts.data_of(self.config, model, inputs)
        report = rows.full_report(report, data)
        account.tell_data(report)
        request = facts.plan_request(self.config, machine, model, data, processes=ranks.size)
        plan = ranks.from_main(make_plan(request) if ranks.is_main else None)
        assert plan is not None
        plan.require_fit()
        plan.require_room_to_download()
        if request.correction.basis == "runs":
            speaker.say(f"predictions: {request.correction.reason}")
        run, continued = self._open_run(ranks, self._identity(model, data), inputs.name, request, plan)
        if run.run["status"] == "finished" and (continued is None or not continued.extends):
            speaker.say(f"{run.path} is finished; nothing to do")
            ranks.part_at_exit()
            return RunResult.of(run)
        with run.lock() if ranks.is_main else nullcontext():
            try:
                job, resume_from = self._prepare(run, ranks, request, model, data, plan, continued, report)
            except BaseException:
                if ranks.is_main:
                    run.discard()  # nothing has been trained: leave nothing half-created behind
                raise
            arithmetic = tf32_products(job.plan.precision.value == "tf32")
            with account.told(run) if ranks.is_main else nullcontext(), stoppable(), arithmetic:
                outcome = run_training(job, resume_from)
                ranks.part_at_exit()
                return account.finish(run, outcome) if ranks.is_main else RunResult.of(run)

    def evaluate(self) -> Verdict:
        """Compare base and tuned model on the held-out rows of the finished run."""
        return self._finished().evaluate()

    def generate(self, prompt: str | Sequence[Mapping[str, Any]], *, max_new_tokens: int | None = None) -> str:
        """The tuned model's greedy answer to a prompt or a list of messages."""
        return self._finished().generate(prompt, max_new_tokens=max_new_tokens)

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        data: Any = None,
        *,
        callbacks: Sequence[TrainerCallback] = (),
        metrics: Mapping[str, Metric] | None = None,
        flags: Sequence[str] = (),
        **settings: Any,
    ) -> RunResult:
        """Continue a stopped run with the configuration it was started with, or extend a finished one.

        Args:
            run_dir: The run directory.
            data: The data again, when the run was started on rows in memory instead of a file.
            callbacks: The same ones again, when the run was started with any.
            metrics: The same ones again, when the run was started with any.
            flags: Changes as the command line has them: ``key=value``.
            **settings: ``RunConfig`` keys that are different from here on: ``max_steps=200``, ``learning_rate=5e-5``.
                What can be is applied and said; what cannot, such as another seed, is refused.

        Raises:
            RunNotFoundError: There is no run.
            OutputError: A change that a begun run cannot take.
            CheckpointError: Checkpoints exist and none verifies.
        """
        run = RunDirectory.open(run_dir)
        config = continuing.configuration_of(run, settings, flags)
        for note in config.origin.notes:
            speaker.say(note)
        output = config.output.model_copy(update={"dir": str(run.path)})
        tuner = cls(data, config=config.model_copy(update={"output": output}), callbacks=callbacks, metrics=metrics)
        tuner._continues = True
        return tuner.train()

    def _require_metric(self) -> None:
        wanted = self.config.evaluate.metric.removeprefix("eval_")
        known = ("loss", "perplexity", *self._metrics)
        if wanted not in known:
            raise ConfigError("evaluate.metric", [f"got '{wanted}'{did_you_mean(wanted, known)}"])

    def _identity(self, model: facts.Model, data: rows.Data) -> dict[str, str]:
        revision, template = self.config.model.revision, getattr(model.tokenizer, "chat_template", None)
        settings = hashlib.sha256(f"{self.config.identity_hash()}\n{template}".encode()).hexdigest()
        return {
            "data": data.fingerprint[:12],
            "model": model.spec.id + (f"@{revision}" if revision else ""),
            "config": settings[:12],
        }

    def _open_run(
        self, ranks: Ranks, identity: dict[str, str], data_name: str, request: PlanRequest, fresh: Plan
    ) -> tuple[RunDirectory, Continued | None]:
        """The directory of this run, and how it goes on if it has begun."""
        run: RunDirectory | None = None
        continued: Continued | None = None
        if ranks.is_main:
            run = self._held()
            changes = () if run is None else continuing.changed_settings(run, self.config, identity)
            if run is not None and changes:
                continuing.require_continuable(run, identity, changes, asked=self._continues)
            else:
                run = account.open_run(self.config, identity, data_name=data_name)
            continued = continuing.continued(run, identity, request, fresh, changes, asked=self._continues)
        path, continued = ranks.from_main((run.path if run is not None else None, continued))
        assert path is not None
        self._run_dir = path
        return run if run is not None else RunDirectory.open(path), continued

    def _held(self) -> RunDirectory | None:
        """The run that is in ``output.dir``, if it may be continued."""
        directory = self.config.output.dir
        if directory is None or self.config.recover.resume == "never" or not is_run(Path(directory)):
            return None
        return RunDirectory.open(directory)

    def _prepare(
        self,
        run: RunDirectory,
        ranks: Ranks,
        request: PlanRequest,
        model: facts.Model,
        data: rows.Data,
        plan: Plan,
        continued: Continued | None,
        report: DataReport,
    ) -> tuple[TrainingJob, Path | None]:
        """Settle the plan in force and where to start from, write both down, and load the weights."""
        import torch
        from transformers import set_seed

        from llmtune.kernels import attach_kernels
        from llmtune.models import load_for_training, require_lasting
        from llmtune.training import TrainingJob

        resume_from = ranks.from_main(self._checkpoint(run) if ranks.is_main else None)
        if continued is not None:  # not probed again, and planned anew only where something has changed
            plan = continued.plan
        elif ranks.is_main:
            account.begin(run, config=self.config, plan=plan, fingerprint=data.fingerprint, hardware=request.hardware)
            run.write_json("data_report.json", report.to_json())
        if ranks.is_main:
            speaker.say(f"run: {run.path}")
            speaker.say(plan.summary())
            for notice in plan.notices:
                speaker.warn(notice)
        assert model.location is not None
        assert model.tokenizer is not None
        assert data.train is not None
        require_lasting(model.tokenizer, trust_remote_code=self.config.model.trust_remote_code)
        torch.set_num_threads(plan.threads.value)
        set_seed(plan.seed.value)
        with facts.reading_base(model.location) if ranks.is_main else nullcontext() as base_of:
            weights = load_for_training(
                model.location,
                precision=plan.precision.value,
                method=plan.method.value,
                quantization=plan.quantization.value,
                rank=plan.rank.value,
                alpha=plan.alpha.value,
                dropout=plan.dropout.value,
                targets=plan.targets.value,
                device=ranks.device,
            )
            for reason in attach_kernels(weights, device=ranks.device, sharded=ranks.is_sharded):
                speaker.say(f"not on the fast path: {reason}")
            base = None if base_of is None else base_of()
        if base is not None:
            continuing.take_up(run, self._identity(model, data), self.config, base, continued, resume_from)
            if TrainingRows.load(run) is None:  # a new run, or one of an earlier version
                TrainingRows.of(data.train).keep(run)
            account.started(run, plan, resume_from, ranks.size)
        ranks.wait()
        job = TrainingJob(
            plan=plan,
            config=self.config,
            run=run,
            ranks=ranks,
            model=weights,
            tokenizer=model.tokenizer,
            train_data=data.train,
            eval_data=data.eval,
            checkpoint_facts={
                "identity": run.run["identity"],
                "data_fingerprint": data.fingerprint,
                "base_model": run.run["base_model"],
            },
            callbacks=self._callbacks,
            metrics=self._metrics,
            request=None if continued or resume_from or self.config.train.probe is False else request,
            leaked=data.leaked,
        )
        return job, resume_from

    def _checkpoint(self, run: RunDirectory) -> Path | None:
        from llmtune.checkpoints import read_manifest, verify
        from llmtune.training.train import find_checkpoint

        wanted = self.config.recover.resume
        if wanted == "auto":
            return find_checkpoint(run)
        if wanted == "never":
            return None
        path = Path(wanted).absolute()
        if not path.is_dir():
            raise ConfigError("--resume", [f"got '{wanted}', expected auto, never or the directory of a checkpoint"])
        result = verify(path)
        if not result.ok:
            raise CheckpointError(f"{path} is not used: {result.reason}. --resume auto takes the newest that verifies")
        continuing.require_same_run(path, read_manifest(path), run)
        return path

    def _finished(self) -> TunedRun:
        from llmtune.finetuner.tuned import TunedRun

        if self._tuned is None:
            if self._run_dir is None:
                raise ConfigError("FineTuner", ["nothing is trained yet; call train() first"])
            self._tuned = TunedRun.open(self._run_dir, data=self._data)
        return self._tuned
