"""Torch archives: tensors come out, everything else is refused by name, damage is noticed."""

import pathlib
import pickle
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from models.torch_archive import TorchArchiveError, read_torch

# The few opcodes that torch.save writes, by hand: torch itself is not needed.
MARK, TUPLE, REDUCE, PERSID, BUILD, STOP = b"(", b"t", b"R", b"Q", b"b", b"."
DICT = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def items(*values: int) -> bytes:
    return MARK + b"".join(map(number, values)) + TUPLE


def tensor(key: str, kind: str, count: int, shape: tuple, strides: tuple, offset: int = 0) -> bytes:
    """A tensor as torch writes it: a view of the storage of that key."""
    storage = MARK + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    storage += number(count) + TUPLE + PERSID
    arguments = storage + number(offset) + items(*shape) + items(*strides) + b"\x89" + DICT
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + MARK + arguments + TUPLE + REDUCE


def archive(
    path: pathlib.Path, program: bytes, compression: int = zipfile.ZIP_STORED, **storages: Any
) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02" + program + STOP)
        file.writestr("x/byteorder", b"little")
        for key, values in storages.items():
            file.writestr(f"x/data/{key[1:]}", values.tobytes(), compression)
    return path


def test_tensors_in_containers(tmp_path: pathlib.Path) -> None:
    """A state dict with attributes, a transposed view, two tensors over one storage."""
    values = np.arange(12, dtype=np.float32)
    half = np.arange(3).astype(ml_dtypes.bfloat16)
    parameter = b"ctorch._utils\n_rebuild_parameter\n" + MARK
    parameter += tensor("1", "BFloat16Storage", 3, (3,), (1,)) + b"\x88" + DICT + TUPLE + REDUCE
    program = (
        DICT
        + MARK
        + (text("a") + tensor("0", "FloatStorage", 12, (3, 2), (1, 4), 1))
        + (text("b") + tensor("0", "FloatStorage", 12, (), (), 11))
        + (text("c") + parameter)
        + (text("d") + b"]" + MARK + number(-5) + b"N\x88" + text("é") + b"e")
        + (text("e") + b"ctorch\nSize\n" + items(2, 3) + b"\x85R")
        + (text("f") + tensor("0", "FloatStorage", 12, (0, 4), (4, 1)))
        + b"u"
        + (b"}" + text("_metadata") + DICT + b"s" + BUILD)
    )
    got = read_torch(archive(tmp_path / "a.pt", program, _0=values, _1=half))
    np.testing.assert_array_equal(got["a"], values.reshape(3, 4).T[1:4, :2])
    assert got["b"] == 11 and got["b"].shape == ()
    assert got["c"].dtype == ml_dtypes.bfloat16 and got["c"].tolist() == [0, 1, 2]
    assert got["d"] == [-5, None, True, "é"] and got["e"] == (2, 3)
    assert got["f"].shape == (0, 4)
    assert list(got) == list("abcdef")


def test_the_pickles_of_newer_protocols(tmp_path: pathlib.Path) -> None:
    value = {"a": [1, 2.5, (True, None, "x")], "b": b"bytes", "c": 2**40}
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", pickle.dumps(value, protocol=4))
    assert read_torch(path) == value


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (print, "builtins.print"),
        (pathlib.PurePosixPath("x"), "pathlib"),
        ({1, 2}, "EMPTY_SET|builtin.*set"),
        (np.float64(1.0), "numpy"),
        (1j, "builtin.*complex"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_are_refused_by_name(
    value: Any, named: str, protocol: int, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickle.dumps(value, protocol=protocol))
    named = named.replace("builtins", "(__builtin__|builtins)")
    with pytest.raises(TorchArchiveError, match=f"{named}.*only tensors"):
        read_torch(path)


@pytest.mark.parametrize("code", [b"cos\nsystem\n" + text("true") + b"\x85R", b"i__main__\nA\n"])
def test_code_is_refused_before_it_runs(code: bytes, tmp_path: pathlib.Path) -> None:
    with pytest.raises(TorchArchiveError, match=r"os\.system|opcode INST"):
        read_torch(archive(tmp_path / "a.pt", code))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (tensor("0", "FloatStorage", 12, (13,), (1,)), "beyond its storage"),
        (tensor("0", "FloatStorage", 12, (4,), (1,), 9), "beyond its storage"),
        (tensor("0", "FloatStorage", 12, (4,), (-1,), 9), "damaged"),
        (tensor("0", "FloatStorage", 12, (99,), (0,)), "expanded"),
        (tensor("0", "FloatStorage", 11, (2,), (1,)), "48 bytes and should have 44"),
        (tensor("7", "FloatStorage", 12, (2,), (1,)), "damaged"),
        (tensor("0", "QInt8Storage", 48, (2,), (1,)), "torch.QInt8Storage"),
        (MARK + number(1), "damaged"),
        (b"h\x05", "damaged"),
    ],
)
def test_damage_is_noticed(program: bytes, message: str, tmp_path: pathlib.Path) -> None:
    path = archive(tmp_path / "a.pt", program, _0=np.zeros(12, np.float32))
    with pytest.raises(TorchArchiveError, match=message):
        read_torch(path)


def test_compressed_storages_are_refused(tmp_path: pathlib.Path) -> None:
    program = tensor("0", "FloatStorage", 12, (12,), (1,))
    path = archive(tmp_path / "a.pt", program, zipfile.ZIP_DEFLATED, _0=np.zeros(12, np.float32))
    with pytest.raises(TorchArchiveError, match="compressed"):
        read_torch(path)


def test_other_files_are_told_apart(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.pt"):
        read_torch(tmp_path / "a.pt")
    old = tmp_path / "old.pt"
    old.write_bytes(pickle.dumps(1))
    with pytest.raises(TorchArchiveError, match=r"torch 1\.6"):
        read_torch(old)
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("a.txt", "a")
    with pytest.raises(TorchArchiveError, match=r"data\.pkl"):
        read_torch(other)
    whole = archive(tmp_path / "b.pt", tensor("0", "FloatStorage", 12, (12,), (1,)),
                    _0=np.zeros(12, np.float32))  # fmt: skip
    data = bytearray(whole.read_bytes())
    data[data.index(b"x/data/0") + 20] ^= 1  # one bit of the storage
    whole.write_bytes(data)
    with pytest.raises(TorchArchiveError, match="damaged"):
        read_torch(whole)
