"""The report of `dnb doctor`: everything about this machine that decides if a pool can live here, for a bug report."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import zmq
from packaging.requirements import Requirement

from dnb.errors import DnbError
from dnb.hub.pool_files import StrangeRecord, read_pool_files
from dnb.pool.discovery import PoolsOnDisk, find_pools
from dnb.pool.host_checks import (
    FILES_OF_ENGINE,
    FILES_OF_POOL,
    check_encryption,
    check_loopback,
    check_writable,
)
from dnb.pool.startup import profile_folder
from dnb.transport.segments import named_folders, segment_roots
from dnb.units import amount

# Front ends and helpers that dnb does not need itself, and that decide what a user sees.
SHOWN_PACKAGES = (
    "jupyterlab",
    "notebook",
    "nbclient",
    "nbval",
    "papermill",
    "voila",
    "matplotlib",
    "pandas",
    "pyarrow",
)
# Variables that change what dnb does. Only these are printed: any other one may hold a secret.
SHOWN_VARIABLES = re.compile(
    r"DNB_\w+|(OMP|MKL|OPENBLAS|NUMEXPR)_NUM_THREADS|CUDA_VISIBLE_DEVICES|PYTORCH_\w+|TORCH_\w+|IPYTHONDIR|TMPDIR"
    r"|ATEN_CPU_CAPABILITY|ONEDNN_MAX_CPU_ISA|LD_PRELOAD"
)
SECRETS = re.compile(r"KEY|SECRET|TOKEN|PASS")
LEAST_SHARED_BYTES = 256 * 1024**2  # less does not hold a small model, its moments and two gradients
LEAST_DISK_BYTES = 1024**3
LEAST_MEMORY_BYTES = 1024**3  # two engines, the hub and a kernel
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
WIDTH = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFact:
    """One subject of the report: the facts, and the sentence of what is wrong with them, if anything is."""

    subject: str
    facts: str
    problem: str = ""


def examine_host(profile: str | None = None) -> list[HostFact]:
    """Look at everything that a pool needs here; starts nothing, and makes the profile's folders if they are not there.

    Args:
        profile: IPython profile whose pools are looked for, as in `start`.
    """
    return [
        HostFact(subject="system", facts=f"{platform.platform()}, {_core_count()} cores for this process"),
        HostFact(subject="python", facts=f"{platform.python_version()} {sys.executable}"),
        *_packages(),
        _devices(),
        _memory(),
        *_shared_memory(),
        *_disks(),
        _open_files(),
        _checked("ports", _ports(), check_loopback),
        _checked("encryption", f"libzmq {zmq.zmq_version()}", check_encryption),
        *_pools(profile),
        HostFact(subject="variables", facts=", ".join(_variables()) or "none that dnb knows"),
    ]


def describe_findings(findings: Iterable[HostFact]) -> str:
    """Write the report, problems last; the user's own folder is written `~`."""
    findings = list(findings)
    lines = [f"{each.subject:<{WIDTH}}{each.facts}" for each in findings]
    problems = [each.problem for each in findings if each.problem]
    if problems:
        lines += ["", *(f"problem: {problem}" for problem in problems)]
    else:
        lines += ["", "nothing here keeps a pool from running"]
    return _shorten_home("\n".join(lines))


def _shorten_home(text: str) -> str:
    home = str(Path.home())
    return text if home == "/" else re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)


def _checked(subject: str, facts: str, check: Callable[[], None]) -> HostFact:
    try:
        check()
    except DnbError as error:
        return HostFact(subject=subject, facts=f"{facts}: not usable", problem=str(error))
    return HostFact(subject=subject, facts=facts)


def _core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _packages() -> Iterator[HostFact]:
    """Yield what is installed of the packages that dnb needs, and of those that it meets."""
    needed = [Requirement(line) for line in requires("dnb") or () if "extra ==" not in line]
    problems = [problem for each in needed if (problem := _missing(each))]
    listed = [("dnb", version("dnb")), *((each.name, _version_of(each.name)) for each in needed)]
    yield HostFact(
        subject="packages",
        facts=", ".join(f"{name} {found or 'missing'}" for name, found in listed),
        problem="; ".join(problems),
    )
    beside = [(name, found) for name in SHOWN_PACKAGES if (found := _version_of(name))]
    yield HostFact(subject="beside them", facts=", ".join(f"{name} {found}" for name, found in beside) or "none")


def _missing(needed: Requirement) -> str:
    found = _version_of(needed.name)
    if found and needed.specifier.contains(found, prereleases=True):
        return ""
    state = f"{needed.name} {found} does not fit" if found else f"{needed.name} is missing"
    return f"{state}: pip install '{needed.name}{needed.specifier}'"


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _devices() -> HostFact:
    try:
        import torch  # not before it is asked for: a broken installation is one of the findings
    except (ImportError, OSError) as error:
        return HostFact(
            subject="devices",
            facts="unknown",
            problem=f"torch cannot be imported ({error}): pip install --force-reinstall torch",
        )
    built = f"torch built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'}"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return HostFact(
        subject="devices", facts=f"{', '.join(['cpu', *names])}; {built}; {torch.get_num_threads()} threads"
    )


