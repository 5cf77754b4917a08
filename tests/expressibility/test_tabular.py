import numpy as np
import pytest

import tabular
from s3net_common.errors import InputError


def test_the_sizes_and_units_of_the_data_sets():
    boston, diabetes = tabular.boston(), tabular.diabetes()
    assert boston.features.shape == (506, 13)
    assert (boston.features[0, 0], boston.target[0]) == (0.00632, 24.0)
    assert diabetes.features.shape == (442, 10)
    assert np.ptp(diabetes.features[:, 0]) > 1  # ages in years


def test_standardisation_uses_the_training_rows_of_the_papers_split():
    data = tabular.split(tabular.boston(), tabular.PAPER_SEED)
    assert (data.x_train.shape, data.x_test.shape) == ((455, 13), (51, 13))
    scaled = data.standardised()
    np.testing.assert_allclose(scaled.x_train.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled.x_train.std(axis=0), 1)
    np.testing.assert_allclose(
        scaled.x_test[:, 5], (data.x_test[:, 5] - data.x_train[:, 5].mean()) / data.x_train[:, 5].std()
    )
    np.testing.assert_array_equal(scaled.y_test, data.y_test)


def test_a_constant_feature_becomes_zero():
    split = tabular.Split(np.full((5, 1), 0.1), np.arange(5.0), np.full((2, 1), 0.7), np.arange(2.0))
    assert split.standardised().x_train.tolist() == [[0.0]] * 5
    assert split.standardised().x_test.tolist() == [[0.0]] * 2


VALID = [f"{i},{i * i},{i % 7}" for i in range(25)]


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_target_may_be_any_column_of_a_csv_file(tmp_path):
    table = tabular.load_csv(write(tmp_path / "some.csv", ["a, y ,c", *VALID]), "y")
    assert table.name == "some"
    np.testing.assert_array_equal(table.target, np.arange(25.0) ** 2)
    np.testing.assert_array_equal(table.features[8], [8.0, 1.0])


SEMICOLONS = [f"{i},0;{i * i},0;{i % 7}" for i in range(25)]


@pytest.mark.parametrize(
    "content",
    [
        "a;y;c\n" + "\n".join(SEMICOLONS),
        "\ufeffa;y;c\r\n" + "\r\n".join(SEMICOLONS) + "\r\n;;\r\n;;\r\n",
        "sep=;\na;y;c\n" + "\n".join(SEMICOLONS),
        "a\ty\tc\n" + "\n".join(VALID).replace(",", "\t"),
        '"a", "y","c",,\n' + "\n".join(VALID) + "\n\n,,,,\n",
        "a,y,c\n" + ",\n".join(VALID) + ",\n",
        "a,y,c,Unnamed: 3\n" + ",\n".join(VALID) + ",\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_tables_as_spreadsheets_write_them(tmp_path, capsys, content, encoding):
    (tmp_path / "some.csv").write_bytes(content.encode(encoding))
    table = tabular.load_csv(tmp_path / "some.csv", "y")
    np.testing.assert_array_equal(table.target, np.arange(25.0) ** 2)
    np.testing.assert_array_equal(table.features, [[i, i % 7] for i in range(25)])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names", [",a,y,c", "Unnamed: 0,a,y,c", "a,y,c"])  # the last as R writes it
@pytest.mark.parametrize("label", [lambda i: i, lambda i: 24 - i, lambda i: f"row {i}", lambda i: f"{i}.0"])
def test_row_numbers_and_row_names_are_left_out_with_a_line(tmp_path, capsys, names, label):
    path = write(tmp_path / "some.csv", [names, *[f"{label(i)},{row}" for i, row in enumerate(VALID)]])
    table = tabular.load_csv(path, "y")
    np.testing.assert_array_equal(table.features, [[i, i % 7] for i in range(25)])
    assert capsys.readouterr().err == f"{path}: column 1, row numbers or row names without a name, is left out\n"


def test_a_feature_of_small_values_is_no_constant():
    values = np.array([[1e-15], [2e-15], [3e-15]])
    split = tabular.Split(values, np.arange(3.0), values, np.arange(3.0))
    np.testing.assert_allclose(split.standardised().x_train.std(axis=0), 1)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["a,b,c", *VALID], "no column 'y', only a, b, c: choose another --target"),
        (["1,2,3", *VALID], "only 1, 2, 3: the first line must contain the column names"),
        (["a y c", *VALID], "only a y c: columns are separated by commas, semicolons or tabs"),
        (["a,,y", *VALID], "column 2 has no name: name it in the first line, or remove it"),
        ([",y,c", *[f"{i}.5,{i},2" for i in range(25)]], "column 1 has no name"),
        ([",y,c", *[f"{i // 2},{i},2" for i in range(25)]], "column 1 has no name"),
        (["a,y,c", *VALID, "", "1,2,red"], "line 28, column 'c': 'red' is not a number"),
        (["a,y,c", *VALID, "1_000,2,3"], "line 27, column 'a': '1_000' is not a number"),
        (["a,y,c", *VALID, "1e300,2,3"], "line 27, column 'a': 1e300 is too large; use another unit"),
        (["a,y,c", *VALID, "1e999,2,3"], "line 27, column 'a': 1e999 is not a finite number"),
        (["a,y,c", *VALID, '"1,234",2,3'], "has '1,234' .line 27, column 'a'., but a decimal mark"),
        (["a;y;c", *[row.replace(",", ";") for row in VALID], "1.234,5;2;3"], "'1.234,5' .line 27, column 'a'"),
        (["a;y;c", *[row.replace(",", ";") for row in VALID], "1,5;2.5;3"], "'1,5' .* and '2.5' .line 27, column 'y'"),
        (["a,y,c", *VALID[:5]], "has 5 rows: at least 20 are needed"),
        (["a,y,c", *VALID, "1,2,red"], "line 27, column 'c': 'red' is not a number"),
        (["a,y,c", *VALID, "1,,3"], "line 27, column 'y': a value is missing"),
        (["a,y,c", *VALID, "inf,2,3"], "line 27, column 'a': inf is not a finite number"),
        (["a,y,c", *VALID, "nan,2,3"], "line 27, column 'a': nan is not a finite number"),
        (["a,y,c", *VALID, "1,2"], "line 27 has 2 values, but the header has 3"),
        (["a,y,a", *VALID], "two columns named 'a'"),
        (["y", *[str(i) for i in range(25)]], "no column except 'y'"),
        (["a,y,c", *["1,2,3"] * 25], "column 'y' has the same value in every row"),
        ([""], "is empty"),
    ],
)
def test_invalid_csv_files_are_an_input_error(tmp_path, lines, text):
    with pytest.raises(InputError, match=text):
        tabular.load_csv(write(tmp_path / "some.csv", lines), "y")


def test_unreadable_files_are_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*absent.csv: No such file"):
        tabular.load_csv(tmp_path / "absent.csv", "y")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="it is not a CSV file in UTF-8"):
        tabular.load_csv(binary, "y")
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        tabular.load_csv(tmp_path, "y")
