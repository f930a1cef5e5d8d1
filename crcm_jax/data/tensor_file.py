"""PyTorch's files of a single tensor, read and written without PyTorch.

Such a file is a zip archive: `data.pkl`, a pickle that says how to rebuild the tensor, and the bytes of its storage. A
pickle is a program and can run anything; here none is run. Its opcodes are followed by hand, only those that
`torch.save` writes for a dense tensor are known, and only three names may be called for: the tensor's rebuilding, its
storage's type, and the empty dictionary of its hooks. Everything else is refused.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
import zlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from crcm_jax.errors import UserError
from crcm_jax.saving.reading import pointer

_TYPES = {
    "Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16, "Long": np.int64,
    "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
}  # fmt: skip
_STORAGES = {f"torch {name}Storage": np.dtype(dtype) for name, dtype in _TYPES.items()}
_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
_REBUILD, _HOOKS = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"

_ROOT = "archive"
_ALIGNMENT = 64  # bytes; what torch.save keeps to, so that files can be mapped into memory
_LONGEST_PROGRAM = 64 << 10
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
_MARK = object()


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    elements: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool
    hooks: dict


class _Foreign(Exception):
    """The program calls for something that a plain tensor has no need of."""


class _Torn(Exception):
    """The file contradicts itself."""


def loads(content: bytes, name: str) -> np.ndarray:
    """The tensor in a file's `content`, in PyTorch's axes, read-only, its memory the content's own where it can be.

    The archive's checksums are verified, so a flipped bit is found. `name` is how messages call the file. UserError if
    it holds anything but one dense tensor, is of the format before PyTorch 1.6, or is not whole.
    """
    told = pointer(content)
    if told:
        raise UserError(f"{name} {told}")
    if content.startswith(_LEGACY):
        raise UserError(
            f"{name} is not a file that torch.save has written since PyTorch 1.6: save it again with torch.save"
        )
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        entries = {entry.filename: entry for entry in archive.infolist()}
        root = next((path.partition("/")[0] for path in entries if path.endswith("/data.pkl")), _ROOT)

        def part(name: str, default: bytes | None = None) -> memoryview:
            if f"{root}/{name}" in entries:
                return _bytes_of(content, entries[f"{root}/{name}"])
            if default is None:
                raise _Torn(f"it lacks {name}")
            return memoryview(default)

        program = bytes(part("data.pkl"))
        if len(program) > _LONGEST_PROGRAM:
            raise _Foreign("a long program")
        if bytes(part("byteorder", b"little")) != b"little":
            raise _Foreign("big-endian numbers")
        tensor = _follow(program)
        return _view(tensor, part(f"data/{tensor.storage.key}"))
    except _Foreign as error:
        raise UserError(
            f"{name} holds more than a tensor ({error}), and loading that could run code: refused; "
            "save a plain tensor with torch.save"
        ) from None
    # What a zip archive or a pickle that was cut, altered or never one leads to.
    except (_Torn, zipfile.BadZipFile, StopIteration, LookupError, ValueError, TypeError, struct.error,
            NotImplementedError, OverflowError, AttributeError) as error:  # fmt: skip
        raise UserError(f"{name} is not a whole PyTorch file ({error or type(error).__name__})") from None


def _bytes_of(content: bytes, entry: zipfile.ZipInfo) -> memoryview:
    """An entry's bytes where they lie, their checksum verified."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise _Torn(f"{entry.filename} is compressed or encrypted")
    start = entry.header_offset
    if content[start : start + 4] != b"PK\x03\x04":
        raise _Torn(f"{entry.filename} has no header")
    start += 30 + sum(struct.unpack_from("<HH", content, start + 26))
    data = memoryview(content)[start : start + entry.file_size]
    if len(data) != entry.file_size:
        raise _Torn(f"{entry.filename} is cut off")
    if zlib.crc32(data) != entry.CRC:
        raise _Torn(f"{entry.filename} has altered bytes")
    return data


