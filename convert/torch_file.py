"""PyTorch's `.pth` and `.pt` files. The one place that needs torch.

Such a file is a pickle, and a pickle can run code: only `weights_only` loading is used, which knows tensors and plain
containers and refuses everything else.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from crcm_jax.convert.arrays import WIDTHS, Spec, raw
from crcm_jax.errors import UserError
from crcm_jax.saving.reading import refuse_pointer

_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
_SAFE = (2, 6)
"""Earlier releases could be made to run code in spite of `weights_only` (CVE-2025-32434)."""
_CARRIERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            ".pth and .pt files need PyTorch: pip install torch, or use .safetensors files, which do not"
        ) from None
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < _SAFE:
        raise UserError(f"torch {torch.__version__} does not load .pth files safely: install 2.6 or later")
    return torch


class Reader:
    """A file's content, mapped into memory and not read. `content` is as `torch.load` gives it."""

    def __init__(self, path: Path):
        refuse_pointer(path)
        torch = _torch()
        self._torch = torch
        try:
            self.content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise self._refusal(path, error) from None
        self._types = {getattr(torch, name): ours for ours, name in _NAMES.items() if hasattr(torch, name)}

    @staticmethod
    def _refusal(path: Path, error: Exception) -> UserError:
        text = str(error)
        if "weights_only" in text.lower() or "Weights only" in text or "Unsupported" in text:
            what = re.search(r"GLOBAL ([\w.]+)", text)
            named = f" ({what[1]})" if what else ""
            return UserError(
                f"{path} holds more than tensors{named}, and loading that could run code: refused; ask for a file of "
                f"weights alone, or a .safetensors file"
            )
        if "mmap can only be used" in text:
            return UserError(
                f"{path} is not a file that torch.save has written since PyTorch 1.6: save it again with torch.save, "
                f"or as .safetensors"
            )
        return UserError(f"{path} is not a whole PyTorch file: fetch it again or restore it from a copy")

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, self._torch.Tensor)

    def spec(self, name: str, tensor: Any) -> Spec:
        """UserError for types that no layout here has."""
        if tensor.dtype not in self._types or tensor.layout != self._torch.strided:
            raise UserError(f"{name} is of type {tensor.dtype}, {tensor.layout}: only dense plain tensors can be read")
        return Spec(self._types[tensor.dtype], tuple(tensor.shape))

    def read(self, tensor: Any) -> np.ndarray:
        """A copy of a tensor's raw elements; the file's pages behind it are given back."""
        dtype = self._types[tensor.dtype]
        carrier = getattr(self._torch, _CARRIERS[WIDTHS[dtype]])
        array = tensor.detach().contiguous().view(carrier).numpy().view(raw(dtype)).copy()
        _give_back(tensor)
        return array


def _give_back(tensor: Any) -> None:
    """Lets the system forget the pages of a mapped tensor that was copied: they would stay until the file is closed."""
    if not sys.platform.startswith("linux"):
        return
    page, forget = 4096, 4
    start = tensor.data_ptr()
    first = -(-start // page) * page
    length = (start + tensor.nbytes - first) // page * page
    if length > 0 and tensor.is_contiguous():
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), forget)


class _Forgetful:
    """The file that `torch.save` writes; now and then it lets the system forget the pages that were copied."""

    def __init__(self, file: BinaryIO, mapped: mmap.mmap):
        self._file, self._mapped, self._since = file, mapped, 0

    def write(self, data: Any) -> int:
        written = self._file.write(data)
        self._since += written
        if self._since > 64 << 20 and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)
            self._since = 0
        return written

    def flush(self) -> None:
        self._file.flush()


def require(specs: Mapping[str, Spec]) -> None:
    """UserError where PyTorch is not there, or is too old for one of the types that are to be written."""
    torch = _torch()
    for name, spec in specs.items():
        if not hasattr(torch, _NAMES[spec.dtype]):
            raise UserError(
                f"{name} is of type {spec.dtype}, which torch {torch.__version__} does not know: give --dtype, or a "
                "newer torch"
            )


def write(path: Path, parts: Path, starts: Mapping[str, int], specs: Mapping[str, Spec]) -> None:
    """Saves as `torch.save` does a dict of tensors whose bytes lie in file `parts`, at byte `starts[name]` each.

    They are mapped, not read: PyTorch copies them from file to file.
    """
    torch = _torch()
    state = {}
    with open(parts, "rb") as source, open(path, "wb") as target:
        mapped = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
        for name, spec in specs.items():
            carrier = np.dtype(_CARRIERS[WIDTHS[spec.dtype]])
            elements = int(np.prod(spec.shape, dtype=np.int64))
            array = np.frombuffer(mapped, carrier, elements, starts[name]) if elements else np.zeros(0, carrier)
            with warnings.catch_warnings():
                # Nobody writes into these tensors.
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                tensor = torch.from_numpy(array)
            state[name] = tensor.view(getattr(torch, _NAMES[spec.dtype])).reshape(spec.shape)
        torch.save(state, _Forgetful(target, mapped))
        target.flush()
        os.fsync(target.fileno())
