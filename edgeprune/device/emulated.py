"""An emulated ARM board: a real aarch64 Python, onnxruntime and LiteRT under qemu-user, on Linux x86-64.

Its milliseconds mean nothing as latency. What it shows is that the code runs on aarch64, that it computes what it computes here, and
how many instructions one inference executes: `arm_insns_per_inference` counts them with a plugin of ours (instructions.c) and varies by
less than a percent, so that a change of one percent can be told, which wall time on a shared machine cannot.

`prepare` needs Debian's qemu-user, qemu-user-static, mmdebstrap, bubblewrap and openssh-server, and gcc; it says what is missing.
onnxruntime and LiteRT of 2026 crash on the x86 /proc/cpuinfo that qemu-user shows them, so the root gets one of the board's.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edgeprune.device import agent
from edgeprune.errors import DeviceError

CPUS = {"cortex-a72": "0xd08", "cortex-a76": "0xd0b"}
TOLERANCE = 0.01
_FEATURES = {
    "cortex-a72": "fp asimd evtstrm crc32 cpuid",
    "cortex-a76": "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
}
_PACKAGES = (*("python3", "bash", "coreutils", "libstdc++6", "libgcc-s1", "zlib1g", "procps", "util-linux", "openssh-sftp-server"),)
_WHEELS = ("numpy", "onnxruntime", "ai-edge-litert")
_PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64")
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_MAGIC = r":qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:"
_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:"
_COUNTED = 5  # inferences, of which the smallest count is taken
_LIMIT_SECONDS = 900.0


def default_folder() -> Path:
    """Where the board's root lies: EDGEPRUNE_EMULATED_BOARD, or the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("EDGEPRUNE_EMULATED_BOARD") or cache / "edgeprune-emulated-board")


def counts(artifacts: Mapping[str, Path], *, progress: Callable[[str, int, int], None]) -> tuple[dict[str, dict[str, int]], str]:
    """(instructions per inference of every artifact by its name and the CPU, why there are none).

    Nothing is installed for it: without a board that `prepare` has built (make test-board) there is a reason instead.
    """
    folder = default_folder()
    if missing := [tool for tool in ("qemu-aarch64", "gcc") if not shutil.which(tool)]:
        return {}, f"{' and '.join(missing)} not installed"
    if not (folder / "complete").exists():
        return {}, f"there is no emulated ARM board in {folder}: `make test-board` builds one"
    found: dict[str, dict[str, int]] = {name: {} for name in artifacts}
    try:
        prepare(folder)
        for number, (name, cpu) in enumerate(turns := [(name, cpu) for name in artifacts for cpu in CPUS]):
            progress("counting ARM instructions", number, len(turns))
            found[name][cpu] = arm_insns_per_inference(artifacts[name], folder, cpu=cpu)
        progress("counting ARM instructions", len(turns), len(turns))
    except DeviceError as error:
        return {}, str(error)
    return found, ""


def runtime(folder: Path) -> str:
    """The onnxruntime of the board, which decides the counts; empty where there is none."""
    found = sorted((folder / "root/opt/site").glob("onnxruntime-*.dist-info"))
    return found[0].name.removesuffix(".dist-info").replace("-", " ") if found else ""


def missing_tools() -> list[str]:
    """Debian packages that are not installed and needed."""
    needed = {"qemu-aarch64": "qemu-user", "qemu-aarch64-static": "qemu-user-static", "mmdebstrap": "mmdebstrap", "bwrap": "bubblewrap"}
    needed |= {"gcc": "gcc", "sshd": "openssh-server"}
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    return [package for tool, package in needed.items() if not shutil.which(tool, path=path)]


