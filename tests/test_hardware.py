from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.errors import ConfigError, HardwareError
from llmtune.hardware import (
    Accelerator,
    Cpu,
    Hardware,
    Rates,
    Speed,
    Usable,
    cached_rates,
    choose_device,
    detect,
    diagnose,
    measure_rates,
    nominal_rates,
    note_rates,
    tf32_products,
    with_rates,
)
from llmtune.hardware.cgroup import CgroupLimits, read_limits
from llmtune.hardware.cpu import read_cpu
from llmtune.hardware.detection import free_disk_bytes
from llmtune.hardware.doctor import machine_problems, rate_problems, version_problems
from llmtune.hardware.nvidia import as_torch_numbers, driver_serves, nvml_cards, smi_cards, visible_devices
from llmtune.hardware.presence import kinds_built, kinds_present
from llmtune.hardware.probes import _flash_attention
from llmtune.hardware.rates import CACHE_FILE, _matmul_rate, disk_write_rate
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
rate = st.floats(min_value=1e-9, max_value=1e18)
speeds = st.builds(
    Speed,
    threads=st.integers(1, 512),
    matmul=st.dictionaries(st.sampled_from(["bf16", "fp16", "tf32", "fp32"]), rate),
    memory_bytes_per_second=rate,
    fresh_bytes_per_second=rate,
)
measurements = st.builds(
    Rates,
    device=st.text(),
    speeds=st.lists(speeds, min_size=1, max_size=2).map(tuple),
    op_seconds=rate,
    disk_write_bytes_per_second=st.none() | rate,
    busy_share=st.floats(0, 1),
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
    rates=st.none() | measurements,
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

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

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


def numbered(nvml: Nvml, **environ: str) -> list[Accelerator] | None:
    return as_torch_numbers(nvml_cards(nvml), environ)


def test_nvml_devices_are_numbered_as_torch_sees_them() -> None:
    found = numbered(Nvml("H100", "H100", "H100"), CUDA_VISIBLE_DEVICES="2,0")
    assert found is not None
    assert [(a.index, a.free_bytes) for a in found] == [(0, 2 * GIB), (1, 0)]
    assert (found[0].bf16, found[0].tf32, found[0].compute_capability) == (True, True, (9, 0))
    old = numbered(Nvml("T4"))
    assert old is not None
    assert (old[0].bf16, old[0].fp16, old[0].tf32) == (False, True, False)


def test_nvml_gives_way_where_it_might_number_otherwise() -> None:
    assert numbered(Nvml("H100", "T4")) is None
    assert numbered(Nvml("H100", "T4"), CUDA_DEVICE_ORDER="PCI_BUS_ID") is not None
    assert numbered(Nvml("H100", mig=True)) is None
    assert numbered(Nvml("H100"), CUDA_VISIBLE_DEVICES="") == []


def test_nvidia_smi_tells_the_same_as_nvml() -> None:
    answer = "T4, GPU-0abc, 10240, 0, 7.5, [N/A], 580.65.06\nT4, GPU-1abc, 10240, 1024, 7.5, Disabled, 580.65.06\n"
    assert smi_cards(answer) == nvml_cards(Nvml("T4", "T4"))
    sliced = smi_cards("H100, GPU-0abc, 81559, 80000, 9.0, Enabled, 580.65.06")
    assert sliced is not None
    assert sliced[0].mig
    assert smi_cards("") == []


@pytest.mark.parametrize(
    "answer",
    ["NVIDIA GB10, GPU-1, [N/A], [N/A], 12.1, [N/A], 580.95", "No devices were found", "T4, GPU-0, 10240, 0, 7.5"],
)
def test_nvidia_smi_that_does_not_know_leaves_it_to_torch(answer: str) -> None:
    assert smi_cards(answer) is None


@pytest.mark.parametrize(
    ("toolkit", "serves"), [("13.0", False), ("12.8", True), ("11.8", True), ("14.0", False), ("", False)]
)
def test_a_driver_older_than_the_toolkit_leaves_it_to_torch(toolkit: str, serves: bool) -> None:
    cards = smi_cards("T4, GPU-0, 10240, 0, 7.5, [N/A], 535.183.01")
    assert cards is not None
    assert driver_serves(cards, toolkit) is serves


def test_visible_devices() -> None:
    uuids = ["GPU-aa1", "GPU-ab2"]
    assert visible_devices(None, uuids) == [0, 1]
    assert visible_devices("1", uuids) == [1]
    assert visible_devices("GPU-ab,0", uuids) == [1, 0]
    assert visible_devices("", uuids) == []
    for unclear in ("5", "-1", "GPU-a", "MIG-x"):
        assert visible_devices(unclear, uuids) is None


# --- what can be there at all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "files", "expected"),
    [
        ("linux-x86_64", {}, set()),
        ("linux-x86_64", {"dev/nvme0": "", "dev/nvram": "", "dev/dri/renderD128": ""}, set()),
        ("linux-x86_64", {"dev/nvidia0": ""}, {"cuda"}),
        ("linux-x86_64", {"dev/nvidiactl": ""}, {"cuda"}),
        ("linux-x86_64", {"proc/driver/nvidia/version": "NVRM"}, {"cuda"}),
        ("linux-aarch64", {"dev/nvhost-gpu": ""}, {"cuda"}),
        ("linux-x86_64", {"dev/kfd": "", "sys/class/drm/renderD128/device/vendor": "0x1002"}, {"rocm"}),
        ("linux-x86_64", {"sys/class/drm/renderD128/device/vendor": "0x8086\n"}, {"xpu"}),
        ("linux-x86_64", {"sys/class/drm/renderD128/device/vendor": "0x8086", "dev/nvidia0": ""}, {"cuda", "xpu"}),
        ("linux-x86_64", {"dev/dxg": ""}, {"cuda", "rocm", "xpu"}),
        ("darwin-arm64", {}, {"mps"}),
        ("darwin-x86_64", {}, set()),
        ("win32-AMD64", {}, {"cuda", "rocm", "xpu"}),
    ],
)
def test_device_files_say_what_can_be_there(
    tmp_path: Path, platform: str, files: dict[str, str], expected: set[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert kinds_present(tmp_path, platform) == expected


def test_what_torch_is_built_for_is_read_off_its_version_file(tmp_path: Path) -> None:
    file = tmp_path / "version.py"
    file.write_text("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    assert kinds_built(file) == {"cuda": "13.0"}
    file.write_text("cuda: Optional[str] = None\nhip: Optional[str] = '7.1.2'\nxpu: Optional[str] = None\n")
    assert kinds_built(file) == {"rocm": "7.1.2"}
    file.write_text("cuda = None\nhip = None\nxpu = '20250301'\n")
    assert kinds_built(file) == {"xpu": "20250301"}
    file.write_text("cuda: Optional[str] = None\nhip: Optional[str] = None\nxpu: Optional[str] = None\n")
    assert kinds_built(file) == {}
    file.write_text("something new")
    assert set(kinds_built(file)) == {"cuda", "rocm", "xpu"}


def test_what_torch_is_built_for_agrees_with_torch() -> None:
    import torch

    built = kinds_built()
    assert (built.get("cuda"), built.get("rocm")) == (torch.version.cuda, torch.version.hip)


def test_detection_agrees_with_torch_and_imports_it_only_where_nothing_else_can_tell() -> None:
    code = """
import sys
from llmtune.hardware import choose_device, detect
from llmtune.hardware.presence import kinds_built, kinds_present
from llmtune.hardware.rates import CACHE_FILE, disk_write_rate
hardware = detect()
loaded = sorted({"torch", "pandas", "numpy", "transformers"} & set(sys.modules))
from llmtune.hardware.accelerators import ask_torch
facts = lambda accelerators: [(a.index, a.name, a.kind, a.compute_capability) for a in accelerators]
assert facts(hardware.accelerators) == facts(ask_torch()[0]), hardware
assert choose_device(hardware).type
print(loaded if not hardware.accelerators else [])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# --- how fast it is ---------------------------------------------------------------------------------------------------


def measured(device: str = CPU.model, *, factor: float = 1.0, busy: float = 0.0, disk: float | None = 3e8) -> Rates:
    def speed(threads: int) -> Speed:
        return Speed(
            threads=threads,
            matmul={"bf16": threads * factor * 1e12, "fp32": threads * factor * 1.6e11},
            memory_bytes_per_second=4e10,
            fresh_bytes_per_second=7e9,
        )

    return Rates(
        device=device, speeds=(speed(1), speed(2)), op_seconds=1e-6, disk_write_bytes_per_second=disk, busy_share=busy
    )


def test_measuring_gives_every_precision_and_leaves_nothing_behind(tmp_path: Path) -> None:
    import torch

    threads = torch.get_num_threads()
    hardware = detect(tmp_path, accelerators=())
    found = measure_rates(hardware, choose_device(hardware), disk_path=tmp_path)
    assert found.device == hardware.cpu.model
    assert [speed.threads for speed in found.speeds] == sorted({1, hardware.cpu.usable_cores})
    assert set(found.best.matmul) == set(hardware.precision_support)
    assert all(found.best.matmul[name] >= rate for name, rate in found.speeds[0].matmul.items())
    assert 0 <= found.busy_share <= 1
    assert torch.get_num_threads() == threads
    assert list(tmp_path.iterdir()) == []
    assert Hardware.from_json(replace(hardware, rates=found).to_json()).rates == found


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_tf32_is_on_only_inside_and_as_it_was_afterwards(before: str, cuda_matmul: Any) -> None:
    cuda_matmul.fp32_precision = before
    for wanted in (True, False, True):  # as often as a process trains
        with tf32_products(wanted):
            assert cuda_matmul.fp32_precision == ("tf32" if wanted else "ieee")
            assert cuda_matmul.allow_tf32 == wanted  # the older of torch's two names agrees and can be read
        assert (cuda_matmul.fp32_precision == "tf32") == (before == "tf32")
    with pytest.raises(ZeroDivisionError), tf32_products(before != "tf32"):
        raise ZeroDivisionError
    assert cuda_matmul.allow_tf32 == (before == "tf32")


def test_the_rate_of_tf32_is_that_of_fp32_numbers_in_tf32(cuda_matmul: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    seen = []

    def best_seconds(work: Callable[[], torch.Tensor], _device: str) -> float:
        seen.append((work().dtype, cuda_matmul.fp32_precision))
        return 1.0

    monkeypatch.setattr("llmtune.hardware.rates._best_seconds", best_seconds)
    for precision in ("tf32", "fp32", "tf32"):
        assert _matmul_rate(precision, "cpu", ((2, 3), (4, 5))) == (2 * 2 * 3 * 3 + 2 * 4 * 5 * 5) / 2
    assert seen == [(torch.float32, mode) for mode in ("tf32", "tf32", "ieee", "ieee", "tf32", "tf32")]


def test_what_was_measured_is_found_again_without_torch(tmp_path: Path) -> None:
    hardware, rates = machine(), measured()
    device = choose_device(hardware)
    assert cached_rates(hardware, device, tmp_path) is None
    note_rates(hardware, device, rates, tmp_path)
    assert cached_rates(hardware, device, tmp_path) == rates
    assert with_rates(hardware, device, tmp_path).rates == rates
    assert [path.name for path in tmp_path.iterdir()] == [CACHE_FILE]
    other = machine(cpu=replace(CPU, usable_cores=1))
    assert cached_rates(other, choose_device(other), tmp_path) is None
    here = detect()
    note_rates(here, choose_device(here), measured("as noted"), tmp_path)
    code = """
import sys
from pathlib import Path
from llmtune.hardware import cached_rates, choose_device, detect
hardware = detect()
print(cached_rates(hardware, choose_device(hardware), Path(sys.argv[1])).device)
print("torch" in sys.modules and not hardware.accelerators)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["as noted", "False"], done.stderr


def test_devices_of_one_machine_are_kept_apart(tmp_path: Path) -> None:
    hardware = machine(gpu())
    cpu, accelerator = choose_device(hardware, "cpu"), choose_device(hardware)
    note_rates(hardware, cpu, measured(), tmp_path)
    note_rates(hardware, accelerator, measured("NVIDIA L4", factor=9), tmp_path)
    of_cpu, of_gpu = (cached_rates(hardware, device, tmp_path) for device in (cpu, accelerator))
    assert of_cpu is not None
    assert of_gpu is not None
    assert (of_cpu.device, of_gpu.device) == (CPU.model, "NVIDIA L4")


def test_a_disturbed_measurement_does_not_replace_a_quiet_one(tmp_path: Path) -> None:
    hardware = machine()
    device, quiet, disturbed = choose_device(hardware), measured(), measured(factor=0.5, busy=0.5)
    note_rates(hardware, device, disturbed, tmp_path)
    assert cached_rates(hardware, device, tmp_path) == disturbed
    note_rates(hardware, device, quiet, tmp_path)
    note_rates(hardware, device, disturbed, tmp_path)
    assert cached_rates(hardware, device, tmp_path) == quiet


@pytest.mark.parametrize(("now", "taken"), [(0.1, "now"), (0.6, "now"), (0.9, "noted")])
def test_what_was_noted_on_a_busy_machine_is_measured_again(
    now: float, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware = machine()
    device, noted, again = choose_device(hardware), measured(factor=0.1, busy=0.8), measured(busy=now)
    note_rates(hardware, device, noted, tmp_path)
    monkeypatch.setattr("llmtune.hardware.rates.measure_rates", lambda *_, **__: again)
    assert with_rates(hardware, device, tmp_path).rates == {"now": again, "noted": noted}[taken]
    monkeypatch.setattr("llmtune.hardware.rates.measure_rates", lambda *_, **__: measured(factor=7))
    assert (with_rates(hardware, device, tmp_path).rates == again) is (now < 0.25), "a quiet one stays"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"format_version": 99}', b'{"format_version": 2, "rates": 3}']
)
def test_a_damaged_cache_is_measured_anew(tmp_path: Path, content: bytes) -> None:
    hardware, rates = machine(), measured()
    device = choose_device(hardware)
    (tmp_path / CACHE_FILE).write_bytes(content)
    assert cached_rates(hardware, device, tmp_path) is None
    note_rates(hardware, device, rates, tmp_path)
    assert cached_rates(hardware, device, tmp_path) == rates


def test_values_that_cannot_be_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    hardware = machine()
    device = choose_device(hardware)
    note_rates(hardware, device, measured(), tmp_path)
    file = tmp_path / CACHE_FILE
    document = json.loads(file.read_text())
    for name, value in (("op_seconds", -1.0), ("op_seconds", math.inf), ("speeds", []), ("busy_share", 2.0)):
        broken = {key: rates | {name: value} for key, rates in document["rates"].items()}
        file.write_text(json.dumps(document | {"rates": broken}))
        assert cached_rates(hardware, device, tmp_path) is None, (name, value)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    hardware = machine()
    note_rates(hardware, choose_device(hardware), measured(), tmp_path / "file" / "cache")
    assert cached_rates(hardware, choose_device(hardware), tmp_path / "file" / "cache") is None


def test_documents_without_rates_and_with_wrong_ones(tmp_path: Path) -> None:
    document = machine(rates=measured()).to_json()
    assert Hardware.from_json({key: value for key, value in document.items() if key != "rates"}).rates is None
    document["rates"]["speeds"][0]["matmul"]["bf16"] = 0
    document["rates"]["speeds"][1]["fresh_bytes"] = 7.0
    document["rates"]["disk"] = 1
    with pytest.raises(ConfigError) as caught:
        Hardware.from_json(document)
    for part in (
        "rates.speeds.0.matmul.bf16: got 0, expected greater than 0",
        "rates.speeds.1.fresh_bytes: unknown key, did you mean 'fresh_bytes_per_second'?",
        "rates.disk: unknown key",
    ):
        assert part in str(caught.value)


def test_the_disk_of_a_place_that_is_not_there_yet(tmp_path: Path) -> None:
    rate = disk_write_rate(tmp_path / "not" / "there" / "yet")
    assert rate is not None
    assert rate > 0
    assert list(tmp_path.iterdir()) == []


def test_rates_far_below_what_is_usual_are_told_with_what_mends_them(tmp_path: Path) -> None:
    def told(rates: Rates | None) -> list[str]:
        return [f"{p.problem} | {p.fix}" for p in rate_problems(machine(rates=rates), tmp_path)]

    assert told(None) == told(measured()) == []
    busy = told(measured(factor=0.2, busy=0.6))
    assert len(busy) == 1
    assert "60 % of the usable cores" in busy[0]
    assert "top" in busy[0]
    slow = told(measured(factor=0.2))
    assert len(slow) == 2
    assert "bf16 matrix products reach 0.4 TFLOP/s; 2 are usual" in slow[0]
    assert "cpupower" in slow[0]
    assert "--output DIR" in told(measured(disk=1e6))[0]
    assert "nothing can be written" in told(measured(disk=None))[0]


def test_what_data_sheets_say_has_the_form_of_a_measurement() -> None:
    for hardware in (machine(), machine(gpu()), machine(gpu(name="new", kind="xpu"))):
        device = choose_device(hardware)
        rates = nominal_rates(hardware, device)
        assert rates.device == device.name
        assert Hardware.from_json(replace(hardware, rates=rates).to_json()).rates == rates


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


def test_diagnosis_holds_what_other_programs_rely_on(tmp_path: Path) -> None:
    diagnosis = diagnose(disk_path=tmp_path, cache=tmp_path)
    assert diagnosis.hardware.rates is not None
    device = choose_device(diagnosis.hardware)
    assert cached_rates(diagnosis.hardware, device, tmp_path) == diagnosis.hardware.rates
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


def test_flash_attention_is_torchs_own_from_compute_capability_8_on() -> None:
    found = {name: _flash_attention(hardware) for name, hardware in {"new": machine(gpu()), "cpu": machine()}.items()}
    found["old"] = _flash_attention(machine(gpu(1, bf16=False, tf32=False, compute_capability=(7, 5))))
    assert {name: usable.available for name, usable in found.items()} == {"new": True, "cpu": False, "old": False}
    assert "8.0 or more" in found["old"].why


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