def _memory() -> HostFact:
    memory = psutil.virtual_memory()
    problem = ""
    if memory.available < LEAST_MEMORY_BYTES:
        problem = f"{amount(memory.available)} of memory are free, and two engines take about 1 GB: end other programs"
    return HostFact(
        subject="memory", facts=f"{amount(memory.available)} of {amount(memory.total)} free", problem=problem
    )


def _shared_memory() -> Iterator[HostFact]:
    roots = segment_roots()
    sizes = {root: shutil.disk_usage(root) for root in roots if root.is_dir()}
    problem = ""
    if not any(usage.free >= LEAST_SHARED_BYTES for usage in sizes.values()):
        problem = (
            f"no folder for shared memory has {amount(LEAST_SHARED_BYTES)} free: a container gets more by "
            "--shm-size 1g, and DNB_SEGMENT_FOLDERS names other folders"
        )
    facts = ", ".join(f"{root} {amount(usage.free)} of {amount(usage.total)} free" for root, usage in sizes.items())
    yield HostFact(subject="shared memory", facts=facts or "no folder for it", problem=problem)


def _disks() -> Iterator[HostFact]:
    """Yield what the disk takes where runs are written."""
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    problem = ""
    if not os.access(here, os.W_OK):
        problem = f"runs are written to {here / '.dnb'}, which is not yours to write: start in another folder"
    elif free < LEAST_DISK_BYTES:
        problem = f"{amount(free)} are free where runs are written ({here / '.dnb'}): start where there is more room"
    yield HostFact(subject="disk", facts=f"{amount(free)} free in {here}", problem=problem)


def _open_files() -> HostFact:
    """Hold the limit of open files against what a pool with an engine for each core opens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_engines = max(2, _core_count())
    needed = FILES_OF_POOL + FILES_OF_ENGINE * num_engines
    most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    problem = ""
    if most < needed:
        problem = f"{num_engines} engines open about {needed} files in one process, {most} are allowed: ulimit -n 4096"
    room = (most - FILES_OF_POOL) // FILES_OF_ENGINE
    limits = f"{_limit(soft)}, may be raised to {_limit(hard)}"
    return HostFact(subject="open files", facts=f"{limits}; enough for {min(room, 1000)} engines", problem=problem)


def _limit(number: int) -> str:
    return "no limit" if number == resource.RLIM_INFINITY else f"{number:,}"


def _ports() -> str:
    """Tell the ports that the system gives out on loopback."""
    try:
        first, last = PORT_RANGE.read_text().split()
    except (OSError, ValueError):
        return "127.0.0.1"
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return f"127.0.0.1, from {first} to {last}"


def _pools(profile: str | None) -> Iterator[HostFact]:
    """Yield the pools of this profile, and what others left behind."""
    try:
        folder = profile_folder(profile)
        check_writable(folder)
    except DnbError as error:
        yield HostFact(subject="pools", facts="unknown", problem=str(error))
        return
    found = find_pools(folder / "security")
    yield HostFact(subject="pools", facts=f"{_count(found)} in {folder}", problem=" ".join(found.doubtful))
    named = {path for record in read_pool_files(folder / "security") for path in _folders_of(record, found)}
    left = [path for path in _own_segment_folders() if path not in named]
    size = sum(file.stat().st_size for path in left for file in path.glob("*") if file.is_file())
    problem = ""
    if left:
        problem = (
            f"{len(left)} folders of shared memory ({amount(size)}) belong to no pool of this profile: pools of other "
            f"profiles, or what was left by a crash; if no pool runs, rm -r {' '.join(map(str, left[:3]))}"
        )
    yield HostFact(subject="left behind", facts=f"{len(left)} folders of shared memory", problem=problem)


def _count(found: PoolsOnDisk) -> str:
    kinds = {
        "of this kernel": len(found.ours),
        "of other kernels": len(found.foreign),
        "without a kernel (%dtrain attach)": len(found.orphans),
        "dead (the next start clears them)": len(found.dead),
        "out of reach": len(found.silent),
        "of other versions": len(found.strange),
    }
    return ", ".join(f"{number} {kind}" for kind, number in kinds.items() if number) or "none"


def _folders_of(record: object, found: PoolsOnDisk) -> list[Path]:
    """Return the folders of a record whose pool lives; those of a dead one count as left behind."""
    if isinstance(record, StrangeRecord):
        return named_folders(record.folders, record.cluster_id)
    living = [*found.ours, *found.foreign, *found.orphans, *(facts for facts, _ in found.silent)]
    ours = [facts for facts in living if facts == record]
    return [path for facts in ours for path in named_folders(facts.folders, facts.cluster_id)]


def _own_segment_folders() -> list[Path]:
    paths = [path for root in segment_roots() for path in root.glob("dnb-*") if path.is_dir() and not path.is_symlink()]
    return sorted(path for path in paths if path.stat().st_uid == os.getuid())


def _variables() -> Iterator[str]:
    for name, text in sorted(os.environ.items()):
        if SHOWN_VARIABLES.fullmatch(name) and not SECRETS.search(name):
            yield f"{name}={text}"
