"""Fixtures that several test files share."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cgroups import MemoryGroup, NoMemoryGroupError, memory_group
from factories import DIRECTORY_NAMES, save_family_model
from hypothesis import settings

from llmtune.hardware import yield_cores

settings.register_profile("llmtune", deadline=None)  # a test never asserts on the time that a busy machine takes
settings.load_profile("llmtune")
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
yield_cores()  # before torch is imported: tests start processes that share the cores
# A shell starts what it puts into the background with SIGINT ignored, and so are all that this starts; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``family_model(family)``: the directory of a tiny saved model of that family, made once per session."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda family: save_family_model(family, root / DIRECTORY_NAMES[family]))


@pytest.fixture(autouse=True, scope="session")
def _own_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor write the user's caches, and never look for the Hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("LLMTUNE_STORE", raising=False)
        yield


@pytest.fixture
def limit() -> Iterator[Any]:
    """``limit(bytes)``: a group with that limit, gone after the test; skips where none can be made."""
    with ExitStack() as stack:

        def make(limit_bytes: int) -> MemoryGroup:
            try:
                return stack.enter_context(memory_group(limit_bytes))
            except NoMemoryGroupError as error:
                pytest.skip(str(error))

        yield make


@pytest.fixture
def cuda_matmul() -> Iterator[Any]:
    """torch's settings of matrix products on NVIDIA GPUs; fp32 ones in fp32 again after the test."""
    import torch

    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.allow_tf32 = False


_fault_outcomes: dict[int, set[str]] = {}


def _fault_numbers(nodeid: str) -> list[int]:
    """The numbers of the catalogue in the name of a test: ``test_fault_49_…``, ``test_fault_6_and_12_…``."""
    match = re.search(r"::test_fault_(\d+(?:_and_\d+)*)_", nodeid)
    return [int(number) for number in match[1].split("_and_")] if match else []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note how each numbered fault went; one that was skipped was not tried."""
    if report.when == "call" or report.failed:
        for number in _fault_numbers(report.nodeid):
            _fault_outcomes.setdefault(number, set()).add(report.outcome)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """``faults: N tried, N survived, 0 lost``: distinct numbers of the catalogue, each with all its tests."""
    tried = {number: outcomes - {"skipped"} for number, outcomes in _fault_outcomes.items() if outcomes != {"skipped"}}
    if not tried:
        return
    lost = sorted(number for number, outcomes in tried.items() if outcomes != {"passed"})
    named = f" ({', '.join(map(str, lost))})" if lost else ""
    survived = len(tried) - len(lost)
    terminalreporter.write_line(f"faults: {len(tried)} tried, {survived} survived, {len(lost)} lost{named}")
