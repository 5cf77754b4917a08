"""Every committed JSON of results says how it was made: command, versions, and how long it took."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ("expressibility", "generalizability", "interpretability")
FIELDS = {"command": {"command"}, "versions": {"versions"}, "seconds": {"cpu_seconds", "total_seconds"}}

QUIET = "a measurement of speed, made before the field existed: another machine load would change its results"
EXCEPTIONS = {  # file in an experiment's results: the fields it may lack, and why
    "expressibility/benchmark.json": ({"seconds"}, QUIET),
    "generalizability/benchmark.json": ({"seconds"}, QUIET),
    "generalizability/decoding_benchmark.json": ({"seconds"}, QUIET),
    "generalizability/benchmark_k12_repeat.json": ({"command", "versions", "seconds"}, "see `how`"),
    "generalizability/fake_device.json": ({"seconds"}, "made before the field existed; counts, not times"),
    "generalizability/fast_recipes/results.json": ({"versions", "seconds"}, "each run has its own"),
    "generalizability/full_search/results.json": ({"versions", "seconds"}, "each run has its own"),
    "generalizability/same_budget/results.json": ({"command", "versions", "seconds"}, "each run has its own"),
    "generalizability/cifar100_200_epochs/report.json": ({"seconds"}, "`hours` of each run"),
    "generalizability/gradient_flow/curves.json": ({"seconds"}, "the run of gradient_flow.json, which has them"),
    "interpretability/speed.json": ({"seconds"}, QUIET),
    "interpretability/faithfulness.json": ({"seconds"}, "the run of scores.json, which has them"),
    "interpretability/photographs.json": ({"seconds"}, "made by the code in the README, which writes no record"),
}
RECORDS = {
    f"{experiment}/{file.relative_to(ROOT / experiment / 'results').as_posix()}": file
    for experiment in EXPERIMENTS
    for file in sorted((ROOT / experiment / "results").rglob("*.json"))
    if file.name != "config.json"  # the settings of a run, beside its metrics
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_has_command_versions_and_seconds(name):
    content = json.loads(RECORDS[name].read_text())
    missing = {field for field, keys in FIELDS.items() if not keys & content.keys()}
    assert missing <= EXCEPTIONS.get(name, (set(), ""))[0]


def test_exceptions_name_records():
    assert not EXCEPTIONS.keys() - RECORDS.keys()
