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


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["a,b,c", *VALID], "no column 'y': choose --target from a, b, c"),
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
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="it is not a CSV file in UTF-8"):
        tabular.load_csv(binary, "y")
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        tabular.load_csv(tmp_path, "y")
