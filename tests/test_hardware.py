from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.errors import ConfigError, HardwareError
from llmtune.hardware import Accelerator, Cpu, Hardware, Usable, choose_device, detect, diagnose
from llmtune.hardware.accelerators import nvml_devices, visible_devices
from llmtune.hardware.cgroup import CgroupLimits, read_limits
from llmtune.hardware.cpu import read_cpu
from llmtune.hardware.detection import free_disk_bytes
from llmtune.hardware.doctor import machine_problems, version_problems
from llmtune.units import GIB

CPU = Cpu(model="Intel(R) Xeon(R) Processor", physical_cores=2, usable_cores=2, amx=True, avx512_bf16=True)


def machine(*accelerators: Accelerator, **changes: Any) -> Hardware:
    facts: dict[str, Any] = {
        "accelerators": accelerators,
        "cpu": CPU,
        "ram_total_bytes": 24 * GIB,
        "ram_available_bytes": 20 * GIB,
        "cgroup_limit_bytes": None,
        "cgroup_used_bytes": None,
        "disk_free_bytes": 100 * GIB,
        "platform": "linux-x86_64",
    }
    return Hardware(**facts | changes)


def gpu(index: int = 0, free: int = 20 * GIB, **changes: Any) -> Accelerator:
    facts: dict[str, Any] = {
        "index": index,
        "name": "NVIDIA L4",
        "kind": "cuda",
        "total_bytes": 24 * GIB,
        "free_bytes": free,
        "compute_capability": (8, 9),
        "bf16": True,
        "fp16": True,
        "tf32": True,
    }
    return Accelerator(**facts | changes)


# --- facts and JSON ---------------------------------------------------------------------------------------------------

sizes = st.integers(0, 2**63 - 1)
accelerators = st.builds(
    Accelerator,
    index=st.integers(0, 64),
    name=st.text(),
    kind=st.sampled_from(["cuda", "rocm", "mps", "xpu"]),
    total_bytes=sizes,
    free_bytes=sizes,
    compute_capability=st.none() | st.tuples(st.integers(0, 20), st.integers(0, 9)),
    bf16=st.booleans(),
    fp16=st.booleans(),
    tf32=st.booleans(),
)
machines = st.builds(
    Hardware,
    accelerators=st.lists(accelerators, max_size=3).map(tuple),
    cpu=st.builds(
        Cpu,
        model=st.text(),
        physical_cores=st.integers(1, 512),
        usable_cores=st.integers(1, 512),
        amx=st.booleans(),
        avx512_bf16=st.booleans(),
    ),
    ram_total_bytes=sizes,
    ram_available_bytes=sizes,
    cgroup_limit_bytes=st.none() | sizes,
    cgroup_used_bytes=st.none() | sizes,
    disk_free_bytes=sizes,
    platform=st.text(),
)


@given(machines)
def test_json_round_trip(hardware: Hardware) -> None:
    document = json.loads(json.dumps(hardware.to_json()))
    assert Hardware.from_json(document) == hardware
    assert Hardware.from_json({"hardware": document, "versions": {}}) == hardware
    assert 0 <= hardware.usable_ram_bytes <= hardware.ram_available_bytes
    assert hardware.describe()


def test_bad_document_reports_everything_at_once(tmp_path: Path) -> None:
    document = machine(gpu()).to_json()
    document["ram_totl_bytes"] = document.pop("ram_total_bytes")
    document["cpu"]["amx"] = "yes"
    document["accelerators"][0] |= {"kind": "gpu", "nam": "x"}
    document["disk_free_bytes"] = -1
    path = tmp_path / "box.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError) as caught:
        Hardware.from_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: 6 problems.")
    for part in (
        "ram_totl_bytes: unknown key, did you mean 'ram_total_bytes'?",
        "ram_total_bytes: missing",
        'cpu.amx: got "yes", expected a valid boolean',
        "accelerators.0.nam: unknown key, did you mean 'name'?",
        "accelerators.0.kind: got \"gpu\", expected 'cuda', 'rocm', 'mps' or 'xpu'",
        "disk_free_bytes: got -1, expected greater than or equal to 0",
    ):
        assert part in message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b'{"hardware": 3}'])
def test_bad_file_is_one_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "box.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"box\.json"):
        Hardware.from_file(path)


def test_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="llmtune doctor --json"):
        Hardware.from_file(tmp_path / "absent.json")