def prepare(folder: Path) -> None:
    """Build the board's root under `folder` unless it is there (two minutes, 700 MB). Raises DeviceError with what stands in the way."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise DeviceError(f"the emulated board runs on Linux x86-64, this is {platform.system()} {platform.machine()}.")
    if missing := missing_tools():
        raise DeviceError(f"the emulated board needs {', '.join(missing)}: apt-get install --no-install-recommends {' '.join(missing)}.")
    _register()
    folder.mkdir(parents=True, exist_ok=True)
    root = folder / "root"
    if not (folder / "complete").exists():
        shutil.rmtree(root, ignore_errors=True)
        debian = ["mmdebstrap", "--quiet", "--architectures=arm64", "--mode=root" if os.getuid() == 0 else "--mode=unshare"]
        _run([*debian, "--variant=extract", f"--include={','.join(_PACKAGES)}", "bookworm", str(root)], "the arm64 root")
        platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--only-binary=:all:", *platforms]
        _run([*pip, "--python-version", "3.11", "--implementation", "cp", "--target", str(root / "opt/site"), *_WHEELS], "aarch64 wheels")
        (root / "bin/sh").unlink(missing_ok=True)  # dash's, which nothing brought
        (root / "bin/sh").symlink_to("bash")
        (root / "etc/passwd").write_text(f"root:x:0:0:root:/root:/bin/bash\nboard:x:{os.getuid()}:0:board:/home/board:/bin/bash\n")
        for name in ("home/board", "proc", "sys", "opt/agent"):
            (root / name).mkdir(parents=True, exist_ok=True)
        (folder / "complete").touch()
    for cpu in CPUS:
        (folder / f"cpuinfo-{cpu}").write_text(cpuinfo(cpu))
    source = Path(__file__).with_name("instructions.c")
    _run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(folder / "instructions.so"), str(source)], "the counting plugin")


def session_script(folder: Path, sys_tree: Path, home: Path, *, cpu: str = "cortex-a72") -> str:
    """A shell script for sshd's ForceCommand: the session inside the board, with `sys_tree` as its /sys and `home` as its home."""
    root = folder / "root"
    return (
        f"export QEMU_CPU={cpu}\n"
        f'set -- bwrap --unshare-user --unshare-pid --die-with-parent --bind "{root}" / --dev /dev --proc /proc '
        f'--ro-bind "{folder}/cpuinfo-{cpu}" /proc/cpuinfo --ro-bind "{sys_tree}" /sys --bind "{home}" /home/board --tmpfs /tmp '
        "--chdir /home/board --setenv HOME /home/board --setenv PATH /usr/bin:/bin --setenv PYTHONPATH /opt/site\n"
        'case "$SSH_ORIGINAL_COMMAND" in *sftp-server*) exec "$@" /usr/lib/openssh/sftp-server;; esac\n'
        'exec "$@" /bin/bash -c "$SSH_ORIGINAL_COMMAND"\n'
    )


def cpuinfo(cpu: str, cores: int = 4) -> str:
    """What such a board's /proc/cpuinfo says."""
    fields = f"BogoMIPS\t: 108.00\nFeatures\t: {_FEATURES[cpu]}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
    fields += f"CPU variant\t: 0x0\nCPU part\t: {CPUS[cpu]}\nCPU revision\t: 3\n"
    return "\n".join(f"processor\t: {core}\n{fields}" for core in range(cores))


def arm_insns_per_inference(artifact: Path, folder: Path, *, cpu: str = "cortex-a72") -> int:
    """Instructions that one inference executes on an emulated `cpu`, one thread: the least of five. A count, never a latency.

    Takes 15 to 65 s for a mobile network. Raises DeviceError when the emulator fails. `folder`: see `prepare`.
    """
    root, log = folder / "root", folder / f"instructions-{os.getpid()}.txt"
    (root / "proc/cpuinfo").write_text(cpuinfo(cpu))
    code = (
        f"import os, sys\nsys.path.insert(0, {str(Path(agent.__file__).parent)!r})\nimport agent\n"
        f"loaded = agent.Loaded({str(artifact.resolve())!r}, 1)\nloaded.fill(None, 0)\nloaded.run()\nloaded.run()\n"
        f"for _ in range({_COUNTED}):\n    os.getsid(0)\n    loaded.run()\n    os.getsid(0)\n"
    )
    emulator = ["setarch", "-R", "qemu-aarch64", "-L", str(root), "-cpu", cpu, "-seed", "1"]
    plugin = ["-plugin", f"{folder / 'instructions.so'},out={log}"]
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(root / "opt/site"), "PYTHONHASHSEED": "0"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    try:
        _run([*emulator, *plugin, str(root / "usr/bin/python3"), "-c", code], "the counted run", environment)
        marks = [int(line) for line in log.read_text().split()]
    finally:
        log.unlink(missing_ok=True)
    if len(marks) != 2 * _COUNTED:
        raise DeviceError(f"the emulator counted {len(marks)} marks instead of {2 * _COUNTED}: the plugin does not fit this qemu.")
    return min(after - before for before, after in zip(marks[::2], marks[1::2], strict=True))


def within(count: int, baseline: int, *, tolerance: float = TOLERANCE) -> bool:
    """Whether a count has not grown by more than the tolerance over its baseline (fewer instructions always pass)."""
    return count <= baseline * (1 + tolerance)


def _register() -> None:
    """Have the kernel run aarch64 programs by qemu; root's to do, and there already after installing qemu-user-static on most systems."""
    if (_BINFMT / "qemu-aarch64").exists():
        return
    try:
        if not (_BINFMT / "register").exists():
            _run(["mount", "-t", "binfmt_misc", "none", str(_BINFMT)], "binfmt_misc")
        (_BINFMT / "register").write_text(f"{_MAGIC}{_MASK}{shutil.which('qemu-aarch64-static')}:OCF")
    except OSError as error:
        raise DeviceError(f"aarch64 programs cannot be run here: binfmt_misc cannot be set up ({error}); as root it can.") from error


def _run(command: Sequence[str], what: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_SECONDS, env=environment)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()
        raise DeviceError(f"{what} of the emulated board could not be made: {command[0]}: {lines[-1]}.")
