"""reproduce.py: steps that are skipped, failed, left out and resumed; and the page with their results."""

import errno
import functools
import importlib.util
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image
from processes import run_python, started_python

from s3net_common.errors import InputError

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
reproduce = importlib.import_module("reproduce")
page = importlib.import_module("reproduction.page")
from reproduction.job_queue import groups_of, visible_gpus  # noqa: E402
from reproduction.record import Record, read_record, write_record  # noqa: E402
from reproduction.steps import EXPERIMENTS, LOG, Step, Table, steps_of  # noqa: E402

WORKING_SCRIPT = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
(out / "times").open("a").write("x")
(out / "errors.json").write_text(json.dumps({"errors": {"S3-Net": 29.8125, "ResNet": 31}}))
(out / "tables.md").write_text("## Runs\\n\\n| name | error |\\n|---|--:|\\n| A & B | **12.5** |\\n\\nMade up.\\n")
print("two lines", "of log", sep="\\n")
"""
FAILING_SCRIPT = "import sys; sys.exit('error: CIFAR-100 is missing: <download> it')"


@pytest.fixture
def scripts(tmp_path) -> Path:
    (tmp_path / "works.py").write_text(WORKING_SCRIPT)
    (tmp_path / "fails.py").write_text(FAILING_SCRIPT)
    return tmp_path


def make_step(name: str, command: str, shows: tuple = (), **options: str) -> Step:
    experiment = options.pop("experiment", "expressibility")
    return Step(name, experiment, f"Title of {name}", f"About {name}.", command, shows, **options)


def run(folder: Path, steps: list[Step], **args: object) -> int:
    return reproduce.main(reproduce.Args(out=folder / "out", **args), steps)


def error_rows(results: dict) -> list[dict]:
    return [{"network": name, "error_in_%": error} for name, error in results["errors"].items()]


def test_a_finished_step_is_skipped_until_its_command_changes(scripts, capsys):
    first = make_step("one", f"{scripts}/works.py {{here}}")
    assert run(scripts, [first]) == 0
    assert run(scripts, [first]) == 0
    assert "one: already finished" in capsys.readouterr().out
    assert (scripts / "out" / "one" / "times").read_text() == "x"
    (scripts / "out" / "one").rename(scripts / "elsewhere")
    assert run(scripts, [first]) == 0  # missing results are computed again
    assert (scripts / "out" / "one" / "times").read_text() == "x"
    record = read_record(scripts / "out", "one")
    assert (record.status, record.command) == ("finished", ["python", f"{scripts}/works.py", f"{scripts}/out/one"])
    assert record.seconds > 0 and "cores" in record.machine and record.versions["python"] == sys.version.split()[0]
    assert run(scripts, [make_step("one", f"{scripts}/works.py {{here}} more")]) == 0
    assert (scripts / "out" / "one" / "times").read_text() == "x"  # in a new folder; the earlier results are kept
    assert (scripts / "out" / "former" / "one-1" / "times").read_text() == "x"


@pytest.mark.parametrize("name", ["index.html", "lock", "logs/one.log"])
def test_files_of_something_else_are_not_replaced_unasked(scripts, name):
    file = scripts / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("of the user")
    steps = [make_step("one", f"{scripts}/works.py {{here}}")]
    with pytest.raises(InputError, match=rf"already holds {name}, not written by this script: pass another --out"):
        run(scripts, steps)
    assert file.read_text() == "of the user"
    assert run(scripts, steps, overwrite=True) == 0
    assert run(scripts, steps) == 0


def test_a_failure_is_one_line_and_the_other_steps_run(scripts, capsys):
    steps = [make_step("bad", f"{scripts}/fails.py"), make_step("good", f"{scripts}/works.py {{here}}", (LOG,))]
    assert run(scripts, steps) == 1
    printed = capsys.readouterr().out.splitlines()
    log = scripts / "out" / "logs" / "bad.log"
    assert f"bad: failed, exit code 1: error: CIFAR-100 is missing: <download> it (log: {log})" in printed
    assert printed[-1] == f"written to {scripts / 'out' / 'index.html'}; 1 of 2 steps failed"
    text = (scripts / "out" / "index.html").read_text()
    assert "Failed: exit code 1: error: CIFAR-100 is missing: &lt;download&gt; it" in text
    assert "<pre>two lines\nof log</pre>" in text
    (scripts / "fails.py").write_text("")
    assert run(scripts, steps) == 0  # a failed step runs again
    assert "Failed" not in (scripts / "out" / "index.html").read_text()


def test_a_step_whose_input_is_missing_is_left_out(scripts, capsys):
    tiny = make_step("tiny", f"{scripts}/fails.py", needs="data/nowhere", otherwise="download it")
    table = make_step("table", f"{scripts}/works.py {{here}} {{out}}/run_* {{out}}/other_*")
    assert run(scripts, [tiny, table]) == 0
    printed = capsys.readouterr().out
    assert "tiny: left out, data/nowhere is missing: download it" in printed
    assert f"table: left out, no results yet in {scripts}/out/run_* or {scripts}/out/other_*" in printed
    for name in ("run_b", "run_a"):
        (scripts / "out" / name).mkdir()
    for _ in range(2):  # a step that reads the results of others runs every time
        assert run(scripts, [table]) == 0
    assert (scripts / "out" / "table" / "times").read_text() == "xx"
    assert read_record(scripts / "out", "table").command[-2:] == [f"{scripts}/out/run_a", f"{scripts}/out/run_b"]


def test_one_experiment_runs_and_the_page_keeps_the_results_of_the_others(scripts):
    steps = [
        make_step("a", f"{scripts}/works.py {{here}}", (Table("errors.json", "Errors.", error_rows),)),
        make_step("b", f"{scripts}/works.py {{here}}", experiment="interpretability"),
    ]
    assert run(scripts, steps, only=("expressibility",)) == 0
    assert not (scripts / "out" / "b").exists()
    assert run(scripts, steps, only=("interpretability",)) == 0
    text = (scripts / "out" / "index.html").read_text()
    assert "29.81" in text and "not run yet" not in text


def test_sigterm_ends_the_step_and_the_next_run_resumes_it(scripts):
    """Also: a second run of reproduce.py is an error, and the time of both attempts is counted."""
    (scripts / "slow.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        "if not pathlib.Path(sys.argv[1]).exists():\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    pathlib.Path(sys.argv[1]).write_text(str(child.pid))\n"
        "    time.sleep(60)\n"
    )
    slow = make_step("slow", f"{scripts}/slow.py {scripts}/child")
    (scripts / "driver.py").write_text(
        f"import pathlib, reproduce, reproduction.steps as s\n"
        f"step = s.Step('slow', 'expressibility', '', '', {slow.command!r})\n"
        f"reproduce.main(reproduce.Args(out=pathlib.Path({str(scripts / 'out')!r})), [step])\n"
    )
    with started_python(scripts / "driver.py", env={"PYTHONPATH": str(ROOT)}) as driver:
        wait_until(lambda: (scripts / "child").is_file() and (scripts / "child").read_text())
        with pytest.raises(InputError, match=r"is in use by another .* end it \(kill -TERM -- -\d+\)"):
            run(scripts, [slow])
        child = int((scripts / "child").read_text())
        driver.terminate()
        assert driver.wait() == 128 + signal.SIGTERM
    wait_until(lambda: ended(child))
    before = read_record(scripts / "out", "slow")
    assert before.status == "unfinished" and before.seconds > 0
    assert "the run was ended before it was done" in (scripts / "out" / "index.html").read_text()
    assert run(scripts, [slow]) == 0
    assert read_record(scripts / "out", "slow").seconds > before.seconds


def test_the_bar_shows_the_last_line_of_the_running_step_and_ctrl_c_says_what_is_done(scripts, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "SAVE_SECONDS", 0.2)
    (scripts / "slow.py").write_text(
        "import os, pathlib, sys, time\n"
        "print('... epoch 1: 3 of 9 batches', flush=True)\n"
        "assert os.environ['S3NET_PROGRESS_SECONDS'] == '60'\n"
        "time.sleep(600)\n"
    )
    shown = []

    def show(bar, text):
        shown.append(text)
        if text.startswith("..."):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(reproduce.ProgressBar, "set_postfix_str", show)
    steps = [make_step("a", f"{scripts}/works.py {{here}}"), make_step("b", f"{scripts}/slow.py")]
    with pytest.raises(KeyboardInterrupt):
        run(scripts, steps)
    assert shown[-1] == "... epoch 1: 3 of 9 batches"
    assert "1 of 2 steps are done; stopped before its end: b" in capsys.readouterr().out


def without_spans(text: str) -> str:
    """Return the page's text without the spans around the words of commands."""
    return re.sub("</?span>", "", text)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