def test_describe_is_one_line_for_people() -> None:
    assert machine().describe() == "2 cores Intel Xeon (AMX), 24.0 GiB RAM, no accelerator"
    limited = machine(gpu(0), gpu(1), cgroup_limit_bytes=4 * GIB, cgroup_used_bytes=GIB)
    assert limited.describe() == (
        "2 cores Intel Xeon (AMX), 4.0 GiB of 24.0 GiB RAM (cgroup limit), 2 x NVIDIA L4 24.0 GiB"
    )


def test_usable_ram_is_what_binds_first() -> None:
    assert machine().usable_ram_bytes == 20 * GIB
    assert machine(cgroup_limit_bytes=4 * GIB, cgroup_used_bytes=GIB).usable_ram_bytes == 3 * GIB
    assert machine(cgroup_limit_bytes=64 * GIB, cgroup_used_bytes=GIB).usable_ram_bytes == 20 * GIB
    assert machine(cgroup_limit_bytes=GIB, cgroup_used_bytes=2 * GIB).usable_ram_bytes == 0


def test_precision_is_what_every_device_has() -> None:
    old = gpu(1, bf16=False, tf32=False, compute_capability=(7, 5))
    assert machine().precision_support == ("bf16", "fp32")
    assert machine(gpu()).precision_support == ("bf16", "fp16", "tf32", "fp32")
    assert machine(gpu(), old).precision_support == ("fp16", "fp32")


# --- choosing a device ------------------------------------------------------------------------------------------------


def test_auto_takes_the_first_accelerator_else_the_cpu() -> None:
    several = choose_device(machine(gpu(0, free=GIB), gpu(1, free=9 * GIB)))
    assert str(several) == "cuda:0"
    assert "CUDA_VISIBLE_DEVICES" in several.reason
    assert str(choose_device(machine(gpu(0), gpu(1)))) == "cuda:0"
    choice = choose_device(machine(cgroup_limit_bytes=4 * GIB, cgroup_used_bytes=GIB))
    assert (str(choice), choice.index, choice.total_bytes, choice.free_bytes) == ("cpu", None, 4 * GIB, 3 * GIB)
    assert choice.reason == "no accelerator found"


def test_what_is_asked_for_is_taken() -> None:
    two = machine(gpu(0, free=9 * GIB), gpu(1, free=GIB))
    assert str(choose_device(two, "cuda:1")) == "cuda:1"
    assert str(choose_device(two, "cpu")) == "cpu"
    rocm = machine(gpu(kind="rocm", name="AMD Instinct MI300X", compute_capability=None))
    assert str(choose_device(rocm, "cuda")) == "cuda:0"
    apple = machine(gpu(kind="mps", name="Apple GPU", compute_capability=None))
    assert str(choose_device(apple, "auto")) == "mps"


@pytest.mark.parametrize("requested", ["cuda", "cuda:0", "mps", "xpu:3"])
def test_a_device_that_is_not_there_names_what_is(requested: str) -> None:
    with pytest.raises(HardwareError, match=f"'{requested}' was asked for and is not there; found: cpu"):
        choose_device(machine(), requested)
    with pytest.raises(HardwareError, match=r"found: cuda:0 \(NVIDIA L4\), cpu"):
        choose_device(machine(gpu()), "cuda:7")


@pytest.mark.parametrize("requested", ["cdua", "", "cuda:", "cpu:1", "cuda:x", "auto:0"])
def test_a_name_that_is_no_device(requested: str) -> None:
    with pytest.raises(HardwareError, match="no such device"):
        choose_device(machine(gpu()), requested)


# --- processor --------------------------------------------------------------------------------------------------------


def cpuinfo(tmp_path: Path, *entries: dict[str, object]) -> Path:
    (tmp_path / "proc").mkdir()
    blocks = ("".join(f"{key}\t: {value}\n" for key, value in entry.items()) for entry in entries)
    (tmp_path / "proc/cpuinfo").write_text("\n".join(blocks))
    return tmp_path


def x86(number: int, model: str, flags: str, core: int, socket: int = 0) -> dict[str, object]:
    return {
        "processor": number,
        "model name": model,
        "physical id": socket,
        "core id": core,
        "flags": f"fpu sse2 avx2 {flags}",
        "power management": "",
    }


