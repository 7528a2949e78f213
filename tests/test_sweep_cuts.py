"""The full matrix of cuts: killed in every update of a run, in every way to train. By hand: ``pytest -m sweep``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cutting import MODES, UPDATES, assert_equal, cut_and_resumed, in_process, matrix_settings, train

pytestmark = pytest.mark.sweep


@pytest.fixture(scope="module")
def whole(
    family_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, bool, int], Path]:
    """The run that nothing interrupts, once for each way to train."""
    made: dict[tuple[str, bool, int], Path] = {}

    def run(mode: str, packing: bool, passes: int) -> Path:
        if (mode, packing, passes) not in made:
            output = tmp_path_factory.mktemp("whole") / "run"
            assert in_process(train, family_model("llama"), output, **matrix_settings(mode, packing, passes)) == 0
            made[mode, packing, passes] = output
        return made[mode, packing, passes]

    return run


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", range(1, UPDATES))
def test_fault_25_cut_at_every_step(
    whole: Callable[[str, bool, int], Path],
    family_model: Callable[[str], Path],
    tmp_path: Path,
    k: int,
    mode: str,
    packing: bool,
    passes: int,
) -> None:
    expected = whole(mode, packing, passes)
    cut_and_resumed(family_model("llama"), tmp_path / "cut", k, **matrix_settings(mode, packing, passes))
    assert_equal(expected, tmp_path / "cut")
