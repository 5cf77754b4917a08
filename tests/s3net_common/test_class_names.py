from pathlib import Path

import pytest

from s3net_common.class_names import find_class, match_classes
from s3net_common.errors import InputError, printable
from s3net_common.output_files import csv_cell

FILE = Path("best.safetensors")
ANIMALS = ["ant", "bee", "cow", "dog"]


def test_the_networks_classes_in_its_order_need_no_line():
    match = match_classes(ANIMALS, ANIMALS, 4, FILE)
    assert (match.outputs, match.names, match.note, match.subset) == ([0, 1, 2, 3], ANIMALS, None, False)


def test_another_order_is_matched_by_name():
    match = match_classes(["dog", "ant", "cow", "bee"], ANIMALS, 4, FILE)
    assert (match.outputs, match.names, match.subset) == ([3, 0, 2, 1], ANIMALS, False)
    assert match.note == "the classes of the images and those of the network differ in order: they are matched by name"


def test_some_classes_are_matched_by_name():
    match = match_classes(["bee", "dog"], ANIMALS, 4, FILE)
    assert (match.outputs, match.subset) == ([1, 3], True)
    assert match.note == "the images have 2 of the network's 4 classes, matched by name (absent: ant, cow)"


def test_outputs_without_a_name():
    match = match_classes(ANIMALS, ANIMALS, 6, FILE)
    assert match.names == [*ANIMALS, "output 4", "output 5"] and not match.subset and match.note is None


def test_accents_are_equal_in_composed_and_decomposed_form():
    match = match_classes(["ane\u0301mone", "zinnia"], ["zinnia", "an\u00e9mone"], 2, FILE)
    assert match.outputs == [1, 0]


def test_numbered_folders_are_names_if_the_file_names_classes():
    trained = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ...: as the trainer names the classes of such folders
    assert match_classes(trained, trained, 12, FILE).outputs == list(range(12))
    assert match_classes(["10", "9"], trained, 12, FILE).outputs == [2, 11]


@pytest.mark.parametrize("width", [0, 2])
def test_folders_count_as_numbers_if_the_file_names_no_classes(width):
    folders = sorted(str(i).zfill(width) for i in range(12))
    match = match_classes(folders, None, 12, FILE)
    assert match.outputs == [int(folder) for folder in folders]
    assert match.names[10] == "10" and match.note.endswith("the folders 0 to 11 are the outputs of these numbers")


def test_other_folders_are_outputs_in_their_order_if_the_file_names_no_classes():
    match = match_classes(ANIMALS, None, 4, FILE)
    assert (match.outputs, match.names) == ([0, 1, 2, 3], ANIMALS)
    assert match.note == f"{FILE} names no classes: its outputs are taken in alphabetical order as ant, bee, cow, dog"


@pytest.mark.parametrize(
    ("classes", "trained", "outputs", "message"),
    [
        (["ant", "cat"], ANIMALS, 4, "classes that the network does not have: cat; the 4 classes of best"),
        ([str(i) for i in range(100)], [f"c{i}" for i in range(100)], 100, "0, 1, 2, 3, 4 and 95 more (100 of 100)"),
        (["e\x1b[31m"], ANIMALS, 4, "does not have: e\\x1b[31m; "),
        (["crane"], ["crane", "crane", "bee"], 3, "has 2 classes that are called 'crane'"),
        (ANIMALS, ANIMALS, 3, "names 4 classes, but the network has 3 outputs"),
        (ANIMALS, None, 3, "are for 3 classes, and the images have 4"),
        (ANIMALS, None, 5, "names no classes, and the network has 5 outputs, and the images have 4 classes"),
        (["1", "10", "2"], None, 3, "the class folders are numbers, but not 0 to 2 (1, 10, 2): name the folders by"),
    ],
)
def test_classes_that_cannot_be_matched(classes, trained, outputs, message):
    with pytest.raises(InputError) as error:
        match_classes(classes, trained, outputs, FILE)
    assert message in str(error.value)


def test_a_class_is_asked_for_by_name_or_index():
    assert [find_class(target, ANIMALS) for target in ("cow", "2", "7")] == [2, 2, 7]
    assert find_class("10", ["0", "1", "10", "2"]) == 2  # a name comes before an index
    assert find_class("3", None) == 3
    with pytest.raises(InputError, match="the network has no class 'cat': did you mean"):
        find_class("cat", ["car", "cab"])
    with pytest.raises(InputError, match="class names are unknown: give the index of a class instead of 'cat'"):
        find_class("cat", None)
    with pytest.raises(InputError, match="2 classes are called 'crane': give an index, 0 or 1"):
        find_class("crane", ["crane", "crane"])


def test_texts_for_the_terminal_and_for_spreadsheets():
    assert printable("a\x1b[2J\n\u202e\udcff Ärger 日本\u00a0x") == "a\\x1b[2J\\n\\u202e\\xff Ärger 日本\u00a0x"
    assert [csv_cell(text) for text in ("=1+1", "+a", "-a", "@a", "a=1", "\t=1")] == [
        "'=1+1",
        "'+a",
        "'-a",
        "'@a",
        "a=1",
        "\\t=1",
    ]
