"""Takes every barrier out of the kernels, one at a time, and sees whether the emulated device notices.

``python tests/cuda_mutations.py`` takes some minutes; it is run by hand. A barrier that nothing misses is either
superfluous or a hole in the checks.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import cuda_tools

BARRIER = re.compile(r"^(\s*)((?:if \(apply\) )?(?:worker\.)?(?:wait|__syncwarp|__syncthreads)\(\);)$", re.MULTILINE)


def verdict(hosts: list[Path], kernels: str, folder: Path, sanitizer: str, *options: str) -> str:
    """What the checks say of these kernels, or nothing."""
    folder.mkdir()
    (folder / "launch.cu").write_text((cuda_tools.ROOT / "csrc/cuda/launch.cu").read_text())
    (folder / "kernels.cuh").write_text(kernels)
    launch = cuda_tools.compile_emulated(folder / "launch.cu", folder / "launch.o", sanitizer)
    library = cuda_tools.link([*hosts, launch], folder / "mutant.so", sanitizer)
    command = [sys.executable, cuda_tools.ROOT / "tests/emulated.py", library, *options]
    result = cuda_tools.sanitized(command, sanitizer)
    if result.returncode == 0:
        return ""
    lines = [line for line in result.stderr.splitlines() if "Error:" in line or "WARNING: ThreadSanitizer" in line]
    return f"{sanitizer}: {lines[0][:100] if lines else result.stderr[-100:]}"


def main() -> None:
    text = (cuda_tools.ROOT / "csrc/cuda/kernels.cuh").read_text()
    with TemporaryDirectory() as name:
        root = Path(name)
        hosts = cuda_tools.compile_hosts(root)
        missed = 0
        for number, barrier in enumerate(BARRIER.finditer(text)):
            kernels = text[: barrier.start()] + barrier[1] + ";" + text[barrier.end() :]
            found = verdict(hosts, kernels, root / f"plain{number}", "plain") or verdict(
                hosts, kernels, root / f"tsan{number}", "tsan", "--few"
            )
            line = text[: barrier.start(2)].count("\n") + 1
            print(f"kernels.cuh:{line} without `{barrier[2]}`: {found or 'NOT SEEN'}", flush=True)
            missed += not found
    print(f"{missed} not seen")


if __name__ == "__main__":
    main()
