"""Text files as editors on several systems save them."""

import pytest

from s3net_common.images import read_class_names
from s3net_common.text_files import read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_class_names_are_read_whatever_the_editor(tmp_path, encoding, line_end):
    file = tmp_path / "classes.txt"
    file.write_bytes(line_end.join(["château", "dog\tn02084071", "", "tree"]).encode(encoding))
    assert read_class_names(file) == ["château", "dog", "tree"]


def test_no_text(tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "classes.txt")
