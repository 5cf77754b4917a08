"""Processors of a container, threads, and sizes that make sense."""

import math
import os

import pytest
import torch

from s3net_common import limits
from s3net_common.errors import InputError
from s3net_common.limits import available_processors, check_numbers, container_quota, limit_threads


@pytest.mark.parametrize(
    ("groups", "membership", "quota"),
    [
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "max 100000"}, "0::/", math.inf),
        ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 2),  # a parent's limit counts
        ({"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/a", 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/", math.inf),
        ({"cpu.max": "garbage"}, "0::/", math.inf),
        ({}, "", math.inf),
    ],
)
def test_the_quota_of_a_container(tmp_path, groups, membership, quota):
    (tmp_path / "memberships").write_text(membership)
    for name, text in groups.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert container_quota(tmp_path / "groups", tmp_path / "memberships") == quota


def test_a_quota_limits_processors_and_threads(monkeypatch):
    monkeypatch.setattr(limits, "container_quota", lambda: 0.5)
    assert available_processors() == 1
    monkeypatch.setattr(limits, "container_quota", lambda: math.inf)
    assert available_processors() >= 1
    monkeypatch.setattr(limits, "container_quota", lambda: 0.5)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch, "set_num_threads", lambda count: counts.append(count))
    counts = []
    limit_threads(None)
    assert os.environ["OMP_NUM_THREADS"] == os.environ["NPROC"] == "1" and counts == [1]
    limit_threads(3)
    assert os.environ["OMP_NUM_THREADS"] == "3" and counts == [1, 3]
    limit_threads(None)  # the user's own choice stays
    assert os.environ["OMP_NUM_THREADS"] == "3" and counts == [1, 3]
    with pytest.raises(InputError, match="--threads 0 is not possible: give a number of 1 or more"):
        limit_threads(0)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"growth_rate": 10**9}, "--growth-rate 1000000000 is not possible: give a number of at most 10,000"),
        ({"image_size": 100_000}, "--image-size 100000 is not possible: give a number of at most 4,096"),
        ({"batch_size": 10**12}, "--batch-size 1000000000000 is not possible: give a number of at most 1,000,000"),
        ({"workers": 100_000}, "--workers 100000 is not possible: give a number of at most 1,024"),
        ({"depths": (2, 10**6)}, "--depths 1000000 is not possible"),
        ({"limit_train": 10**10}, "--limit-train 10000000000 is not possible: give a number of at most 1,000,000,000"),
        ({"seed": 2**62}, "give a number below 2.62"),
        ({"lr": 1e300}, r"--lr 1e.300 is not possible: give a finite number below 1e100"),
        ({"interval": (0.0, math.nan)}, "--interval nan is not possible: give a finite number"),
    ],
)
def test_sizes_beyond_sense_are_refused(flags, line):
    with pytest.raises(InputError, match=line):
        check_numbers(flags)


def test_other_values_are_not_numbers():
    check_numbers(
        {"name": "x" * 99, "fast": True, "out": None, "peaks": (0.1, 3.2), "words": ("a",), "epochs": 100_000}
    )
