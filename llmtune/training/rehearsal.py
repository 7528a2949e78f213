"""What happens at the end of a run happens once before its start: evaluate, save, load again, merge.

Whatever fails here would have failed after hours of training. Nothing is left behind.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtune.console import speaker
from llmtune.data import EncodedDataset
from llmtune.errors import CheckpointError, ConfigError, ModelError, OutputError, PlanError
from llmtune.evaluation import Prompt, answer, prompts_of
from llmtune.evaluation.generation import ROWS_AT_ONCE
from llmtune.evaluation.merge import check_merge
from llmtune.training.meter import is_out_of_memory
from llmtune.training.trainer import UpdateTrainer
from llmtune.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from llmtune.training.train import TrainingJob

# Tokens of the rehearsed answer.
FEW_TOKENS = 4
# A checkpoint holds the trained weights and, as large again each, the two moments of Adam.
CHECKPOINT_PARTS = 3
PREFIX = ".rehearsal-"
# Weights that are compared while their file is open: opening one takes a millisecond where it holds hundreds.
READ_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """What the rehearsals took, and what they have to say.

    Attributes:
        evaluation_seconds: One whole evaluation, reckoned from a few rows; None without evaluation data.
        save_seconds: One checkpoint, reckoned from the result's files.
        result_bytes: The result's files.
        notices: What works otherwise than one would expect.
    """

    evaluation_seconds: float | None
    save_seconds: float
    result_bytes: int
    notices: tuple[str, ...]

    @classmethod
    def nothing(cls) -> Rehearsed:
        """No rehearsal took place."""
        return cls(evaluation_seconds=None, save_seconds=0.0, result_bytes=0, notices=())


def rehearse(job: TrainingJob, trainer: UpdateTrainer) -> Rehearsed:
    """Evaluate a few rows, save what would be the result, load it again, merge a copy of each kind of module.

    Raises:
        ConfigError: A metric of the user's fails.
        PlanError: Memory runs out.
        OutputError: The result cannot be written.
        ModelError: The result cannot be saved, or does not lead back to its base; the adapter cannot be merged.
        CheckpointError: What is read back is not what was written.
    """
    ranks, is_full = job.ranks, job.plan.method.value == "full"
    evaluation_seconds = None if job.eval_data is None else _evaluate(job, trainer)
    with _folder(job) as folder:
        began = time.perf_counter()
        ranks.agreed(lambda: _save(trainer, folder))
        saved = time.perf_counter() - began
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if ranks.is_main:
            speaker.say(f"rehearsed: saving the result, {format_bytes(size)} in {format_seconds(saved)}")
        began = time.perf_counter()
        ranks.agreed(lambda: _read_back(job, trainer, folder), main_only=True)
        speaker.say(f"rehearsed: loading it again, {format_seconds(time.perf_counter() - began)}")
    notices: tuple[str, ...] = ()
    if not is_full and ranks.is_sharded:
        notices = ("Merging was not rehearsed: the model is spread over the ranks.",)
    elif not is_full:
        began = time.perf_counter()
        notices = ranks.agreed(lambda: _merge(trainer), main_only=True) or ()
        speaker.say(f"rehearsed: merging a copy of each kind of module, {format_seconds(time.perf_counter() - began)}")
    for notice in notices:
        speaker.warn(notice)
    return Rehearsed(
        evaluation_seconds=evaluation_seconds,
        save_seconds=saved * CHECKPOINT_PARTS,
        result_bytes=size,
        notices=notices,
    )


# ------------------------------------------------------------------ evaluation


def _evaluate(job: TrainingJob, trainer: UpdateTrainer) -> float:
    """Loss of a few rows, one short answer and the user's metrics; returns seconds of a whole evaluation."""
    assert job.eval_data is not None
    data = job.eval_data
    few = _few(data, job.plan.token_budget.value, job.ranks.size)
    began = time.perf_counter()
    with _memory_explained("evaluation"):
        trainer.score(few)
    whole = (time.perf_counter() - began) * float(data.lengths.sum()) / float(few.lengths.sum())
    if not job.ranks.is_sharded:
        whole += job.ranks.agreed(lambda: _answer_and_judge(job, trainer, data), main_only=True) or 0.0
    seconds = time.perf_counter() - began
    speaker.say(f"rehearsed: evaluation of {len(few)} rows, {format_seconds(seconds)}")
    return job.ranks.from_main(whole)