# ---- The page -----------------------------------------------------------------------------------------------------


def test_the_page_needs_no_other_file_and_contains_figures_tables_and_commands(scripts):
    (scripts / "draws.py").write_text(WORKING_SCRIPT)
    shows = ("figure.png", Table("errors.json", "Errors, in <percent>.", error_rows), Table("tables.md"), "absent.png")
    drawn = make_step("drawn", f"{scripts}/draws.py {{here}}", shows)
    here = scripts / "out" / "drawn"
    here.mkdir(parents=True)
    Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(here / "figure.png")
    assert (
        run(scripts, [drawn, make_step("later", "x.py", experiment="interpretability")], only=("expressibility",)) == 0
    )
    text = (scripts / "out" / "index.html").read_text()
    sources = re.findall(r'\b(?:src|href)="([^"]*)"', text)
    assert sum(source.startswith("data:image/png;base64,") for source in sources) == 1
    assert sum(source.startswith("data:image/svg+xml;base64,") for source in sources) == 1
    remote = [source for source in sources if not source.startswith(("data:", "#"))]
    assert remote == ["https://arxiv.org/abs/1811.09003"]  # a link; the page does not load it
    assert not re.search(r"<(script|link|iframe)|@import|url\(", text)
    anchors = {source[1:] for source in sources if source.startswith("#")}
    assert anchors == {"drawn", "later"} <= set(re.findall(r'id="([^"]*)"', text))
    assert '<tr><th>network</th><th class="number">error in %</th></tr>' in text
    assert '<tr><td>S3-Net</td><td class="number">29.81</td></tr>' in text
    assert "Errors, in &lt;percent&gt;." in text
    assert "<h4>Runs</h4>" in text and '<td>A &amp; B</td><td class="number"><b>12.5</b></td>' in text
    assert f"<code>python {scripts}/draws.py {here}</code>" in without_spans(text)
    assert "Not run yet." in text
    assert [text.index(f'id="{name}"') for name in EXPERIMENTS] == sorted(text.index(f'id="{e}"') for e in EXPERIMENTS)


