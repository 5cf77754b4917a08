"""Text files as editors on several systems save them."""

import pytest

from s3net_common.errors import InputError
from s3net_common.images import read_class_names
from s3net_common.text_files import read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_class_names_are_read_whatever_the_editor(tmp_path, encoding, line_end):
    file = tmp_path / "classes.txt"
    file.write_bytes(line_end.join(["château", "dog\tn02084071", "", "tree"]).encode(encoding))
    assert read_class_names(file) == ["château", "dog", "tree"]


@pytest.mark.parametrize("content", [b"\x89PNG\xff", "café".encode("latin-1"), "a\nb".encode("utf-16-le")])
def test_no_text(tmp_path, content):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "classes.txt")
    with pytest.raises(InputError, match=r"classes.txt cannot be read \(it is no text in UTF-8\): pass a text file"):
        read_class_names(tmp_path / "classes.txt")
