"""READMEs and CLAIMS.md: their numbers are those of the recorded results, their commands and links work.

A table of results follows a comment `<!-- numbers: FILE FILE ... -->`, with paths relative to the README. Each number
in the table's body, except in the first column (labels of the rows), must be a number of one of these files after
rounding to the digits shown:

- A file is JSON, JSON Lines, CSV, Markdown (numbers as read in a README), or Python (its numeric constants).
- Thousands separators are accepted.
- A unit after the number may scale the recorded value: `UNITS` (42.8M is 42,780,192; 32.5% is 32.5 or 0.325). A
  column whose heading contains a per cent sign may be scaled as %.
- The mean of a list of numbers in JSON is accepted. A ratio must be recorded as such: ratios of two recorded numbers
  are not tried.
- If the row's label, or its part before a comma, is a key or a string in the JSON, or the first cell of a row of a
  Markdown table, or the epoch of a line of JSON Lines, only the numbers that belong to it are accepted.
"""

import ast
import csv
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from comparison.paper_tables import PAPER_ROWS
from s3net_networks.size import network_size

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ("expressibility", "generalizability", "interpretability")
ALL_READMES = [*(ROOT / name / "README.md" for name in ("", *EXPERIMENTS, "weights")), ROOT / "CLAIMS.md"]
ALL_READMES += sorted((ROOT / "weights").glob("*/README.md"))  # the cards of exported weights
READMES = [readme for readme in ALL_READMES if readme.is_file()]
UNITS = {"M": 1e6, "G": 1e9, "MB": 1e6, "ms": 1e-3, "%": 0.01}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_readme = pytest.mark.parametrize("readme", READMES, ids=name_of)

# ---- Numbers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A number as printed: its value, half a unit of its last digit, and its unit."""

    text: str
    value: float
    tolerance: float
    unit: str

    def matches(self, recorded: float, units: set[str]) -> bool:
        """Whether a recorded value, in one of the units or in none, rounds to this number."""
        scales = [1.0] + [UNITS[unit] for unit in units | {self.unit} if unit in UNITS]
        # Half-way cases may be rounded either way.
        return any(abs(self.value - recorded / scale) <= self.tolerance * (1 + 1e-6) for scale in scales)


NUMBER = re.compile(
    r"(?<![\w.\-−])([-−+]?)(\d(?:[\d,]*\d)?)(\.\d+)?(e[-+]?\d+)?(?: ?(MB|ms|M|G|%)(?![A-Za-z]))?(?![\w])"
)


def printed_numbers(text: str) -> list[Number]:
    """Return the numbers of a text in Markdown. Links' addresses, code and words with digits (ResNet-20) have none."""
    text = re.sub(r"`[^`]*`", " ", text)
    text = re.sub(r"\]\([^)]*\)", "]", text).replace("**", "")
    numbers = []
    for match in NUMBER.finditer(text):
        sign, whole, fraction, exponent, unit = (group or "" for group in match.groups())
        power = int(exponent[1:] or 0)
        value = float(f"{sign.replace('−', '-')}{whole.replace(',', '')}{fraction}e{power}")
        digits = max(0, len(fraction) - 1)
        numbers.append(Number(match[0], value, 0.5 * 10.0 ** (power - digits), unit))
    return numbers


def json_numbers(content: object) -> list[float]:
    """Return all numbers in JSON, and the mean of each list of numbers."""
    if isinstance(content, dict):
        return [number for part in content.values() for number in json_numbers(part)]
    if isinstance(content, list):
        numbers = [number for part in content for number in json_numbers(part)]
        return [*numbers, sum(numbers) / len(numbers)] if numbers and len(numbers) == len(content) else numbers
    return [content] if isinstance(content, int | float) and not isinstance(content, bool) else []


def parts_with_label(content: object, labels: set[str]) -> list[object]:
    """Return the values under a key that is one of the labels, and the dicts that have one of them as a value."""
    if isinstance(content, list):
        return [part for item in content for part in parts_with_label(item, labels)]
    if not isinstance(content, dict):
        return []
    if any(isinstance(value, str) and value in labels for value in content.values()):
        return [content]
    return [
        part
        for key, value in content.items()
        for part in ([value] if key in labels else parts_with_label(value, labels))
    ]


