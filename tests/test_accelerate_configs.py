from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmtune.errors import ConfigError
from llmtune.hardware import accelerate_config_names, accelerate_config_path, launch_sharding, launch_shortfall

NAMES = accelerate_config_names()


def test_every_promised_configuration_is_shipped() -> None:
    assert set(NAMES) == {
        "cpu_ddp",
        "ddp",
        "deepspeed_zero2",
        "deepspeed_zero3",
        "fsdp2",
        "multi_node_ddp",
        "single_gpu",
    }


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'cpu_dp': no such configuration, did you mean 'cpu_ddp'"):
        accelerate_config_path("cpu_dp")


def launcher_arguments(*arguments: str) -> argparse.Namespace:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*arguments, "train.py"]))
    assert isinstance(args, argparse.Namespace)
    return args


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_it_and_knows_every_key(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    path = accelerate_config_path(name)
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"  # the plan decides
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= known
    args = launcher_arguments("--config_file", str(path), "--num_processes", "1" if name == "single_gpu" else "2")
    assert args.multi_gpu == name.endswith("ddp")
    assert args.use_fsdp == (name == "fsdp2")
    assert args.use_deepspeed == name.startswith("deepspeed")
    for key, value in {**config.fsdp_config, **config.deepspeed_config}.items():
        assert getattr(args, key) == value


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_with_its_purpose_and_its_command(name: str) -> None:
    text = accelerate_config_path(name).read_text()
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# ")
    assert any(f'accelerate launch --config_file "$(llmtune accelerate-config {name})"' in line for line in comment)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("cpu_ddp", "single_gpu")])
def test_the_number_of_gpus_must_be_given(name: str) -> None:
    assert "num_processes" not in yaml.safe_load(accelerate_config_path(name).read_text())
    with pytest.raises(ValueError, match="num_processes"):
        launcher_arguments("--config_file", str(accelerate_config_path(name)))


def test_cpu_ddp_hides_gpus_and_takes_a_free_port() -> None:
    from accelerate.utils.launch import prepare_multi_gpu_env

    args = launcher_arguments("--config_file", str(accelerate_config_path("cpu_ddp")))
    env = prepare_multi_gpu_env(args)
    assert env["CUDA_VISIBLE_DEVICES"] == "-1,-1"
    assert (args.nproc_per_node, args.num_processes) == ("2", 2)
    assert int(args.master_port) > 0


def test_shortfall_is_the_port_without_the_size() -> None:
    assert launch_shortfall({}) is None
    assert launch_shortfall({"MASTER_PORT": "29500", "WORLD_SIZE": "2"}) is None
    assert launch_shortfall({"MASTER_PORT": "29500", "PMI_SIZE": "2"}) is None
    assert "WORLD_SIZE is not set" in (launch_shortfall({"MASTER_PORT": "29500"}) or "")


@pytest.mark.parametrize(
    ("name", "prepare", "sharding"),
    [
        ("fsdp2", "prepare_multi_gpu_env", "fsdp2"),
        ("ddp", "prepare_multi_gpu_env", None),
        ("deepspeed_zero2", "prepare_deepspeed_cmd_env", "zero2"),
        ("deepspeed_zero3", "prepare_deepspeed_cmd_env", "zero3"),
    ],
)
def test_what_accelerate_exports_says_how_a_launch_shards(name: str, prepare: str, sharding: str | None) -> None:
    import accelerate.utils.launch

    args = launcher_arguments("--config_file", str(accelerate_config_path(name)), "--num_processes", "2")
    args.deepspeed_fields_from_accelerate_config = ""  # set by the launcher, which also wants deepspeed installed
    made = getattr(accelerate.utils.launch, prepare)(args)
    env = made[1] if isinstance(made, tuple) else made
    assert launch_sharding(env) == sharding
    assert launch_sharding({}) is None


SCRIPT = """
import os, sys
from accelerate import PartialState
from llmtune.hardware import launch_shortfall
state = PartialState(cpu=True)
import torch, torch.distributed as dist
total = torch.tensor([state.process_index + 1.0])
if dist.is_initialized():
    dist.all_reduce(total)
backend = dist.get_backend() if dist.is_initialized() else "none"
line = f"rank {state.process_index} of {state.num_processes} {backend} sum {total.item():g}"
line += f" gpus {torch.cuda.device_count()} shortfall {launch_shortfall(os.environ) is not None}"
open(os.path.join(sys.argv[1], str(state.process_index)), "w").write(line)
if dist.is_initialized():
    dist.destroy_process_group()
"""


def launched(tmp_path: Path, *arguments: str) -> list[str]:
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    out.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *arguments, str(script), str(out)]
    env = {k: v for k, v in os.environ.items() if k not in ("MASTER_PORT", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [path.read_text() for path in sorted(out.iterdir())]


@pytest.mark.slow
def test_cpu_ddp_really_starts_two_ranks_over_gloo(tmp_path: Path) -> None:
    assert launched(tmp_path, "--config_file", str(accelerate_config_path("cpu_ddp"))) == [
        "rank 0 of 2 gloo sum 3 gpus 0 shortfall False",
        "rank 1 of 2 gloo sum 3 gpus 0 shortfall False",
    ]


@pytest.mark.slow
def test_the_launch_that_starts_one_rank_is_seen(tmp_path: Path) -> None:
    ranks = launched(tmp_path, "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    assert ranks == ["rank 0 of 1 none sum 1 gpus 0 shortfall True"]
