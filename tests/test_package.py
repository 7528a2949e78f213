"""What ships: the wheel's content, light imports, documented public names, and the floors of the house."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import llmtune

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "datasets", "peft", "optuna", "accelerate", "bitsandbytes")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, llmtune; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented() -> None:
    assert sorted(llmtune.__all__) == llmtune.__all__
    for name in llmtune.__all__:
        assert getattr(llmtune, name).__doc__, name
    assert set(llmtune.__all__) == set(llmtune._HOME) == set(dir(llmtune))
    with pytest.raises(AttributeError, match="FineTunr"):
        llmtune.FineTunr  # noqa: B018


def test_the_floors_of_the_house_hold() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_wheel_holds_what_git_tracks(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split(
        "\n"
    )
    homes = {
        "llmtune/": "llmtune/",
        "presets/": "llmtune/presets/data/",
        "accelerate_configs/": "llmtune/accelerate_configs/",
    }
    expected = {
        home + name.removeprefix(folder) for name in listed for folder, home in homes.items() if name.startswith(folder)
    }
    assert shipped == expected
    assert "llmtune/py.typed" in shipped
    assert "llmtune/builtin/tiny/model.safetensors" in shipped
