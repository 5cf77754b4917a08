"""Text files as editors and spreadsheets save them. Imports the standard library only."""

import codecs
from pathlib import Path


def read_text(path: Path) -> str:
    """Return a file's text, with a line feed at the end of each line, whatever the system that wrote it.

    The text is UTF-8, with or without a byte-order mark, or UTF-16 with one.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it has another encoding, or is no text.
    """
    content = Path(path).read_bytes()
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if utf_16 else "utf-8-sig")
    if "\0" in text:  # UTF-16 without a byte-order mark, or UTF-32
        raise UnicodeDecodeError("utf-8", content, 0, len(content), "zero bytes")
    return text.replace("\r\n", "\n").replace("\r", "\n")