def recorded_numbers(file: Path, label: str) -> list[float]:
    """Return the numbers of a file of results that belong to a row's label, or all if the file lacks the label."""
    text = file.read_text()
    plain = label.replace("**", "").replace("`", "")
    labels = {plain, plain.split(", ")[0], *re.findall(r"`([^`]*)`", label)}
    if file.suffix == ".json":
        content = json.loads(text)
        return json_numbers(parts_with_label(content, labels)) or json_numbers(content)
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
        return json_numbers([row for row in rows if str(row["epoch"]) == label.split(" ")[0]] or rows)
    if file.suffix == ".csv":
        cells = [cell for row in csv.reader(text.splitlines()) for cell in row]
        return [float(cell) for cell in cells if re.fullmatch(r"-?\d+(\.\d+)?(e[-+]?\d+)?", cell)]
    if file.suffix == ".py":
        return json_numbers([node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)])
    assert file.suffix == ".md", f"{file}: no reader for this kind of file"
    rows = [split_row(line) for line in text.splitlines() if line.startswith("|")]
    rows = [row for row in rows if row[0] in labels] or rows
    printed = [number for row in rows for cell in row[1:] for number in printed_numbers(cell)]
    return [number.value * UNITS.get(number.unit, 1) for number in printed]


@dataclass(frozen=True)
class Table:
    """A table of results: the files with its numbers, its heading, and its rows with their line numbers."""

    sources: tuple[Path, ...]
    heading: list[str]
    rows: list[tuple[int, list[str]]]

    def cells(self) -> Iterator[tuple[str, list[Number], Callable[[Number], bool]]]:
        """Yield the place, the numbers and the check of each cell, without the first column."""
        for line, row in self.rows:
            recorded = [number for source in self.sources for number in recorded_numbers(source, row[0])]
            for title, cell in list(zip(self.heading, row, strict=True))[1:]:
                units = {"%"} if "%" in title else set()
                check = partial(is_recorded, recorded=recorded, units=units)
                yield f"line {line}: {cell}", printed_numbers(cell), check


def is_recorded(number: Number, recorded: list[float], units: set[str]) -> bool:
    return any(number.matches(value, units) for value in recorded)


