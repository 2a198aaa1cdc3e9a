"""Free memory: the machine's, or what a container or service is allowed, whichever is less."""

from types import SimpleNamespace

import pytest

from crvq_hf.resources import distributed, memory

GB = 2**30
MACHINE = 64 * GB


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Returns a function that makes cgroups: what a process sees of its own, and files by name."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")

    def make(own: str, files: dict[str, object]) -> int:
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")
        return memory.available_memory_bytes()

    return make


def version_2(folder: str, limit, usage: int, cache: int = 0) -> dict[str, object]:
    stat = f"anon 5\ninactive_file {cache}\nactive_file 7"
    return {f"{folder}memory.max": limit, f"{folder}memory.current": usage, f"{folder}memory.stat": stat}


def version_1(folder: str, limit: int, usage: int) -> dict[str, object]:
    return {
        f"memory/{folder}memory.limit_in_bytes": limit,
        f"memory/{folder}memory.usage_in_bytes": usage,
        f"memory/{folder}memory.stat": "cache 9\ninactive_file 1\ntotal_inactive_file 1",
    }


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {}, MACHINE),
        ("0::/\n", version_2("", "max", 3 * GB), MACHINE),
        ("0::/\n", version_2("", 8 * GB, 3 * GB, GB), 6 * GB),
        ("0::/\n", version_2("", 8 * GB, 9 * GB), 0),
        ("0::/\n", version_2("", 100 * GB, 9 * GB), MACHINE),
        ("0::/a.slice/job\n", version_2("a.slice/job/", "max", 2 * GB) | version_2("a.slice/", 4 * GB, GB), 3 * GB),
        ("0::/a.slice/job\n", version_2("a.slice/job/", 2 * GB, GB) | version_2("a.slice/", 4 * GB, GB), GB),
        ("0::/docker/abc\n", version_2("", 8 * GB, 3 * GB), 5 * GB),  # seen from inside
        ("0::/../../x\n", version_2("", 8 * GB, 3 * GB), 5 * GB),
        ("9:cpu:/\n4:memory:/docker/abc\n", version_1("docker/abc/", 8 * GB, 2 * GB), 6 * GB + 1),
        ("4:cpu,memory:/\n", version_1("", 8 * GB, 2 * GB), 6 * GB + 1),
        ("4:memory:/\n", version_1("", 2**63 - 4096, 2 * GB), MACHINE),
        ("0::/\n", {"memory.max": 8 * GB, "memory.current": 2 * GB}, 6 * GB),  # no statistics
    ],
)
def test_the_smaller_one_counts(machine, own, files, expected):
    assert machine(own, files) == expected
    assert distributed.free_memory_bytes() == expected


def test_a_system_without_cgroups(machine, monkeypatch, tmp_path):
    machine("0::/\n", version_2("", 8 * GB, 3 * GB))
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "nothing")
    assert memory.available_memory_bytes() == MACHINE


@pytest.mark.parametrize(("limit", "field"), [("RLIMIT_AS", "vms"), ("RLIMIT_DATA", "data")])
def test_limits_of_a_shell(machine, monkeypatch, limit, field):
    if not (hasattr(memory.resource, limit) and hasattr(memory.psutil.Process().memory_info(), field)):
        pytest.skip(f"this system has no {limit}")
    used = SimpleNamespace(**{"vms": 0, "data": 0, field: 3 * GB})
    monkeypatch.setattr(memory.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: used))
    number, unlimited = getattr(memory.resource, limit), memory.resource.RLIM_INFINITY
    limits = {number: 8 * GB}
    monkeypatch.setattr(memory.resource, "getrlimit", lambda which: (limits.get(which, unlimited), unlimited))
    assert machine("0::/\n", {}) == 5 * GB
    limits[number] = 2 * GB
    assert machine("0::/\n", {}) == 0