def test_damaged_results_are_named_and_the_rest_of_the_page_is_written(scripts):
    shows = ("x.png", Table("errors.json", "", error_rows), Table("tables.md"))
    damaged = make_step("damaged", f"{scripts}/works.py {{here}}", shows)
    assert run(scripts, [damaged]) == 0
    (scripts / "out" / "damaged" / "errors.json").write_text('{"errors": ')
    (scripts / "out" / "damaged" / "x.png").write_bytes(b"no picture")
    assert run(scripts, [damaged]) == 0
    text = (scripts / "out" / "index.html").read_text()
    assert "x.png is damaged" in text
    assert "errors.json is damaged: delete the folder damaged and run again" in text and "<h4>Runs</h4>" in text


def test_wide_pictures_are_marked_as_panels(tmp_path):
    for size, panels in (((2, 5, 3), True), ((3, 5, 3), False)):
        Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / "x.png")
        assert page.picture(tmp_path / "x.png", "")["panels"] == panels


def test_consecutive_tables_without_a_blank_line_are_separated():
    tables = page.markdown_blocks("| a |\n|---|\n| 1 |\n| b | c |\n|---|--:|\n| x | y |\n| z | 1.5 ± 0.2 |\n")
    assert [(table["head"], table["rows"], table["numeric"]) for table in tables] == [
        (["a"], [["1"]], [True]),
        (["b", "c"], [["x", "y"], ["z", "1.5 ± 0.2"]], [False, False]),
    ]


