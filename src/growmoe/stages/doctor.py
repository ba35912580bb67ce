"""doctor: what this machine and installation can do."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import Any

from growmoe import __version__

EXTRAS = {"data": ("pyarrow", "zstandard", "ftfy"), "plots": ("matplotlib",), "gguf": ("gguf",),
          "llama-cpp": ("xllamacpp",)}  # fmt: skip


def run() -> dict[str, Any]:
    """Versions, processor, memory, disk, extras; `advice` lists what would help."""
    import torch
    import torch.nn.functional as F

    from growmoe.inference.prepacked import prepacking
    from growmoe.memory import free_memory
    from growmoe.ops import native
    from growmoe.ops.products import onednn
    from growmoe.training.trainer import native_bfloat16

    missing = {
        extra: [name for name in names if importlib.util.find_spec(name) is None]
        for extra, names in EXTRAS.items()
    }
    advice = [
        f"pip install 'growmoe[{extra}]' for {', '.join(names)}"
        for extra, names in missing.items()
        if names
    ]
    if not hasattr(F, "grouped_mm"):
        advice.append("a newer torch has grouped_mm; without it experts run in a slower loop")
    if not onednn():
        advice.append("this torch has no oneDNN product for float32; training uses its slower mm")
    if os.environ.get("GROWMOE_NATIVE") == "0":
        advice.append("unset GROWMOE_NATIVE: 0 asks for no CPU kernels, so generating is slower")
    elif not native.available():
        advice.append(
            "the CPU kernels were not compiled (or by another version), so generating is slower: "
            "install g++, then growmoe again; GROWMOE_NATIVE=require shows what is missing"
        )
    if torch.cuda.is_available() and not _version("triton"):
        advice.append("pip install triton for the kernels of MoE layers on a GPU")
    return {
        "growmoe": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "native_bfloat16": native_bfloat16(),
        "grouped_mm": hasattr(F, "grouped_mm"),
        "onednn_float32": onednn(),
        "native_kernels": native.level(),
        "onednn_prepacked": prepacking(),
        "triton": _version("triton"),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_free_mb": free_memory() >> 20,
        "disk_free_mb": shutil.disk_usage(".").free >> 20,
        "extras": {extra: not names for extra, names in missing.items()},
        "advice": advice,
    }


def _version(package: str) -> str | None:
    """The installed version of a package, if any."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
