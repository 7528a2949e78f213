"""Which kinds of accelerator can be there at all, from files alone: a machine without any need not wait for torch."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

# What the kernel modules of each vendor create. WSL passes GPUs of all vendors through /dev/dxg.
_DEVICE_FILES = {
    "cuda": ("dev/nvidia[0-9]*", "dev/nvidiactl", "dev/nvgpu*", "dev/nvhost-gpu", "proc/driver/nvidia", "dev/dxg"),
    "rocm": ("dev/kfd", "dev/dxg"),
    "xpu": ("dev/dxg",),
}
_INTEL = "0x8086"  # PCI vendor number
_ALL = frozenset(_DEVICE_FILES)
# What torch's version.py calls the toolkit each kind is built with.
_TOOLKITS = {"cuda": "cuda", "hip": "rocm", "xpu": "xpu"}


def kinds_present(root: Path, platform: str) -> frozenset[str]:
    """Kinds (``cuda``, ``rocm``, ``xpu``, ``mps``) of which the system shows a trace.

    Args:
        root: Where ``dev``, ``proc`` and ``sys`` are looked for.
        platform: ``<sys.platform>-<machine>``, e.g. ``linux-x86_64``.
    """
    system = platform.partition("-")[0]
    if system == "darwin":
        return frozenset({"mps"} if platform == "darwin-arm64" else ())
    if system != "linux":  # Windows shows no device files
        return _ALL
    found = {kind for kind, patterns in _DEVICE_FILES.items() if any(any(root.glob(p)) for p in patterns)}
    # Every Intel processor with graphics has a render node; whether torch can use it, its build decides.
    if any(_text(path) == _INTEL for path in root.glob("sys/class/drm/renderD*/device/vendor")):
        found.add("xpu")
    return frozenset(found)


def kinds_built(version_file: Path | None = None) -> dict[str, str]:
    """Kinds that the installed torch is built for, with the toolkit's version; read off its ``version.py``.

    Every kind, with an empty version, where that file says nothing; none without torch.
    """
    if version_file is None:
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            return {}
        version_file = Path(spec.origin).with_name("version.py")
    lines = re.findall(r"^(cuda|hip|xpu)\b[^=\n]*=\s*(None|'[^'\n]*'|\"[^\"\n]*\")", _text(version_file), re.MULTILINE)
    if not lines:
        return dict.fromkeys(_ALL, "")
    return {_TOOLKITS[name]: value.strip("'\"") for name, value in lines if value != "None"}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
