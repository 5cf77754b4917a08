"""Checks a PyTorch pickle before it is loaded: how much memory its tensors take, and kinds that are not supported.

`torch.load(weights_only=True)` runs no code from a file, but it allocates whatever size the file gives. The functions
here read a pickle's instructions without executing them.
"""

import pickletools
from collections.abc import Iterator
from typing import IO

from s3net_common.errors import InputError

# Globals of torch.load's safe list that allocate a size given in the file.
REFUSED_GLOBALS = {
    "torch._utils _rebuild_qtensor": "quantized weights: save the state dict of the network before its quantization",
    "builtins bytearray": "raw bytes: save a plain state dict",
    "__builtin__ bytearray": "raw bytes: save a plain state dict",
}
ITEM_BYTES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    "ComplexDoubleStorage": 16,
}
_LITERALS = {"GLOBAL", "NONE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING"}
_LITERALS |= {"SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"}


def check_storages(pickle: IO[bytes] | bytes, records: dict[str, int] | int) -> None:
    """Check that a pickle's tensors need no more memory than the file has bytes for.

    Args:
        pickle: one pickle of a `torch.save` file.
        records: bytes of each storage in the file by its key, or of the whole file if it does not list them.

    Raises:
        InputError: the pickle contains a kind of tensor that is not supported.
        ValueError: the pickle is damaged, or a storage is larger than its record.
    """
    sizes: dict[str, int] = {}
    for key, size in _storages(pickle):
        limit = records if isinstance(records, int) else records.get(key, -1)
        if not 0 <= size <= limit:
            raise ValueError(f"storage {key!r} of {size:,} bytes is larger than the file")
        sizes[key] = size
    if isinstance(records, int) and sum(sizes.values()) > records:
        raise ValueError("its tensors are larger than the file")


def _storages(pickle: IO[bytes] | bytes) -> Iterator[tuple[str, int]]:
    """Yield key and bytes of each storage: `("storage", <type>, key, device, count[, view])` before a BINPERSID.

    Each part of such a tuple has to be a literal or a reference to one, as `torch.save` writes it.
    """
    memo: dict[int, object] = {}
    parts: list[object] = []  # since the last MARK
    value: object = None
    for opcode, argument, _ in pickletools.genops(pickle):
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = value
            continue
        if name in ("GET", "BINGET", "LONG_BINGET"):
            value = memo.get(argument)
        else:
            value = argument if name in _LITERALS else None
        if name == "GLOBAL" and value in REFUSED_GLOBALS:
            raise InputError(REFUSED_GLOBALS[value])
        if name == "BINPERSID":
            yield _storage(parts)
        parts = [] if name == "MARK" else [*parts[-8:], value]


def _storage(parts: list[object]) -> tuple[str, int]:
    if len(parts) not in (6, 7) or parts[-1] is not None:  # the last part is the instruction TUPLE
        raise ValueError("a storage is not written as torch.save writes it")
    word, kind, key, _, count = parts[:5]
    if word != "storage" or not isinstance(kind, str) or not isinstance(key, str) or not isinstance(count, int):
        raise ValueError("a storage is not written as torch.save writes it")
    return key, count * ITEM_BYTES.get(kind.split(" ")[-1], 1)
