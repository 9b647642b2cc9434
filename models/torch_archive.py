"""Reading torch archives (``.pt``, ``.pth``) without torch and without running what they hold.

Such a file is a zip of raw storages and one pickle that says how tensors lie in them. The pickle
is a program; here it is interpreted by a stack machine that knows tensors, numbers, text and plain
containers and nothing else, so that every other opcode or global is refused by its name.
"""

import dataclasses
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_STORAGES: dict[str, Any] = {
    "torch DoubleStorage": np.float64,
    "torch FloatStorage": np.float32,
    "torch HalfStorage": np.float16,
    "torch BFloat16Storage": ml_dtypes.bfloat16,
    "torch LongStorage": np.int64,
    "torch IntStorage": np.int32,
    "torch ShortStorage": np.int16,
    "torch CharStorage": np.int8,
    "torch ByteStorage": np.uint8,
    "torch BoolStorage": np.bool_,
    "torch ComplexFloatStorage": np.complex64,
    "torch ComplexDoubleStorage": np.complex128,
}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_DICT = "collections OrderedDict"
_SIZE = "torch Size"
_CALLABLE = (_TENSOR, _PARAMETER, _DICT, _SIZE)


class TorchArchiveError(ValueError):
    """A torch archive that is damaged, or holds more than tensors and plain containers."""


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name that the pickle mentions; it is never looked up."""

    name: str


class _Mark:
    """Where a run of items on the stack begins."""


def read_torch(path: str | Path) -> Any:
    """What ``torch.save`` wrote: tensors as numpy arrays within dicts, lists and tuples.

    Parameters come as their data, ``bfloat16`` as ``ml_dtypes.bfloat16``, dicts of any kind as
    plain dicts. Everything is copied into memory.

    Raises:
        FileNotFoundError: there is no such file.
        TorchArchiveError: it is no zip archive of torch (files of torch before 1.6 are none), it
            is damaged, or it holds objects: a whole module, for one, whose ``state_dict()`` can be
            saved and read instead.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    if not zipfile.is_zipfile(path):
        raise TorchArchiveError(
            f"{path.name} is not a zip archive of torch: save it again with torch 1.6 or later, "
            "or download it again if it is cut off."
        )
    with _clear_damage(path), zipfile.ZipFile(path) as archive:
        pickles = [n for n in archive.namelist() if n == "data.pkl" or n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise TorchArchiveError(
                f"{path.name} has {len(pickles)} entries data.pkl in place of one: it is not a "
                "file that torch.save wrote."
            )
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in archive.namelist():
            raise TorchArchiveError(
                f"{path.name} is a TorchScript program: save the state_dict() of its module."
            )
        order = f"{prefix}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise TorchArchiveError(f"{path.name} was written on a big-endian machine.")
        return _Machine(path.name, archive, prefix).run(archive.read(pickles[0]))


@contextmanager
def _clear_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except TorchArchiveError:
        raise
    except (zipfile.BadZipFile, EOFError, KeyError, IndexError, TypeError, ValueError) as error:
        raise TorchArchiveError(
            f"{path.name} is damaged ({type(error).__name__}: {error}): get it again."
        ) from error


class _Machine:
    """One run of a pickle over the storages of its archive."""

    def __init__(self, name: str, archive: zipfile.ZipFile, prefix: str):
        self.name, self.archive, self.prefix = name, archive, prefix
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, np.ndarray] = {}

    def run(self, program: bytes) -> Any:
        """The object that the pickle describes."""
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                (result,) = self.stack
                return result
            operation = _OPERATIONS.get(opcode.name)
            if operation is None:
                raise self.refusal(f"the opcode {opcode.name}")
            operation(self, argument)
        raise EOFError("the pickle has no end")

    def refusal(self, what: str) -> TorchArchiveError:
        """The error about something that is neither a tensor nor a plain container."""
        return TorchArchiveError(
            f"{self.name} holds {what}, and only tensors, numbers, text and plain containers are "
            "read: save the tensors alone, of a module its state_dict()."
        )

    def since_mark(self) -> list[Any]:
        """Takes the items above the last mark, and the mark."""
        for i in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[i], _Mark):
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise IndexError("no mark on the stack")

    def name_global(self, name: str) -> None:
        """Push a global's name, if it is one that is known."""
        if name not in _CALLABLE and name not in _STORAGES:
            raise self.refusal(f"the object {name.replace(' ', '.')}")
        self.stack.append(_Global(name))

    def call(self) -> None:
        """Apply one of the four known functions."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or function.name not in _CALLABLE:
            raise self.refusal(f"a call of {function!r}")
        if function.name == _TENSOR:
            self.stack.append(self.tensor(*arguments[:4]))
        elif function.name == _PARAMETER:
            self.stack.append(arguments[0])
        elif function.name == _SIZE:
            self.stack.append(tuple(arguments[0]))
        else:
            self.stack.append(dict(*arguments))

    def build(self) -> None:
        """Attributes of a dict, as a ``state_dict`` has: they are left out."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise self.refusal("attributes of an object")

    def storage(self) -> None:
        """A storage in place of its persistent id."""
        kind, dtype, key, _, count = self.stack.pop()
        if kind != "storage" or not isinstance(dtype, _Global) or dtype.name not in _STORAGES:
            raise self.refusal(f"the persistent object {kind!r}")
        if key not in self.storages:
            entry = self.archive.getinfo(f"{self.prefix}data/{key}")
            item = np.dtype(_STORAGES[dtype.name])
            # Torch does not compress; what does may be far larger than the file.
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"storage {key} is compressed")
            if entry.file_size != count * item.itemsize:
                raise ValueError(
                    f"storage {key} has {entry.file_size} bytes and should have "
                    f"{count * item.itemsize}"
                )
            self.storages[key] = np.frombuffer(self.archive.read(entry), item)
        self.stack.append(self.storages[key])

    def tensor(
        self, storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> np.ndarray:
        """A copy of a view of a storage; all that it reads is checked to lie inside."""
        if not isinstance(storage, np.ndarray):
            raise TypeError("a tensor without a storage")
        if len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
            raise ValueError(f"a tensor of shape {shape} and strides {strides} at {offset}")
        if 0 in shape:
            return np.zeros(shape, storage.dtype)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if last >= storage.size:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
        size = 1
        for n in shape:
            size *= n
        if size > storage.size:
            raise self.refusal(
                f"an expanded tensor of shape {shape} over a storage of {storage.size}"
            )
        steps = tuple(s * storage.itemsize for s in strides)
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _make(factory: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(factory())


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    def build(machine: _Machine, _: Any) -> None:
        items = [machine.stack.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(items)))

    return build


def _set_items(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, dict):
        raise TypeError("items of something that is no dict")
    target.update(zip(items[::2], items[1::2], strict=True))


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, list):
        raise TypeError("items of something that is no list")
    target.extend(items)