def split_row(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def tables_of_results(text: str, folder: Path) -> list[Table]:
    """Return the tables that follow a comment with their sources."""
    lines = text.splitlines()
    tables = []
    for start, line in enumerate(lines):
        if not (comment := re.fullmatch(r"<!-- numbers: (.*) -->", line)):
            continue
        first = next(i for i in range(start + 1, len(lines)) if lines[i].strip())
        end = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
        assert end >= first + 3, f"line {start + 1}: no table follows the comment"
        rows = [(i + 1, split_row(lines[i])) for i in range(first + 2, end)]
        sources = tuple(folder / name for name in comment[1].split())
        tables.append(Table(sources, split_row(lines[first]), rows))
    return tables


def wrong_numbers(readme: Path, text: str) -> list[str]:
    """Return the numbers in the README's tables of results that the table's files lack."""
    cells = [cell for table in tables_of_results(text, readme.parent) for cell in table.cells()]
    return [f"{number.text} in {place}" for place, numbers, check in cells for number in numbers if not check(number)]


@each_readme
def test_numbers_of_tables_are_recorded(readme):
    wrong = wrong_numbers(readme, readme.read_text())
    assert not wrong, f"not in the files that the comment above the table names: {wrong}"


@each_readme
def test_every_table_of_measurements_names_its_source(readme):
    """A table without a comment has no decimal fractions or large numbers, which would be results."""
    text = re.sub(r"<!-- numbers: .* -->\n+(\|.*\n?)+", "", readme.read_text())
    cells = [cell for line in text.splitlines() if line.startswith("|") for cell in split_row(line)]
    numbers = [number.text for cell in cells for number in printed_numbers(cell)]
    assert not [text for text in numbers if "." in text or "," in text]


def test_a_wrong_digit_is_reported():
    readme = ROOT / "generalizability" / "README.md"
    text = readme.read_text()
    for right, wrong in (
        ("32.03 ± 0.59", "32.04 ± 0.59"),
        ("272,836 | 42.8M", "272,837 | 42.8M"),
        ("**4.6**", "**4.7**"),
    ):
        assert right in text
        assert wrong_numbers(readme, text.replace(right, wrong)), f"{wrong} instead of {right} was not reported"


def test_most_altered_digits_are_reported():
    """Change the last digit of each number with 3 digits or more. Some become another result of the same file.

    Above all those of a file with hundreds of scores between 0 and 1, of which the README shows 3 digits.
    """
    altered = reported = 0
    for readme in READMES:
        for table in tables_of_results(readme.read_text(), readme.parent):
            for _, numbers, check in table.cells():
                for wrong in filter(None, map(altered_number, numbers)):
                    altered += 1
                    reported += not check(wrong)
    assert altered > 200
    assert reported >= 0.8 * altered, f"{reported} of {altered}"


def altered_number(number: Number) -> Number | None:
    mantissa, rest = re.fullmatch(r"([-−+\d,.]+)(.*)", number.text).groups()
    if sum(character.isdigit() for character in mantissa) < 3:
        return None
    return printed_numbers(f"{mantissa[:-1]}{(int(mantissa[-1]) + 1) % 10}{rest}")[0]


# ---- Commands -----------------------------------------------------------------------------------------------------


def class_fields(script: Path, name: str) -> dict[str, str]:
    """Return the annotated fields of a dataclass of flags, also inherited ones, with their annotations."""
    tree = ast.parse(script.read_text())
    modules = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    definitions = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if name not in definitions:
        path = modules.get(name, "").replace(".", "/") + ".py"
        places = [folder / path for folder in (script.parent, ROOT) if (folder / path).is_file()]
        assert places, f"{script}: {name} is neither defined nor imported"
        return class_fields(places[0], name)
    fields = {}
    for base in definitions[name].bases:
        fields |= class_fields(script, ast.unparse(base))
    for node in definitions[name].body:
        if isinstance(node, ast.AnnAssign):
            fields[node.target.id] = ast.unparse(node.annotation)
    return fields


@cache
def script_flags(script: Path) -> set[str]:
    """Return a script's flags: the fields of the dataclass that it passes to `run_script`, or those of argparse."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    if added := [call.args[0] for call in calls if ast.unparse(call.func) == "parser.add_argument"]:
        return {"--help", *(name.value for name in added)}
    [arguments] = [ast.unparse(call.args[1]) for call in calls if ast.unparse(call.func) == "run_script"]
    flags = {"--help"}
    for field, annotation in class_fields(script, arguments).items():
        if "Positional" not in annotation:
            name = field.replace("_", "-")
            flags |= {f"--{name}", f"--no-{name}"} if "bool" in annotation else {f"--{name}"}
    return flags


def faults(command: str, folders: list[Path]) -> list[str]:
    """Return what is wrong with a command in a shell: a script, flag or file of requirements that does not exist.

    A script is looked for in each of `folders`; it is right if one of the scripts found has all flags.
    """
    words = shlex.split(command, comments=True)
    report = []
    for start, word in enumerate(words):
        if Path(word).name == "pip" and "-r" in words[start:]:
            file = words[words.index("-r", start) + 1]
            report += [] if (ROOT / file).is_file() else [f"there is no {file}"]
        if Path(word).name not in ("python", "python3", "torchrun"):
            continue
        rest = words[start + 1 :]
        if Path(word).name != "torchrun" and rest and rest[0] in ("-m", "-c"):
            continue
        script = next((argument for argument in rest if argument.endswith(".py")), None)
        if script is None:
            continue  # prose
        flags = []
        for argument in rest[rest.index(script) + 1 :]:
            if argument in ("&&", ";", "|"):
                break
            if argument.startswith("--"):
                flags.append(argument.split("=")[0].replace("_", "-"))
        scripts = [folder / script for folder in folders if (folder / script).is_file()]
        if not scripts:
            report.append(f"there is no {script}")
            continue
        unknown = [[flag for flag in flags if flag not in script_flags(path)] for path in scripts]
        report += [f"{script} has no {flag}" for flag in min(unknown, key=len)]
    return report


def commands_of(readme: Path) -> list[str]:
    """Return the shell commands of a README: the lines of its code blocks, and code within its text."""
    commands = []
    for token in MarkdownIt("commonmark").enable("table").parse(readme.read_text()):
        if token.type == "fence" and token.info in ("bash", "sh", "shell"):
            commands += token.content.replace("\\\n", " ").splitlines()
        commands += [child.content for child in token.children or [] if child.type == "code_inline"]
    return [command for command in commands if re.search(r"\b(python3?|torchrun|pip) ", command)]


@each_readme
def test_commands_name_scripts_and_flags_that_exist(readme):
    reports = {command: faults(command, [ROOT]) for command in commands_of(readme)}
    assert not {command: report for command, report in reports.items() if report}


def recorded_commands(content: object) -> list[str]:
    if isinstance(content, list):
        return [command for part in content for command in recorded_commands(part)]
    if isinstance(content, dict):
        commands = [command for part in content.values() for command in recorded_commands(part)]
        command = content.get("command")
        return [*commands, command] if isinstance(command, str) else commands
    return []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_recorded_commands_name_scripts_and_flags_that_exist(experiment):
    """In records of earlier versions the command was typed in the experiment's folder."""
    records = sorted((ROOT / experiment / "results").rglob("*.json"))
    commands = {command for record in records for command in recorded_commands(json.loads(record.read_text()))}
    assert commands
    reports = {command: faults(command, [ROOT, ROOT / experiment]) for command in commands}
    assert not {command: report for command, report in reports.items() if report}


def test_an_unknown_script_or_flag_is_reported():
    assert faults("python generalizability/train_s3nets.py", [ROOT]) == ["there is no generalizability/train_s3nets.py"]
    assert faults("torchrun --nproc_per_node=2 generalizability/train_s3net.py --epoch 3 --no-amp", [ROOT]) == [
        "generalizability/train_s3net.py has no --epoch"
    ]
    assert faults("pip install -e . -r interpretability/requirement.txt", [ROOT]) == [
        "there is no interpretability/requirement.txt"
    ]


def test_python_code_in_the_root_readme_runs():
    tokens = MarkdownIt().parse((ROOT / "README.md").read_text())
    blocks = [token.content for token in tokens if token.type == "fence" and token.info == "python"]
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


# ---- Links --------------------------------------------------------------------------------------------------------


def links_of(readme: Path) -> list[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(readme.read_text())
    children = [child for token in tokens for child in token.children or []]
    return [
        child.attrs.get("href") or child.attrs.get("src") for child in children if child.type in ("link_open", "image")
    ]


def anchors_of(readme: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a README."""
    tokens = MarkdownIt("commonmark").parse(readme.read_text())
    anchors = set()
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            title = "".join(child.content for child in inline.children)
            anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            repeated = sum(1 for other in anchors if re.fullmatch(re.escape(anchor) + r"(-\d+)?", other))
            anchors.add(f"{anchor}-{repeated}" if repeated else anchor)
    return anchors


@each_readme
def test_links_lead_to_files_and_headings_that_exist(readme):
    broken = []
    for link in links_of(readme):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (readme.parent / path).resolve() if path else readme
        if target in ALL_READMES and target not in READMES:
            continue  # not written yet
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert not broken


@each_readme
def test_no_address_of_a_repository_that_does_not_exist(readme):
    text = readme.read_text().lower()
    assert "github.com/s3net" not in text
    assert "colab.research.google.com" not in text


def test_root_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_first_bash_block_of_the_root_readme_has_two_commands():
    tokens = MarkdownIt().parse((ROOT / "README.md").read_text())
    first = next(token.content for token in tokens if token.type == "fence" and token.info == "bash")
    assert len(first.splitlines()) == 2


# ---- Records ------------------------------------------------------------------------------------------------------


def test_recorded_network_sizes_are_those_of_the_code():
    """test_compare_results.py compares the sizes in the paper's rows with the code."""
    compared = {(row.code_parameters, row.multiply_adds) for row in PAPER_ROWS}
    file = ROOT / "generalizability" / "results" / "network_sizes.json"
    for row in json.loads(file.read_text())["rows"]:
        size = {name: row[name] for name in ("parameters", "multiply_adds")}
        if tuple(size.values()) not in compared:
            assert size == network_size(row["network"], row["num_classes"], row["options"], row["image_size"]), row
