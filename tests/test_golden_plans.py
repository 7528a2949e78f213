"""The whole plan for one data set on ten described machines, as it is printed.

Each file in ``plans/`` was read as somebody who tunes models for a living reads it. When a plan changes on purpose,
write the files anew with ``LLMTUNE_WRITE_PLANS=1 pytest tests/test_golden_plans.py`` and read the difference.
"""

from __future__ import annotations

import json
import os
import textwrap
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from llmtune.config import load_config
from llmtune.data import DataStats
from llmtune.errors import PlanError
from llmtune.hardware import Hardware, choose_device
from llmtune.models import spec_from_entry
from llmtune.planning import Choice, Plan, PlanRequest, choose_model, make_plan
from llmtune.presets import CatalogueEntry, Preset

PLANS = Path(__file__).parent / "plans"
MACHINES = sorted(path.stem for path in (PLANS / "machines").glob("*.json"))
# 2,000 conversations of an assistant, 200 of them held out: what a survey of such a file says at four bytes per token.
CHAT = DataStats(
    rows=1_800,
    tokens=1_800 * 220,
    supervised_tokens=1_800 * 99,
    length_p50=167,
    length_p95=584,
    length_p99=1_020,
    length_max=1_800,
    estimated=True,
)
BYTES_PER_TOKEN = 4.0
WIDTH = 118


def chat_request(machine: str, entry: CatalogueEntry) -> PlanRequest:
    hardware = Hardware.from_file(PLANS / "machines" / f"{machine}.json")
    counts = ("tokens", "supervised_tokens", "length_p50", "length_p95", "length_p99", "length_max")
    scale = BYTES_PER_TOKEN / entry.bytes_per_token
    return PlanRequest(
        config=load_config({}, environ={}),
        hardware=hardware,
        device=choose_device(hardware),
        spec=spec_from_entry(entry),
        preset=Preset.load(entry.family),
        stats=replace(CHAT, **{name: round(getattr(CHAT, name) * scale) for name in counts}),
        eval_rows=200,
        processes=1,
        model_choice=Choice(entry.id, "candidate", "derived"),
        complexity=0.5,
    )


@cache
def planned(machine: str) -> Plan | str:
    """The plan with the model that was chosen, or the message when there is none."""
    try:
        entry, choice = choose_model(lambda entry: make_plan(chat_request(machine, entry), alternatives=False))
    except PlanError as error:
        return str(error)
    return make_plan(replace(chat_request(machine, entry), model_choice=choice))


def rendered(machine: str) -> str:
    """The plan as people read it, one choice after the other, lines broken so that differences are short."""
    hardware = Hardware.from_file(PLANS / "machines" / f"{machine}.json")
    lines, plan = [hardware.describe(), ""], planned(machine)
    if isinstance(plan, str):
        return "\n".join([*lines, *textwrap.wrap(plan, WIDTH)]) + "\n"
    for name, value, source, reason in plan.rows():
        lines += textwrap.wrap(f"{name}: {value}  [{source}]", WIDTH, subsequent_indent="    ")
        lines += textwrap.wrap(reason, WIDTH, initial_indent="    ", subsequent_indent="    ")
    for text in (plan.summary(), *plan.notices):
        lines += ["", *textwrap.wrap(text, WIDTH)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("machine", MACHINES)
def test_the_plan_is_the_one_that_was_reviewed(machine: str) -> None:
    path = PLANS / f"{machine}.txt"
    if os.environ.get("LLMTUNE_WRITE_PLANS"):
        path.write_text(rendered(machine), encoding="utf-8")
    assert rendered(machine) == path.read_text(encoding="utf-8")


def test_every_machine_of_the_list_is_there() -> None:
    assert len(MACHINES) == 10
    assert {path.stem for path in PLANS.glob("*.txt")} == set(MACHINES)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_described_machine_is_what_it_says(machine: str) -> None:
    path = PLANS / "machines" / f"{machine}.json"
    assert Hardware.from_file(path).to_json() == json.loads(path.read_text(encoding="utf-8"))