def _follow(program: bytes) -> _Tensor:
    """What a pickle of protocol 2 that only builds a tensor says of it."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop(count: int) -> list[Any]:
        if count > len(stack):
            raise _Torn("its program is not whole")
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    argument: Any
    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" if argument == 2:
                pass
            case "GLOBAL":
                if argument not in (_REBUILD, _HOOKS, *_STORAGES):
                    raise _Foreign(argument.replace(" ", "."))
                stack.append(_STORAGES.get(argument, argument))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "MARK":
                stack.append(_MARK)
            case "TUPLE":
                since = next(i for i in reversed(range(len(stack))) if stack[i] is _MARK)
                items = tuple(pop(len(stack) - since)[1:])
                stack.append(items)
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(0 if opcode.name == "EMPTY_TUPLE" else int(opcode.name[-1]))))
            case "BINPERSID":
                stack.append(_storage(*pop(1)))
            case "REDUCE":
                stack.append(_call(*pop(2)))
            case "STOP":
                break
            case other:
                raise _Foreign(f"opcode {other}")
    if len(stack) != 1 or not isinstance(stack[0], _Tensor):
        raise _Foreign("no tensor by itself")
    return stack[0]


def _storage(identity: Any) -> _Storage:
    kind, dtype, key, _, elements = identity
    if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str) or type(elements) is not int:
        raise _Foreign("an unknown storage")
    return _Storage(dtype, key, elements)


def _call(function: Any, arguments: Any) -> Any:
    if function == _HOOKS and arguments == ():
        return {}
    whole = isinstance(arguments, tuple) and len(arguments) == 6 and isinstance(arguments[0], _Storage)
    if function == _REBUILD and whole and arguments[5] == {}:
        return _Tensor(*arguments)
    raise _Foreign("an unusual tensor")


def _view(tensor: _Tensor, data: memoryview) -> np.ndarray:
    storage, offset, shape, strides, *_ = tensor
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise _Torn("its shape is impossible")
    if len(data) != storage.elements * storage.dtype.itemsize:
        raise _Torn(f"its storage has {len(data)} bytes for {storage.elements} elements of {storage.dtype}")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
    if math.prod(shape) and last >= storage.elements:
        raise _Torn("its shape reaches past its storage")
    if not math.prod(shape):
        return np.zeros(shape, storage.dtype)
    flat = np.frombuffer(data, storage.dtype)[offset:]
    steps = [stride * storage.dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)


def dumps(array: np.ndarray) -> bytes:
    """The file that `torch.load`, `weights_only` too, reads as this tensor. The same array gives the same bytes.

    UserError for element types that PyTorch does not have.
    """
    # Not ascontiguousarray, which gives a scalar an axis.
    array = np.asarray(array, order="C")
    if array.dtype not in _NAMES:
        raise UserError(f"an array of {array.dtype} cannot be saved for PyTorch")
    strides = tuple(stride // array.itemsize for stride in array.strides)
    program = b"".join(
        [
            b"\x80\x02", _global(_REBUILD), b"((", _text("storage"), _global(_NAMES[array.dtype]), _text("0"),
            _text("cpu"), _integer(array.size), b"tQ", _integer(0), _tuple(array.shape), _tuple(strides), b"\x89",
            _global(_HOOKS), b")RtR.",
        ]
    )  # fmt: skip
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        parts = {"data.pkl": program, "byteorder": b"little", "data/0": array.tobytes(), "version": b"3\n"}
        for name, content in parts.items():
            entry = zipfile.ZipInfo(f"{_ROOT}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            gap = -(file.tell() + 30 + len(entry.filename) + 4) % _ALIGNMENT
            entry.extra = struct.pack("<2sH", b"FB", gap) + b"Z" * gap
            archive.writestr(entry, content)
    return file.getvalue()


def _global(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
