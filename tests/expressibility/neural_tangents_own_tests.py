"""Run neural-tangents' own tests with neural_tangents_compat, with and without its repairs, and record what passes.

    pip install more-itertools flax  # which the tests use
    pip download --no-deps --no-binary :all: neural-tangents==0.6.5 && tar -xzf neural_tangents-0.6.5.tar.gz
    python tests/expressibility/neural_tangents_own_tests.py neural_tangents-0.6.5 --out own_tests.json

Each test file runs in a process of its own, in an order that is random but always the same, and begins with one case
of each test. When `--seconds` CPU seconds are over, no new case begins. "Before" is an import that only restores the
names which JAX has removed; it runs the cases that "after" has run. Subtests count as tests. pytest does not collect
this file.
"""

import argparse
import collections
import importlib
import json
import os
import random
import subprocess
import sys
import time
import unittest
from collections.abc import Iterator
from pathlib import Path

FILES = (
    "predict_test",
    "stax/requirements_test",
    "stax/combinators_test",
    "stax/branching_test",
    "batching_test",
    "monte_carlo_test",
    "empirical_test",
    "rules_test",
    "stax/elementwise_test",
    "stax/linear_test",
    "stax/stax_test",
)
ROOT = Path(__file__).parents[2]


class Outcomes(unittest.TestResult):
    """The outcome of each test and subtest: passed, failed or skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: list[str] = []
        self.reasons: list[str] = []

    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        self._note("passed" if error is None else "failed", subtest, error)

    def addSuccess(self, test):
        self._note("passed", test)

    def addError(self, test, error):
        self._note("failed", test, error)

    addFailure = addError

    def addSkip(self, test, reason):
        self._note("skipped", test)

    def _note(self, outcome: str, test, error: tuple | None = None) -> None:
        self.outcomes.append(outcome)
        if error is not None:
            self.reasons.append(f"{test.id()}: {error[0].__name__}: {str(error[1])[:300]}")


def cases_of(suite: unittest.TestSuite) -> list[unittest.TestCase]:
    def flat(suite) -> Iterator[unittest.TestCase]:
        for test in suite:
            yield from flat(test) if isinstance(test, unittest.TestSuite) else (test,)

    cases = sorted(flat(suite), key=lambda test: test.id())
    random.Random(0).shuffle(cases)
    seen: collections.Counter = collections.Counter()
    ranked = []
    for case in cases:
        name = case._testMethodName.rstrip("0123456789")
        ranked.append((seen[name], case))
        seen[name] += 1
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


def run_file(file: str, seconds: float, limit: int | None, is_repaired: bool) -> dict:
    """Run one test file in this process. Return the counts, and the reason of each failure."""
    import jax
    from jax.extend.core import Primitive
    from jax.interpreters import ad

    sys.path.insert(0, str(ROOT / "expressibility"))
    if not is_repaired:
        # The repairs are functions of neural_tangents_compat, which imports neural-tangents at once.
        source = (ROOT / "expressibility/neural_tangents_compat.py").read_text(encoding="utf-8")
        for name in ("_repair_structured_derivatives(", "_repair_predict("):
            assert f"        {name}importlib" in source
            source = source.replace(f"        {name}importlib", "        str(importlib")
        exec(compile(source, "neural_tangents_compat.py", "exec"), {"__name__": "neural_tangents_compat"})
    else:
        importlib.import_module("neural_tangents_compat")
    # The test files themselves take these names from JAX.
    jax.tree_map, jax.tree_flatten, jax.tree_unflatten = jax.tree.map, jax.tree.flatten, jax.tree.unflatten
    jax.random.KeyArray, jax.core.Primitive = jax.Array, Primitive
    if not hasattr(ad, "zeros_like_p"):
        ad.zeros_like_p = Primitive("zeros_like")
    from absl import flags

    flags.FLAGS(["tests"])
    module = importlib.import_module("tests." + file.replace("/", "."))
    cases = cases_of(unittest.defaultTestLoader.loadTestsFromModule(module))
    outcomes, started, run = Outcomes(), time.process_time(), 0
    for case in cases[:limit]:
        if time.process_time() - started > seconds:
            break
        case.run(outcomes)
        run += 1
    counts = {outcome: outcomes.outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")}
    spent = round(time.process_time() - started, 1)
    return {"cases": len(cases), "run": run, **counts, "cpu_seconds": spent, "failures": outcomes.reasons}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of neural-tangents' unpacked source distribution")
    parser.add_argument(
        "files", nargs="*", default=FILES, help="test files below its tests/; all of them if none is named"
    )
    parser.add_argument("--seconds", type=float, default=300, help="CPU seconds after which no new case begins")
    parser.add_argument("--generated", type=int, default=2, help="cases of each test that has parameters")
    parser.add_argument(
        "--out", type=Path, default=Path("own_tests.json"), help="the JSON file; finished files are kept"
    )
    parser.add_argument("--one", choices=("before", "after"), help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        sys.path.insert(0, str(args.source.resolve()))
        print(json.dumps(run_file(args.files[0], args.seconds, args.limit, args.one == "after")))
        return
    sys.path.insert(0, str(ROOT))
    from tqdm import tqdm

    from s3net_common.output_files import run_record, write_json

    record = json.loads(args.out.read_text()) if args.out.exists() else {"files": {}}

    def run(file: str, when: str, **limits: float) -> dict:
        command = [sys.executable, __file__, str(args.source), file, "--one", when]
        command += [text for name, value in limits.items() for text in (f"--{name}", str(value))]
        environment = os.environ | {"NT_NUM_GENERATED_CASES": str(args.generated)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{file} ({when}) ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    for file in tqdm([file for file in args.files if file not in record["files"]], unit="file"):
        after = run(file, "after", seconds=args.seconds)
        before = run(file, "before", seconds=10 * args.seconds, limit=after["run"])
        record["files"][file] = {"before": before, "after": after}
        write_json(args.out, run_record() | {"generated_cases": args.generated, "files": record["files"]})


if __name__ == "__main__":
    main()