def test_xeon_with_amx_two_sockets_two_threads_a_core(tmp_path: Path) -> None:
    name, flags = "Intel(R) Xeon(R) Platinum 8480+", "avx512_bf16 amx_bf16 amx_tile amx_int8"
    entries = [x86(n, name, flags, core=n % 4 // 2, socket=n // 4) for n in range(8)]
    cpu = read_cpu(cpuinfo(tmp_path, *entries), num_affinity=8)
    assert cpu == Cpu(model=name, physical_cores=4, usable_cores=8, amx=True, avx512_bf16=True)


def test_zen4_has_avx512_bf16_and_zen2_neither(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    new = read_cpu(cpuinfo(tmp_path / "new", x86(0, "AMD EPYC 9654 96-Core Processor", "avx512_bf16", 0)))
    old = read_cpu(cpuinfo(tmp_path / "old", x86(0, "AMD EPYC 7742 64-Core Processor", "", 0)))
    assert (new.amx, new.avx512_bf16) == (False, True)
    assert (old.amx, old.avx512_bf16) == (False, False)


def test_arm_names_its_part(tmp_path: Path) -> None:
    entry: dict[str, object] = {"Features": "fp asimd bf16 sve", "CPU implementer": "0x41", "CPU part": "0xd40"}
    cpu = read_cpu(cpuinfo(tmp_path, *({"processor": n} | entry for n in range(4))), num_affinity=4)
    assert cpu.model == "Arm CPU (implementer 0x41, part 0xd40)"
    assert (cpu.physical_cores, cpu.usable_cores, cpu.amx) == (4, 4, False)


def test_usable_cores_are_affinity_and_quota(tmp_path: Path) -> None:
    root = cpuinfo(tmp_path, *(x86(n, "AMD", "", n) for n in range(8)))
    assert read_cpu(root, num_affinity=3).usable_cores == 3
    assert read_cpu(root, num_affinity=3, cpu_quota=2.5).usable_cores == 2
    assert read_cpu(root, num_affinity=3, cpu_quota=0.5).usable_cores == 1


def test_without_proc_psutil_answers(tmp_path: Path) -> None:
    cpu = read_cpu(tmp_path)
    assert cpu.model
    assert cpu.physical_cores >= 1


# --- control groups ---------------------------------------------------------------------------------------------------

V2_MOUNT = "30 24 0:26 {shown} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {shown} /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}"


def tree(root: Path, own: str, mounts: list[str], files: Mapping[str, object]) -> Path:
    self = root / "proc/self"
    self.mkdir(parents=True)
    (self / "cgroup").write_text(own + "\n")
    (self / "mountinfo").write_text("\n".join(["24 1 8:1 / / rw - ext4 /dev/sda rw", *mounts]) + "\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_v2_walks_up_to_the_group_that_leaves_least(tmp_path: Path) -> None:
    files = {
        "user.slice/job/memory.max": "max",
        "user.slice/job/memory.current": 100,
        "user.slice/job/cpu.max": "max 100000",
        "user.slice/memory.max": 4 * GIB,
        "user.slice/memory.current": GIB + 500,
        "user.slice/memory.stat": "anon 7\ninactive_file 500\nactive_file 3",
        "user.slice/cpu.max": "150000 100000",
        "cgroup.procs": "",
    }
    root = tree(tmp_path, "0::/user.slice/job", [V2_MOUNT.format(shown="/")], files)
    assert read_limits(root) == CgroupLimits(memory_limit_bytes=4 * GIB, memory_used_bytes=GIB, cpu_quota=1.5)


def test_v2_full_parent_binds_before_a_smaller_limit(tmp_path: Path) -> None:
    files = {
        "a/b/memory.max": 2 * GIB,
        "a/b/memory.current": 0,
        "a/memory.max": 3 * GIB,
        "a/memory.current": 2 * GIB,
    }
    root = tree(tmp_path, "0::/a/b", [V2_MOUNT.format(shown="/")], files)
    assert read_limits(root) == CgroupLimits(memory_limit_bytes=3 * GIB, memory_used_bytes=2 * GIB)


@pytest.mark.parametrize(
    ("own", "shown"),
    [("0::/", "/"), ("0::/docker/abc", "/docker/abc"), ("0::/docker/abc", "/"), ("0::/../other", "/")],
    ids=["own namespace", "bind-mounted group", "hidden path", "outside the namespace"],
)
def test_v2_container_sees_its_group_at_the_mount_point(tmp_path: Path, own: str, shown: str) -> None:
    files = {"memory.max": GIB, "memory.current": 7, "cpu.max": "50000 100000"}
    root = tree(tmp_path, own, [V2_MOUNT.format(shown=shown)], files)
    assert read_limits(root) == CgroupLimits(memory_limit_bytes=GIB, memory_used_bytes=7, cpu_quota=0.5)


def test_v1_limit_and_quota(tmp_path: Path) -> None:
    files = {
        "memory/docker/abc/memory.limit_in_bytes": 2 * GIB,
        "memory/docker/abc/memory.usage_in_bytes": GIB,
        "memory/docker/abc/memory.stat": "inactive_file 1\ntotal_inactive_file 24",
        "memory/memory.limit_in_bytes": 9223372036854771712,
        "memory/memory.usage_in_bytes": 8 * GIB,
        "cpu/docker/abc/cpu.cfs_quota_us": 200000,
        "cpu/docker/abc/cpu.cfs_period_us": 100000,
        "cpu/cpu.cfs_quota_us": -1,
        "cpu/cpu.cfs_period_us": 100000,
    }
    mounts = [V1_MOUNT.format(shown="/", name=name) for name in ("memory", "cpu")]
    root = tree(tmp_path, "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/", mounts, files)
    assert read_limits(root) == CgroupLimits(memory_limit_bytes=2 * GIB, memory_used_bytes=GIB - 24, cpu_quota=2.0)


def test_hybrid_takes_the_version_that_has_the_controller(tmp_path: Path) -> None:
    files = {"memory/memory.limit_in_bytes": GIB, "memory/memory.usage_in_bytes": 0, "unified/cgroup.procs": ""}
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    root = tree(tmp_path, "4:memory:/\n0::/", [unified, V1_MOUNT.format(shown="/", name="memory")], files)
    assert read_limits(root) == CgroupLimits(memory_limit_bytes=GIB, memory_used_bytes=0)


def test_no_limits(tmp_path: Path) -> None:
    assert read_limits(tmp_path) == CgroupLimits()
    files = {"memory/memory.limit_in_bytes": 9223372036854771712, "memory/memory.usage_in_bytes": 5}
    root = tree(tmp_path, "4:memory:/", [V1_MOUNT.format(shown="/", name="memory")], files)
    assert read_limits(root) == CgroupLimits()


# --- NVIDIA's library, asked without creating a context ---------------------------------------------------------------


class Nvml:
    """The few functions of nvidia-ml-py that are called, over a list of devices; a device is its own handle."""

    class NVMLError(Exception):
        pass

    def __init__(self, *names: str, mig: bool = False) -> None:
        self.devices = [SimpleNamespace(name=name, place=i) for i, name in enumerate(names)]
        self.mig = mig

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, place: int) -> Any:
        return self.devices[place]

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return str(handle.name)

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return f"GPU-{handle.place}abc"

    def nvmlDeviceGetMigMode(self, handle: Any) -> tuple[int, int]:
        if not self.mig:
            raise self.NVMLError("Not Supported")
        return 1, 1

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        return SimpleNamespace(total=10 * GIB, free=handle.place * GIB)

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> tuple[int, int]:
        return (7, 5) if "T4" in handle.name else (9, 0)


def test_nvml_devices_are_numbered_as_torch_sees_them() -> None:
    found = nvml_devices(Nvml("H100", "H100", "H100"), 2, {"CUDA_VISIBLE_DEVICES": "2,0"})
    assert found is not None
    assert [(a.index, a.free_bytes) for a in found] == [(0, 2 * GIB), (1, 0)]
    assert (found[0].bf16, found[0].tf32, found[0].compute_capability) == (True, True, (9, 0))
    old = nvml_devices(Nvml("T4"), 1, {})
    assert old is not None
    assert (old[0].bf16, old[0].fp16, old[0].tf32) == (False, True, False)


def test_nvml_gives_way_where_it_might_number_otherwise() -> None:
    assert nvml_devices(Nvml("H100", "T4"), 2, {}) is None
    assert nvml_devices(Nvml("H100", "T4"), 2, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) is not None
    assert nvml_devices(Nvml("H100", mig=True), 1, {}) is None
    assert nvml_devices(Nvml("H100", "H100"), 1, {}) is None


def test_visible_devices() -> None:
    uuids = ["GPU-aa1", "GPU-ab2"]
    assert visible_devices(None, uuids) == [0, 1]
    assert visible_devices("1", uuids) == [1]
    assert visible_devices("GPU-ab,0", uuids) == [1, 0]
    assert visible_devices("", uuids) == []
    for unclear in ("5", "-1", "GPU-a", "MIG-x"):
        assert visible_devices(unclear, uuids) is None


# --- this machine -----------------------------------------------------------------------------------------------------


def test_detect_agrees_with_the_system(tmp_path: Path) -> None:
    hardware = detect(tmp_path / "not" / "there" / "yet", accelerators=())
    assert hardware.ram_total_bytes == psutil.virtual_memory().total
    assert 0 < hardware.usable_ram_bytes <= hardware.ram_total_bytes
    assert 1 <= hardware.cpu.usable_cores <= (psutil.cpu_count() or 1)
    assert hardware.disk_free_bytes > 0
    assert free_disk_bytes(tmp_path) > 0


def test_detect_reads_the_limits_of_the_given_root(tmp_path: Path) -> None:
    files = {"memory.max": GIB, "memory.current": 0, "cpu.max": "100000 100000"}
    hardware = detect(root=tree(tmp_path, "0::/", [V2_MOUNT.format(shown="/")], files), accelerators=())
    assert (hardware.cgroup_limit_bytes, hardware.cpu.usable_cores) == (GIB, 1)
    assert hardware.usable_ram_bytes <= GIB


def test_diagnosis_holds_what_other_programs_rely_on() -> None:
    diagnosis = diagnose()
    document = json.loads(json.dumps(diagnosis.to_json()))
    assert set(document) == {"hardware", "versions", "usable", "problems"}
    assert Hardware.from_json(document) == diagnosis.hardware
    assert {
        "bf16",
        "fp16",
        "tf32",
        "amx",
        "bitsandbytes_4bit",
        "bitsandbytes_8bit",
        "flash_attention",
        "compile",
    } <= set(document["usable"])
    assert all(set(entry) == {"available", "why"} and entry["why"] for entry in document["usable"].values())
    assert all(entry["problem"] and entry["fix"] for entry in document["problems"])
    assert diagnosis.versions["python"].startswith("3.")
    assert isinstance(diagnosis.usable["distributed_gloo"], Usable)
    assert diagnosis.usable["bitsandbytes_4bit"].available, diagnosis.usable["bitsandbytes_4bit"].why
    assert diagnosis.usable["bitsandbytes_8bit"].available, diagnosis.usable["bitsandbytes_8bit"].why


def test_importing_the_package_is_light() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'peft', 'optuna', 'accelerate', 'pydantic'}"
    code = f"import sys, llmtune.hardware; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --- what doctor complains of -----------------------------------------------------------------------------------------


def test_versions_outside_the_bounds_name_the_command() -> None:
    requirements = ["torch<2.14,>=2.11", "peft>=0.20", "rich>=13"]
    found = list(version_problems(requirements, {"torch": "2.14.1+cu130", "peft": "missing", "rich": "13.9"}))
    assert [problem.problem for problem in found] == [
        "torch 2.14.1+cu130 is outside what llmtune is tested with (<2.14,>=2.11)",
        "peft is not installed",
    ]
    assert [problem.fix for problem in found] == ["pip install 'torch<2.14,>=2.11'", "pip install 'peft>=0.20'"]
    assert list(version_problems(["torch<2.14"], {"torch": "2.13.0+cpu"})) == []


def test_limits_of_the_machine_are_told() -> None:
    assert list(machine_problems(machine(), swap_bytes=0)) == []
    poor = machine(
        cpu=Cpu(model="old", physical_cores=1, usable_cores=1, amx=False, avx512_bf16=False),
        disk_free_bytes=GIB,
        cgroup_limit_bytes=2 * GIB,
        cgroup_used_bytes=GIB,
    )
    told = " ".join(problem.problem for problem in machine_problems(poor, swap_bytes=0))
    for part in ("1.0 GiB of disk", "limits this process to 2.0 GiB", "no swap", "no bf16"):
        assert part in told
    assert "no swap" not in " ".join(problem.problem for problem in machine_problems(poor, swap_bytes=GIB))


def test_nvidia_driver_with_a_torch_that_cannot_use_it(tmp_path: Path) -> None:
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch is built with CUDA")
    driver = tmp_path / "proc/driver/nvidia/version"
    driver.parent.mkdir(parents=True)
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65")
    found = [problem for problem in diagnose(machine(), root=tmp_path).problems if "NVIDIA driver" in problem.problem]
    assert len(found) == 1
    assert "pip install" in found[0].fix
