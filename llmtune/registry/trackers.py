"""Every tracker of transformers' ``report_to``: its packages, and the account that it reports to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmtune.errors import did_you_mean
from llmtune.registry.needs import Credential, Package, missing_packages

# Words for every tracker that is usable, and for none.
ALL, NONE = "all", "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracker:
    """A name that ``report_to`` takes.

    Attributes:
        packages: Packages that it needs, all of them.
        credential: What it needs to reach its server; None where it writes files.
    """

    name: str
    packages: tuple[Package, ...] = ()
    credential: Credential | None = None

    def problem(self) -> str | None:
        """Return why a run cannot report to the tracker, and the command that changes it; None where it can."""
        if absent := missing_packages(self.packages):
            return f"which needs a package that is not installed: {absent[0].command}"
        if self.credential is not None and not self.credential.is_set:
            return f"which needs {' or '.join(self.credential.variables)}: {self.credential.command}"
        return None


def _package(module: str, install: str | None = None) -> Package:
    return Package(modules=(module,), install=install or module)


_MLFLOW = _package("mlflow")

TRACKERS: Mapping[str, Tracker] = {
    tracker.name: tracker
    for tracker in (
        Tracker(
            name="tensorboard",
            packages=(Package(modules=("tensorboard", "tensorboardX"), install="llmtune[tracking]"),),
        ),
        Tracker(name="trackio", packages=(_package("trackio"),)),
        Tracker(name="mlflow", packages=(_MLFLOW,)),
        Tracker(name="dvclive", packages=(_package("dvclive"),)),
        Tracker(name="codecarbon", packages=(_package("codecarbon"),)),
        Tracker(name="azure_ml", packages=(_package("azureml.core.run", "azureml-core"),)),
        Tracker(
            name="wandb",
            packages=(_package("wandb"),),
            credential=Credential(
                variables=("WANDB_API_KEY", "WANDB_MODE"),
                files=((".netrc", "wandb"), ("_netrc", "wandb")),
                command="wandb login, or WANDB_MODE=offline to keep the results here",
            ),
        ),
        Tracker(
            name="comet_ml",
            packages=(
                Package(modules=("comet_ml",), install="comet-ml>=3.43.2", least="3.43.2", distribution="comet-ml"),
            ),
            credential=Credential(
                variables=("COMET_API_KEY",), files=((".comet.config", "api_key"),), command="comet login"
            ),
        ),
        Tracker(
            name="neptune",
            packages=(_package("neptune"),),
            credential=Credential(variables=("NEPTUNE_API_TOKEN",), command="export NEPTUNE_API_TOKEN=…"),
        ),
        Tracker(
            name="clearml",
            packages=(_package("clearml"),),
            credential=Credential(
                variables=("CLEARML_API_ACCESS_KEY", "CLEARML_CONFIG_FILE"),
                files=(("clearml.conf", ""),),
                command="clearml-init",
            ),
        ),
        Tracker(
            name="dagshub",
            packages=(_package("dagshub"), _MLFLOW),
            credential=Credential(variables=("DAGSHUB_USER_TOKEN",), command="export DAGSHUB_USER_TOKEN=…"),
        ),
        Tracker(
            name="swanlab",
            packages=(_package("swanlab"),),
            credential=Credential(
                variables=("SWANLAB_API_KEY", "SWANLAB_MODE"),
                files=((".swanlab/.netrc", ""),),
                command="swanlab login, or SWANLAB_MODE=local to keep the results here",
            ),
        ),
        Tracker(
            name="flyte",
            packages=(_package("flytekit"),),
            credential=Credential(
                variables=("FLYTE_INTERNAL_EXECUTION_ID",), command="it reports only from within a Flyte task"
            ),
        ),
        Tracker(
            name="kubeflow",
            credential=Credential(
                variables=("KUBEFLOW_TRAINER_SERVER_URL",), command="it reports only from within a Kubeflow TrainJob"
            ),
        ),
    )
}


def resolve_trackers(asked: Sequence[str]) -> tuple[str, ...]:
    """Return the trackers that ``monitor.report_to`` means: ``all`` is every usable one, ``none`` is none."""
    if tuple(asked) == (NONE,):
        return ()
    if tuple(asked) == (ALL,):
        return tuple(name for name, tracker in TRACKERS.items() if tracker.problem() is None)
    return tuple(dict.fromkeys(asked))


def tracker_problems(asked: Iterable[str]) -> list[str]:
    """Return one sentence for each name of ``monitor.report_to`` that a run could not report to."""
    asked, problems = list(asked), []
    if len(asked) > 1:
        problems += [f"got '{word}' and other names; give it alone" for word in (ALL, NONE) if word in asked]
    for name in dict.fromkeys(asked):
        if name in (ALL, NONE):
            continue
        if name not in TRACKERS:
            problems.append(f"got '{name}'{did_you_mean(name, [*TRACKERS, ALL, NONE])}")
        elif (problem := TRACKERS[name].problem()) is not None:
            problems.append(f"got '{name}', {problem}")
    return [f"monitor.report_to: {problem}" for problem in problems]
