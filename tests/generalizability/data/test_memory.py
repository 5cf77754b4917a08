"""The memory that is available, within the limits of control groups."""

import pytest

from data.memory import available_memory

GIB = 2**30


@pytest.fixture
def system(tmp_path):
    """Return a function that writes files below a root folder, and the root."""

    def write(files: dict[str, str]):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    write({"proc/meminfo": "MemTotal: 16777216 kB\nMemFree: 1024 kB\nMemAvailable: 8388608 kB\nCached: 8000000 kB\n"})
    return write


def test_the_page_cache_counts_as_available(system):
    assert available_memory(system({})) == 8 * GIB


def test_a_system_that_does_not_say(tmp_path):
    assert available_memory(tmp_path) is None


def test_the_limit_of_a_control_group_version_2(system):
    """The limit is that of a group above; its page cache is available."""
    group = "sys/fs/cgroup/job/step"
    files = {"proc/self/cgroup": "0::/job/step\n", f"{group}/memory.max": "max\n", f"{group}/memory.current": "1\n"}
    files |= {"sys/fs/cgroup/job/memory.max": f"{4 * GIB}\n", "sys/fs/cgroup/job/memory.current": f"{3 * GIB}\n"}
    files |= {f"{group}/memory.stat": "", "sys/fs/cgroup/job/memory.stat": f"active_file {GIB}\ninactive_file {GIB}\n"}
    assert available_memory(system(files)) == 3 * GIB


def test_the_limit_of_a_control_group_version_1(system):
    """In a container the name of the group is the host's, and its files are in the mounted folder."""
    mount = "sys/fs/cgroup/memory"
    files = {"proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/abc\n0::/\n", f"{mount}/memory.stat": "total_cache 0\n"}
    files |= {f"{mount}/memory.limit_in_bytes": f"{GIB}\n", f"{mount}/memory.usage_in_bytes": f"{GIB // 4}\n"}
    assert available_memory(system(files)) == GIB - GIB // 4


def test_a_full_control_group_has_nothing_left(system):
    group = "sys/fs/cgroup"
    files = {"proc/self/cgroup": "0::/\n", f"{group}/memory.max": "1000\n", f"{group}/memory.current": "2000\n"}
    assert available_memory(system(files | {f"{group}/memory.stat": "anon 2000\n"})) == 0