def test_rows_of_different_lengths_are_damage():
    with pytest.raises(ValueError):
        page.markdown_blocks("| a | b |\n|---|---|\n| 1 |\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (100, "1.7 min"),
        (610, "10 min"),
        (5390, "90 min"),
        (5400, "1.5 h"),
        (90000, "25.0 h"),
    ],
)
def test_durations(seconds, text):
    assert page.duration(seconds) == text


# ---- The steps ----------------------------------------------------------------------------------------------------


@functools.cache
def arguments_of(script: str) -> type:
    """Return the dataclass of a script's command line."""
    spec = importlib.util.spec_from_file_location(script.replace("/", "_").removesuffix(".py"), ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and tyro look for the module there
    spec.loader.exec_module(module)
    return getattr(module, "Args", None) or module.Arguments


@pytest.mark.parametrize("budget", ["quick", "cpu", "gpu"])
def test_every_budget_covers_all_experiments_with_valid_commands(budget):
    steps = steps_of(budget)
    assert {step.experiment for step in steps} == set(EXPERIMENTS)
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        script, *words = step.words(Path("runs/x"))
        assert script.startswith(step.experiment)
        assert tyro.cli(arguments_of(script), args=words)  # exits if a flag is unknown
        assert not any("{" in word for word in words)
        assert step.on_gpu == (budget == "gpu" and "train_s3net.py" in script and "--eval-only" not in words)
    groups = [len(group) for group in groups_of(steps)]
    assert sum(groups) == len(steps) and max(groups) == (15 if budget == "gpu" else 1)


# ---- Several GPUs -------------------------------------------------------------------------------------------------

TRAINING_SCRIPT = """
import os, pathlib, signal, sys, time
out, seconds, action = pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
out.mkdir(parents=True, exist_ok=True)

def end(number, frame):
    (out / "saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, end)
started = time.time()
while action == "interrupts" and not (out.parent / "b" / "started").exists():
    time.sleep(0.05)
(out / "started").touch()
if action == "interrupts":
    os.kill(os.getppid(), signal.SIGINT)
time.sleep(seconds)
(out / "run").write_text(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {started} {time.time()}")
sys.exit(action == "fails")
"""


def training_steps(folder: Path, actions: dict[str, str], seconds: float) -> list[Step]:
    (folder / "trains.py").write_text(TRAINING_SCRIPT)
    return [
        make_step(name, f"{folder}/trains.py {{here}} {seconds} {action}", on_gpu=True)
        for name, action in actions.items()
    ]


def test_networks_train_side_by_side_one_on_each_gpu(scripts, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "visible_gpus", lambda count: ["3", "GPU-5"])
    steps = training_steps(scripts, {"a": "trains", "b": "fails", "c": "trains", "d": "trains"}, seconds=1.0)
    steps.append(make_step("last", f"{scripts}/works.py {{here}} {{out}}/*/run"))
    assert run(scripts, steps) == 1  # one failed
    out = scripts / "out"
    runs = {}
    for name in "abcd":
        gpu, *times = (out / name / "run").read_text().split()
        runs[name] = (gpu, *map(float, times))
    assert {gpu for gpu, *_ in runs.values()} == {"3", "GPU-5"}
    overlaps = [
        (first, second)
        for first, (gpu, start, end) in runs.items()
        for second, (other, begin, stop) in runs.items()
        if first < second and start < stop and begin < end
    ]
    assert ("a", "b") in overlaps and all(runs[first][0] != runs[second][0] for first, second in overlaps)
    statuses = {name: read_record(out, name).status for name in ("a", "b", "c", "d", "last")}
    assert statuses == {"a": "finished", "b": "failed", "c": "finished", "d": "finished", "last": "finished"}
    assert "exit code 1" in read_record(out, "b").reason
    assert (out / "lock").read_text() == ""
    capsys.readouterr()
    run(scripts, steps)
    assert "a: already finished" in capsys.readouterr().out
    assert float((out / "a" / "run").read_text().split()[1]) == runs["a"][1]


def test_ctrl_c_ends_all_networks(scripts, monkeypatch):
    monkeypatch.setattr(reproduce, "visible_gpus", lambda count: ["0", "1"])
    steps = training_steps(scripts, {"a": "interrupts", "b": "trains", "c": "trains"}, seconds=60)
    with pytest.raises(KeyboardInterrupt):
        run(scripts, steps)
    out = scripts / "out"
    assert [(out / name / "saved").exists() for name in "ab"] == [True, True] and not (out / "c").exists()
    assert [read_record(out, name).status for name in "ab"] == ["unfinished", "unfinished"]
    assert (out / "index.html").is_file()


@pytest.mark.parametrize(
    ("given", "names"), [(None, ["0", "1"]), ("2,7", ["2", "7"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"])]
)
def test_the_gpus_are_those_that_this_process_may_use(monkeypatch, given, names):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus(2) == names


RESULTS = {
    "ntk_comparison": ("expressibility/results", "0.7806", "0.7708"),  # computed and printed error at K = 4
    "ntk_sensitivity": ("expressibility/results", "boston, standardised", ">30 (0)<"),
    "universal_approximation": ("expressibility/results", "15,358", "1.4e-14"),
    "one_neuron": ("expressibility/results", "0.01752", "1.532"),
    "gradient_flow": ("generalizability/results/gradient_flow", "14.01 (13.30 to 14.72)", "none, He initialisation"),
    "digits": ("generalizability/results/digits", "231,706", "0.83 (epoch 14)"),
    "segmentation": (
        "interpretability/results",
        'FullGrad (s3net_cifar)</td><td class="number">0.5811',
        "Dice at the 90th percentile",
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_the_committed_results_are_shown(name, tmp_path):
    """The results folders of the repository contain what the scripts wrote."""
    folder, *expected = RESULTS[name]
    (tmp_path / name).symlink_to(ROOT / folder)
    (tmp_path / "logs").mkdir()
    (real,) = [step for step in steps_of("quick") if step.name == name]
    write_record(tmp_path, name, Record(["python", "x.py"], "finished", 12.0))
    page.write_page(tmp_path / "index.html", "quick", [real], tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert all(number in text for number in expected)
    pictures = [shown for shown in real.shows if isinstance(shown, str)]
    assert text.count("<img") - 1 == sum((ROOT / folder / picture).is_file() for picture in pictures)
    assert "python x.py</code><br>12 s" in without_spans(text)


def test_a_missing_gpu_no_experiment_and_an_unusable_folder_are_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="--budget gpu needs a GPU, and PyTorch finds none: pass --budget cpu"):
        reproduce.main(reproduce.Args(budget="gpu", out=tmp_path / "out"))
    with pytest.raises(InputError, match="--only needs one or more of expressibility"):
        reproduce.main(reproduce.Args(only=(), out=tmp_path / "out"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file cannot be written"):
        reproduce.main(reproduce.Args(out=tmp_path / "file"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line(scripts, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reproduce, "write_record", write)
    with pytest.raises(InputError, match=r"out cannot be written \(No space left on device\): pass another --out"):
        run(scripts, [make_step("one", f"{scripts}/works.py {{here}}")])


def test_a_full_disk_leaves_the_earlier_page_alone(tmp_path, monkeypatch):
    def write_half(path, text, **_):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "index.html").write_bytes(b"earlier")
    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(InputError, match=r"index.html cannot be written \(No space left on device\): make room"):
        page.write_page(tmp_path / "index.html", "quick", [], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"index.html": b"earlier"}


def test_the_command_line(tmp_path):
    done = run_python(ROOT / "reproduce.py", "--budget", "tiny", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "quick" in done.stderr
