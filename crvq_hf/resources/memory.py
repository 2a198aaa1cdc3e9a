"""How much memory is free: what the machine has, or less where a container, a service or a shell may not take all."""

import ctypes
import sys
from pathlib import Path

import psutil

try:
    import resource
except ImportError:  # Windows
    resource = None

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# By version of cgroups: the limit, what is used of it, and what of that is file cache, which is given back.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_memory_bytes() -> int:
    """Returns how many bytes of the CPU's memory this process can still have before something is killed."""
    return min([psutil.virtual_memory().available, *_left_in_cgroups(), *_left_of_limits()])


def give_back_freed_memory() -> None:
    """Gives the system back what was freed: glibc keeps up to 32 MB of each tensor, in every thread that made one."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _left_of_limits() -> list[int]:
    """Returns what is left of the limits of this process (`ulimit -v` and `-d`)."""
    if resource is None:
        return []
    used, left = psutil.Process().memory_info(), []
    for name, field in (("RLIMIT_AS", "vms"), ("RLIMIT_DATA", "data")):
        if not (hasattr(resource, name) and hasattr(used, field)):  # not every system has all of them
            continue
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY:
            left.append(max(0, limit - getattr(used, field)))
    return left


def _left_in_cgroups() -> list[int]:
    """Returns what is left of the memory limit of each cgroup that this process is in, with all those around it."""
    left = []
    for version, folder in _own_cgroups():
        limit_file, usage_file, cache = _FILES[version]
        try:
            limit, usage = (int((folder / file).read_text()) for file in (limit_file, usage_file))
        except (OSError, ValueError):  # no such cgroup to be seen from here, or "max": no limit
            continue
        try:
            lines = (folder / "memory.stat").read_text().splitlines()
            usage -= int(dict(line.split() for line in lines).get(cache, 0))
        except (OSError, ValueError):
            pass
        left.append(max(0, limit - usage))
    return left


def _own_cgroups() -> list[tuple[int, Path]]:
    """Returns version and folder of the cgroups that limit this process's memory.

    A container sees its own at the top, whatever its name outside: so the top is always among them.
    """
    found = [(2, CGROUPS), (1, CGROUPS / "memory")]
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return []
    for line in lines:  # 0::/user.slice/job, or 4:memory:/docker/abc
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number != "0" and "memory" not in controllers.split(","):
            continue
        version, top = (2, CGROUPS) if number == "0" else (1, CGROUPS / "memory")
        path = top / name.strip("/")
        while path != top and top in path.parents:
            found.append((version, path))
            path = path.parent
    return found