def _few(data: EncodedDataset, token_budget: int, num_ranks: int) -> EncodedDataset:
    """The first rows that one pass holds, at least one for each rank."""
    fitting = int(np.searchsorted(np.cumsum(data.lengths), token_budget, side="right"))
    return data.select(np.arange(min(len(data), max(fitting, num_ranks))))


def _answer_and_judge(job: TrainingJob, trainer: UpdateTrainer, data: EncodedDataset) -> float:
    """One short answer, and each metric on as many answers as it will get; seconds of the answers of an evaluation."""
    wanted = job.config.evaluate
    if not job.metrics and not wanted.num_samples:
        return 0.0
    prompts = prompts_of(data, job.tokenizer, wanted.metric_rows if job.metrics else 1)
    began, device = time.perf_counter(), trainer.args.device
    tokens = min(FEW_TOKENS, wanted.max_new_tokens)
    with _memory_explained("answering"):
        answers = answer(trainer.model, job.tokenizer, prompts[:1], max_new_tokens=tokens, device=device)
    per_token = (time.perf_counter() - began) / tokens
    _judge(job, answers * len(prompts), prompts)
    rounds = -(-len(prompts) // ROWS_AT_ONCE) if job.metrics else 0
    return rounds * wanted.max_new_tokens * per_token


def _judge(job: TrainingJob, answers: list[str], prompts: list[Prompt]) -> None:
    problems: list[str] = []
    cause: Exception | None = None
    for name, metric in job.metrics.items():
        try:
            float(metric(answers, [prompt.reference for prompt in prompts]))
        except Exception as error:
            problems.append(
                f"'{name}' raised {type(error).__name__}: {error}; expected one number for {len(answers)} answers and "
                "as many references. The first evaluation would have ended the run"
            )
            cause = cause or error
    if cause is not None:
        raise ConfigError("metrics", problems) from cause


# ------------------------------------------------------------------ saving and loading


@contextmanager
def _folder(job: TrainingJob) -> Iterator[Path]:
    """A folder beside the result's, gone afterwards."""
    folder = job.ranks.from_main(job.run.path / f"{PREFIX}{uuid.uuid4().hex[:8]}")
    try:
        yield folder
    finally:
        job.ranks.wait()
        if job.ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _save(trainer: UpdateTrainer, folder: Path) -> None:
    lost = "The run would have lost its result at the end. Nothing was trained"
    try:
        trainer.save_final(folder)
    except Exception as error:  # each library that writes a part of it has its own
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError) or "os error" in str(error).lower() or "I/O error" in str(error):
            raise OutputError(
                f"the result cannot be written to {folder.parent}: {error}. {lost}. Free some space, mend the "
                "permissions, or choose another --output"
            ) from error
        raise ModelError(
            f"the result cannot be saved: {type(error).__name__}: {error}. {lost}. Update transformers and peft, or "
            "use another model"
        ) from error


def _read_back(job: TrainingJob, trainer: UpdateTrainer, folder: Path) -> None:
    problems = _tokenizer_problems(job, folder)
    if job.plan.method.value == "full":
        problems += _model_problems(job, trainer, folder)
    else:
        problems += _adapter_problems(job, trainer, folder)
    if problems:
        raise CheckpointError(
            f"the result, saved and loaded again before step 1, is not what was saved: {'; '.join(problems)}. Nothing "
            "was trained. Look at the disk, and for callbacks and programs that change files of the run"
        )


def _tokenizer_problems(job: TrainingJob, folder: Path) -> list[str]:
    from transformers import AutoTokenizer

    try:
        again = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        return [f"its tokenizer cannot be loaded: {error}"]
    if again.chat_template != job.tokenizer.chat_template or len(again) != len(job.tokenizer):
        return ["its tokenizer is another one"]
    return []


