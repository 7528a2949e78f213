"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from factories import DIRECTORY_NAMES, save_family_model

from llmtune.hardware import yield_cores

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
yield_cores()  # before torch is imported: tests start processes that share the cores


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
