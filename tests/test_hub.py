"""Models from the Hub, against a mirror on this machine that answers as the Hub does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hub_mirror import COMMIT

from llmtune.models import read_spec
from llmtune.models.locate import locate


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(model: Path, scenario: str, home: Path, port: int, **environment: str) -> tuple[dict, str]:
    program = Path(__file__).with_name("hub_mirror.py")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE", "TRANSFORMERS_"))}
    paths = os.pathsep.join([str(program.parent.parent), os.environ.get("PYTHONPATH", "")])
    env = inherited | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "PYTHONPATH": paths}
    env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | environment
    done = subprocess.run(
        [sys.executable, str(program), str(model), scenario],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def hub(family_model, tmp_path_factory) -> dict:
    """Answers by name; ``stderr`` is what was said meanwhile."""
    model, home, port = family_model("qwen2"), tmp_path_factory.mktemp("hf_home"), free_port()
    answers, stderr = run(model, "online", home, port)
    offline, _ = run(model, "offline", home, port, HF_HUB_OFFLINE="1")
    return answers | {f"offline {name}": answer for name, answer in offline.items()} | {"stderr": stderr}


def test_a_model_is_fetched_described_and_loaded(hub, family_model):
    from llmtune.config import ModelConfig

    spec = read_spec(locate(ModelConfig(id=str(family_model("qwen2")))), "qwen")
    answer = hub["tiny"]
    assert (answer["revision"], answer["offline"], answer["eos"]) == (COMMIT, False, 1)
    assert answer["parameters"] == spec.parameters + spec.adapter_parameters(2, ("all-linear",))
    assert f"GET /acme/tiny/resolve/{COMMIT}/model.safetensors" in answer["requests"]


def test_what_is_cached_is_not_fetched_again(hub):
    answer = hub["again"]
    assert answer["parameters"] == hub["tiny"]["parameters"]
    assert not [request for request in answer["requests"] if request.startswith("GET /acme")]


def test_a_tag_and_a_renamed_repository(hub):
    assert hub["tag"]["revision"] == COMMIT
    assert hub["moved"]["revision"] == COMMIT


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gated", "is gated: accept its licence at http://127.0.0.1:{port}/acme/gated, then set HF_TOKEN"),
        ("gated with token", "is gated, and your access token does not open it: accept its licence at"),
        ("missing", "not found on the Hub, and there is no directory of that name here. Check the spelling"),
        ("no revision", "the Hub has no revision 'v9' of it"),
        ("empty", "the repository has no config.json"),
        ("broken", "answered with status 500. Ways out:"),
        ("busy", "answered with status 503. Ways out:"),
        ("badtoken", "does not accept your access token"),
        ("notahub", "is no Hub; check HF_ENDPOINT"),
        ("no id", "is neither a directory here nor a valid Hub id"),
        ("unreachable", "cannot be reached"),
        ("offline not cached", "HF_HUB_OFFLINE is set and it is not in the local cache. Ways out:"),
    ],
)
def test_each_refusal_is_one_message_without_delay(hub, name, says):
    answer = hub[name]
    message = answer["error"]
    assert says.split("{port}")[0] in message, message
    assert says.split("{port}")[-1] in message, message
    assert message.startswith("model 'acme/")
    assert "hf_secret" not in message
    assert "\n" not in message
    assert len([request for request in answer["requests"] if request.startswith(("HEAD /acme", "GET /acme"))]) <= 1


def test_ways_out_are_named_where_the_network_is_the_cause(hub):
    for name in ("unreachable", "busy", "notahub", "offline not cached"):
        assert "--model PATH" in hub[name]["error"]
        assert "--model builtin:tiny" in hub[name]["error"]


@pytest.mark.parametrize("name", ["busy but cached", "unreachable but cached", "offline cached"])
def test_a_cached_copy_serves_where_the_hub_does_not(hub, name):
    answer = hub[name]
    assert (answer["revision"], answer["offline"]) == (COMMIT, True)
    assert answer["parameters"] == hub["tiny"]["parameters"]
    assert len(answer["requests"]) <= 1


def test_using_the_cached_copy_is_said(hub):
    assert hub["gated but cached"]["revision"] == COMMIT
    assert hub["stderr"].count("The copy in the local cache is used.") == 3