def _adapter_problems(job: TrainingJob, trainer: UpdateTrainer, folder: Path) -> list[str]:
    from peft import PeftConfig, get_peft_model_state_dict
    from safetensors import SafetensorError
    from transformers import AutoConfig

    problems = []
    try:
        config = PeftConfig.from_pretrained(str(folder))
        base, revision = config.base_model_name_or_path, config.revision
        trust = job.config.model.trust_remote_code
        AutoConfig.from_pretrained(base, revision=revision, local_files_only=True, trust_remote_code=trust)
    except (OSError, ValueError, TypeError, KeyError) as error:
        problems.append(f"adapter_config.json does not lead to its base model: {error}")
    try:
        if job.ranks.is_sharded:  # no rank has the whole of the live weights to compare with
            _saved(folder / "adapter_model.safetensors")
            return problems
        live = get_peft_model_state_dict(trainer.model, save_embedding_layers=False)
        problems += _differences(live, folder / "adapter_model.safetensors", beside=trainer.model.state_dict())
    except (OSError, SafetensorError) as error:
        problems.append(f"adapter_model.safetensors cannot be read: {error}")
    return problems


def _model_problems(job: TrainingJob, trainer: UpdateTrainer, folder: Path) -> list[str]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    trust = job.config.model.trust_remote_code
    try:
        with torch.random.fork_rng():
            _, info = AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, device_map="meta", trust_remote_code=trust
            )
        wrong = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
        problems = [f"{len(keys)} {kind} weights ({keys[0]}, …)" for kind, keys in wrong.items() if keys]
        if not job.ranks.is_sharded:
            live = trainer.model.state_dict()
            for file in sorted(folder.glob("*.safetensors")):
                problems += _differences({}, file, beside=live)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        problems = [f"the model cannot be loaded: {error}"]
    return problems


def _saved(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = load_file(file)
    return tensors


def _differences(live: dict[str, Any], file: Path, *, beside: dict[str, Any]) -> list[str]:
    """What in ``file`` is not, to the bit, as in ``live``; what else it holds is compared with ``beside``.

    Weights are read a few at a time: a model need not fit memory a second time.
    """
    keys = _keys(file)
    problems = []
    if missing := sorted(live.keys() - keys):
        problems.append(f"{len(missing)} weights are missing in {file.name} ({missing[0]}, …)")
    known = {key: tensor for key in sorted(keys) if (tensor := live.get(key, beside.get(key))) is not None}
    other = [key for some in _by_size(known) for key in _differing(some, file)]
    if unexpected := sorted(key for key in keys if live and key not in live and key not in beside):
        problems.append(f"{len(unexpected)} weights of {file.name} are not the model's ({unexpected[0]}, …)")
    if other:
        problems.append(f"{len(other)} weights of {file.name} differ from those in memory ({other[0]}, …)")
    return problems


def _keys(file: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as saved:
        return set(saved.keys())


def _by_size(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The same in groups of at most `READ_BYTES`, or of one."""
    group: dict[str, torch.Tensor] = {}
    size = 0
    for key, tensor in tensors.items():
        if group and size + tensor.nbytes > READ_BYTES:
            yield group
            group, size = {}, 0
        group[key] = tensor
        size += tensor.nbytes
    if group:
        yield group


def _differing(known: dict[str, torch.Tensor], file: Path) -> list[str]:
    """Names of those that are not the same in ``file``, which is open meanwhile: what is read of it stays so long."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as saved:
        return [key for key, tensor in known.items() if not _same(tensor.detach().cpu(), saved.get_tensor(key))]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the bit, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


# ------------------------------------------------------------------ merging


def _merge(trainer: UpdateTrainer) -> tuple[str, ...]:
    with _memory_explained("merging the adapter"):
        return check_merge(trainer.model)


@contextmanager
def _memory_explained(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise PlanError(
            f"memory ran out in the rehearsal of {what}, before step 1; it would have run out in the run as well. "
            "Free memory, or lower it with --set train.token_budget, --method qlora or a smaller model"
        ) from error