def _pop(machine: _Machine, count: int) -> list[Any]:
    items = machine.stack[-count:]
    del machine.stack[-count:]
    return items


def _stack_global(machine: _Machine, _: Any) -> None:
    module, name = _pop(machine, 2)
    machine.name_global(f"{module} {name}")


def _memoize(machine: _Machine, index: int | None) -> None:
    machine.memo[len(machine.memo) if index is None else index] = machine.stack[-1]


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    **dict.fromkeys(
        (
            "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
            "BINBYTES", "SHORT_BINBYTES",
        ),
        _push,
    ),
    "NONE": _make(lambda: None),
    "NEWTRUE": _make(lambda: True),
    "NEWFALSE": _make(lambda: False),
    "MARK": _make(_Mark),
    "EMPTY_DICT": _make(dict),
    "EMPTY_LIST": _make(list),
    "EMPTY_TUPLE": _make(tuple),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "SETITEM": lambda machine, _: _set_items(machine, _pop(machine, 2)),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.since_mark()),
    "APPEND": lambda machine, _: _append(machine, _pop(machine, 1)),
    "APPENDS": lambda machine, _: _append(machine, machine.since_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _memoize),
    **dict.fromkeys(
        ("BINGET", "LONG_BINGET"), lambda machine, i: machine.stack.append(machine.memo[i])
    ),
    "GLOBAL": lambda machine, name: machine.name_global(name),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.storage(),
}  # fmt: skip
