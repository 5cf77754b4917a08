"""Files that are not used as images: why, how many, and the messages about them."""

import re
import stat
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from s3net_common.errors import InputError, printable
from s3net_common.launcher import is_first_rank

LISTED = 20  # unreadable images that a message names
FIRST_NAMES = 3  # names listed for each reason to leave files out

# ---- Names and contents ---------------------------------------------------------------------------------------------

HEIC = "HEIC images, which need the package pillow-heif"
AVIF = "AVIF images, which need a newer Pillow"
NEEDED_PACKAGES = {  # by suffix, if Pillow does not read it
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), HEIC),
    **dict.fromkeys((".avif", ".avifs"), AVIF),
}
# Names, in lower case, of what operating systems, NAS systems and archive programs leave in folders.
SYSTEM_FOLDERS = {
    *(
        "@eadir",
        "@tmp",
        "@sharebin",
        "@recycle",
        "@recently-snapshot",
        "@__thumb",
        "#recycle",
        "#snapshot",
        "~snapshot",
    ),
    *("network trash folder", "temporary items", "thefindbycontentfolder", "thevolumesettingsfolder", "~snapshot"),
    *("$recycle.bin", "recycler", "system volume information", "found.000", "lost.dir", "lost+found", "__macosx"),
    *("_vti_cnf", "__pycache__"),
}
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}

HTML = "an HTML page instead of an image, perhaps the error page of a download"
NO_RASTER = "{}, which has no pixels: export it as PNG"
DAMAGED = "a damaged or truncated {} file, or one of a kind that Pillow cannot read"
CONTENTS = {  # regular expressions for the first bytes, in lower case
    rb"version https://git-lfs": "a pointer of Git LFS instead of the image: run git lfs pull",
    rb"(<!--.*?-->\s*)?<(!doctype html|html|head|body)": HTML,
    rb"(<\?xml.*?>\s*)?(<!--.*?-->\s*)?(<!doctype svg.*?>\s*)?<svg": NO_RASTER.format("an SVG drawing"),
    rb"<\?xml": "an XML file",
    rb"%!ps|\xc5\xd0\xd3\xc6": NO_RASTER.format("a PostScript file"),
    rb"%pdf": NO_RASTER.format("a PDF file"),
    rb"8bps": "a Photoshop file: export it as PNG",
    rb"pf\s|p7\s": "a PFM image in colour or a PAM image, which Pillow cannot read: save it as PNG",
    rb"pk\x03\x04": "a ZIP archive",
    rb"\x1f\x8b": "a gzip archive",
    rb"\xff\xd8": DAMAGED.format("JPEG"),
    rb"\x89png": DAMAGED.format("PNG"),
    rb"gif8[79]a": DAMAGED.format("GIF"),
    rb"bm.{4}\0\0\0\0": DAMAGED.format("BMP"),
    rb"ii[*+]\0|mm\0[*+]": DAMAGED.format("TIFF"),
    rb"riff.{4}webp": DAMAGED.format("WebP"),
    rb"\xff\x0a|\0\0\0\x0cjxl ": "a JPEG XL image, which Pillow cannot read: save it as JPEG or PNG",
    rb".{4}ftyp.{0,20}avi[fs]": "an AVIF image that is damaged, truncated or needs a newer Pillow",
    rb".{4}ftyp.{0,24}(hei[cxms]|hev[cx]|mi[af]1|msf1)": "a HEIC image, which needs the package pillow-heif",
    rb".{4}ftyp": "a video",
}


def describe_content(start: bytes) -> str:
    """Return what a file is that Pillow does not take for an image, by its first bytes (some kilobytes)."""
    if not start.strip(b"\0"):
        return "only zeros, perhaps an interrupted copy" if start else "the file is empty"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    for pattern, content in CONTENTS.items():
        if re.match(pattern, text.lower(), re.DOTALL):
            return content
    if len(start) < 12:
        return f"only {len(start)} B long, perhaps an interrupted copy"
    line = (text.decode("utf-8", "replace").splitlines() or [""])[0]
    if line and line.isprintable() and "\ufffd" not in line:
        return f"a text file that begins with {line[:40]!r}"
    return "none of the image formats that are read: save it as JPEG or PNG"


def read_start(file: Path, size: int = 4096) -> bytes:
    """Return the first bytes of a file.

    Raises:
        OSError: it cannot be read; `strerror` says why.
    """
    if file.is_symlink() and not file.exists():
        raise OSError(0, "the link's target is missing")
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(0, "no regular file")
    with file.open("rb") as opened:
        return opened.read(size)


# ---- Messages -----------------------------------------------------------------------------------------------------


def report(line: str) -> None:
    """Print a line to stderr; of several distributed ranks, only the first one does."""
    if is_first_rank():
        print(line, file=sys.stderr, flush=True)


class UnreadableImage(InputError):
    """An image file that cannot be decoded.

    Attributes:
        name: name of the file, printable.
        reason: why it cannot be decoded.
    """

    def __init__(self, name: str | Path, reason: str) -> None:
        super().__init__(name, reason)  # as in the signature, so that a DataLoader worker can pickle it
        self.name, self.reason = printable(name), reason

    def __str__(self) -> str:
        return f"{self.name} cannot be read as an image ({self.reason}): remove or repair it, or pass --skip-unreadable"


def unreadable_images(errors: Sequence[InputError]) -> InputError:
    """Return one error for all images that cannot be read."""
    if len(errors) == 1:
        return errors[0]
    return InputError(
        f"{len(errors):,} images cannot be read: {_name_all(errors)}; remove or repair them, or pass --skip-unreadable"
    )


def report_unreadable(errors: Sequence[InputError], folder: Path) -> None:
    """Print how many images of a folder were left out because they cannot be read, with names and reasons."""
    if errors:
        report(f"left out of {printable(folder)}: unreadable images: {len(errors):,} ({_name_all(errors)})")


def report_once(errors: Sequence[InputError], reported: set[str]) -> None:
    """Print the images that were left out because they cannot be read, except those in `reported`, and add them."""
    new = [error for error in errors if str(error) not in reported]
    reported.update(map(str, new))
    if new:
        report(f"left out, unreadable: {_name_all(new)}")


def _name_all(errors: Sequence[InputError]) -> str:
    names = [f"{e.name} ({e.reason})" if isinstance(e, UnreadableImage) else str(e) for e in errors[:LISTED]]
    return ", ".join(names) + (f" and {len(errors) - LISTED:,} more" if len(errors) > LISTED else "")


class Skipped:
    """The files that a listing leaves out, by reason.

    Args:
        folder: names are relative to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: dict[str, int] = defaultdict(int)
        self.names: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, path: Path) -> None:
        """Count a file or folder. The reason is a plural, as in "hidden files"."""
        self.counts[reason] += 1
        if len(self.names[reason]) < FIRST_NAMES:
            self.names[reason].append(printable(path.relative_to(self.folder)))

    def __str__(self) -> str:
        parts = []
        for reason, count in self.counts.items():
            more = ", ..." if count > FIRST_NAMES else ""
            parts.append(f"{reason}: {count:,} ({', '.join(self.names[reason])}{more})")
        return "; ".join(parts)

    def report(self) -> None:
        """Print the reasons with the number of files and their first names, in one line, if there are any."""
        if self.counts:
            report(f"left out of {printable(self.folder)}: {self}")
