"""Compiles the CPU kernels of src/growmoe/native when the package is built or installed.

Run by hatchling; `python hatch_build.py` does the same in a checkout. Without a C++ compiler the
package is built without kernels: everything works, more slowly, and `growmoe doctor` says so.
GROWMOE_NATIVE=require makes that an error, GROWMOE_NATIVE=0 leaves the kernels out.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent / "src" / "growmoe" / "native"
LIBRARY = FOLDER / "libgrowmoe.so"
FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-fno-math-errno",
    "-fno-trapping-math", "-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
]  # fmt: skip
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
LEVELS = {"avx2": AVX2, "avx512": AVX512, "bf16": [*AVX512, "-mavx512bf16"]}


def compile_kernels() -> str | None:
    """Make LIBRARY if it is older than its sources; returns why it could not be made."""
    if os.environ.get("GROWMOE_NATIVE") == "0":
        return "GROWMOE_NATIVE=0 asks for none"
    sources = [*FOLDER.glob("*.cpp"), *FOLDER.glob("*.inc"), *FOLDER.glob("*.h"), Path(__file__)]
    newest = max(path.stat().st_mtime for path in sources)
    if LIBRARY.exists() and LIBRARY.stat().st_mtime >= newest:
        return None
    compiler = os.environ.get("CXX") or next(
        filter(None, map(shutil.which, ("g++", "clang++"))), None
    )
    if compiler is None:
        return "there is no C++ compiler (install g++)"
    with tempfile.TemporaryDirectory() as folder:
        return _compile(compiler, Path(folder))


def _compile(compiler: str, folder: Path) -> str | None:
    def run(name: str, flags: list[str]) -> subprocess.CompletedProcess[str]:
        command = [*compiler.split(), *FLAGS, *flags, "-c", str(FOLDER / f"{name}.cpp")]
        return subprocess.run(
            [*command, "-o", str(folder / f"{name}.o")], capture_output=True, text=True
        )

    x86 = platform.machine() in ("x86_64", "AMD64")
    levels = LEVELS if x86 else {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        optional = {
            name: pool.submit(run, f"kernels_{name}", flags) for name, flags in levels.items()
        }
        needed = [
            pool.submit(run, "kernels_base", []),
            pool.submit(run, "pool", []),
            pool.submit(run, "quantize", ["-ffp-contract=off"]),
        ]
        # an old compiler may not know the newest instructions; those above are then left out, too
        found: list[str] = []
        for name, future in optional.items():
            if future.result().returncode:
                break
            found.append(name)
        needed.append(pool.submit(run, "pack", [f"-DGM_LEVELS={len(found)}"]))
        for future in needed:
            if future.result().returncode:
                return f"{compiler} failed: {future.result().stderr.strip()[:300]}"
    objects = ["kernels_base", "pool", "pack", "quantize", *(f"kernels_{name}" for name in found)]
    linked = folder / LIBRARY.name
    done = subprocess.run(
        [*compiler.split(), "-shared", "-pthread", "-o", str(linked)]
        + [str(folder / f"{name}.o") for name in objects],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        return f"{compiler} cannot link: {done.stderr.strip()[:300]}"
    aside = LIBRARY.with_suffix(".partial")
    shutil.copyfile(linked, aside)
    os.replace(aside, LIBRARY)
    return None


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand
    pass
else:

    class NativeBuildHook(BuildHookInterface):
        """Puts the compiled kernels into wheels and editable installs."""

        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, object]) -> None:
            """Compile before files are collected."""
            if self.target_name != "wheel":
                return
            problem = compile_kernels()
            if problem:
                if os.environ.get("GROWMOE_NATIVE") == "require":
                    raise RuntimeError(f"the CPU kernels were not compiled: {problem}")
                self.app.display_warning(f"growmoe without its CPU kernels: {problem}")
                return
            from packaging.tags import sys_tags

            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{next(sys_tags()).platform}"
            build_data["artifacts"] = ["src/growmoe/native/libgrowmoe.so"]


if __name__ == "__main__":
    sys.exit(compile_kernels())
