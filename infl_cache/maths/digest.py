"""Digests: what two samples, two models, two functions must share to count as the same."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# Names of the module that a function reads as settings; other objects there may change without changing what it does.
CONSTANTS = (bool, int, float, complex, str, bytes, tuple, frozenset, np.generic, Tensor)

# From this length on a tensor enters a digest condensed.
CONDENSED_BYTES = 256


def sample_digest(sample: Any) -> int:
    """64 bits over everything in a sample: tensors, arrays, numbers, text, pictures, nested.

    >>> sample_digest((torch.zeros(2), 1)) == sample_digest((torch.zeros(2), 1))
    True
    >>> sample_digest((torch.zeros(2), 1)) == sample_digest((torch.zeros(2), 2))
    False
    """
    hasher = hashlib.blake2b(digest_size=8)
    _feed(hasher, sample)
    return int.from_bytes(hasher.digest(), "little")


def row_digests(tensors: Sequence[Tensor]) -> NDArray[np.uint64]:
    """`sample_digest((t[i] for t in tensors))` of every row i, without taking the rows out one by one.

    >>> x, y = torch.randn(3, 4), torch.arange(3)
    >>> int(row_digests([x, y])[1]) == sample_digest((x[1], y[1]))
    True
    """
    size = len(tensors[0])
    columns: list[NDArray[np.uint8]] = [_repeated(f"L{len(tensors)}".encode(), size)]
    for tensor in tensors:
        rows = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(size, -1)
        columns.append(_repeated(f"T{tensor.dtype}{tuple(tensor.shape[1:])}".encode(), size))
        columns.append(_condensed(rows.view(torch.uint8).numpy() if rows.shape[1] else np.empty((size, 0), np.uint8)))
    together = np.concatenate(columns, axis=1)
    found = [hashlib.blake2b(row.data, digest_size=8).digest() for row in together]
    return np.frombuffer(b"".join(found), "<u8").astype(np.uint64)


def _repeated(text: bytes, size: int) -> NDArray[np.uint8]:
    return np.broadcast_to(np.frombuffer(text, np.uint8), (size, len(text)))


def _condensed(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Long rows of bytes as 64 bits each, and the bytes beyond a multiple of eight; short rows as they are.

    The 64 bits are the rows' words times fixed odd random weights, added up modulo 2^64 (multilinear hashing: Carter
    and Wegman 1979). Any change of one word changes them; it guards against accidents, not against somebody who looks
    for collisions. By `row_digests` it is 2 to 8 times as fast as blake2b row by row (medians, scripts/bench_store.py).
    """
    length = rows.shape[1] // 8
    if rows.shape[1] < CONDENSED_BYTES:
        return rows
    words = np.ascontiguousarray(rows[:, : 8 * length]).view("<u8")
    sums = (words @ _weights(length)).astype("<u8")
    return np.concatenate([sums.view(np.uint8).reshape(len(rows), 8), rows[:, 8 * length :]], axis=1)


@functools.lru_cache(maxsize=8)
def _weights(count: int) -> NDArray[np.uint64]:
    """Odd 64-bit numbers that look random: splitmix64 of 1, 2, ... (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def digest_of(values: Iterable[Any]) -> str:
    """A 128-bit digest over several values, as text."""
    hasher = hashlib.blake2b(digest_size=16)
    for value in values:
        _feed(hasher, value)
    return hasher.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """A digest over every parameter and buffer, saved with the model or not: name, type, shape and bits."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        hasher.update(name.encode())
        _feed(hasher, tensor)
    return hasher.hexdigest()


# Of functions that have been read, their code and text.
_TEXTS: MutableMapping[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def code_digest(function: Callable[..., Any] | None) -> str:
    """What a function does, as far as its text tells: source, defaults, what it closes over, the object it belongs to.

    Two lambdas of the same text are the same; a function whose source is not at hand goes by its name.
    """
    if function is None:
        return "default"
    hasher = hashlib.blake2b(digest_size=16)
    _feed_code(hasher, function, set())
    return hasher.hexdigest()


def _feed_code(hasher: Any, function: Any, seen: set[int]) -> None:
    if id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, functools.partial):
        _feed(hasher, (function.args, sorted(function.keywords.items())))
        _feed_code(hasher, function.func, seen)
    elif isinstance(function, nn.Module):
        _feed_module(hasher, function, seen)
    elif inspect.ismethod(function):
        if isinstance(function.__self__, nn.Module):
            _feed_module(hasher, function.__self__, seen)
        else:
            _feed(hasher, function.__self__)
        _feed_code(hasher, function.__func__, seen)
    elif not inspect.isroutine(function) and not isinstance(function, type):
        _feed(hasher, function)
        _feed_code(hasher, type(function).__call__, seen)
    else:
        _feed_function(hasher, inspect.unwrap(function), seen)


def _feed_module(hasher: Any, module: nn.Module, seen: set[int]) -> None:
    """Weights, plain attributes and code of a module, whether it is in train or eval mode."""
    hasher.update(weights_digest(module).encode())
    for name, each in module.named_modules():
        plain = {key: value for key, value in vars(each).items() if key[0] != "_" and key != "training"}
        _feed(hasher, (name, type(each).__qualname__, dict(sorted(plain.items()))))
        _feed_code(hasher, type(each).forward, seen)


def _feed_function(hasher: Any, function: Any, seen: set[int]) -> None:
    hasher.update(_text_of(function).encode())
    _feed(hasher, (getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)))
    for cell in getattr(function, "__closure__", None) or ():
        try:
            _feed_used(hasher, cell.cell_contents, seen)
        except ValueError:  # a closed-over name that is not bound yet
            continue
    used = getattr(getattr(function, "__code__", None), "co_names", ())
    names = getattr(function, "__globals__", {})
    for name in used:
        value = names.get(name)
        own = getattr(value, "__module__", None) == getattr(function, "__module__", "")
        if isinstance(value, CONSTANTS) or (own and inspect.isfunction(value)):
            hasher.update(name.encode())
            _feed_used(hasher, value, seen)


def _feed_used(hasher: Any, value: Any, seen: set[int]) -> None:
    """Something that a function uses: code by what it does, anything else by what it holds."""
    if callable(value):
        _feed_code(hasher, value, seen)
    else:
        _feed(hasher, value)


def _text_of(function: Any) -> str:
    """A function's source without comments and layout; its name where the source is not at hand.

    Read once: what a process runs stays as it is, whatever becomes of the file.
    """
    code = getattr(function, "__code__", None)
    if code is None:
        return _text_read(function)
    known = _TEXTS.get(function)
    if known is None or known[0] is not code:
        known = _TEXTS[function] = (code, _text_read(function))
    return known[1]


def _text_read(function: Any) -> str:
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a lambda in the middle of a call
        return text
    lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    if getattr(function, "__name__", "") == "<lambda>" and lambdas:
        return "\n".join(ast.unparse(node) for node in lambdas)
    return ast.unparse(tree)


def _feed(hasher: Any, value: Any, inside: tuple[int, ...] = ()) -> None:
    """Add `value` to the digest with its type and shape, so that nothing runs into its neighbour.

    `inside` are the ids of what holds it: an object that leads back to itself ends there.
    """
    if id(value) in inside:
        hasher.update(b"R")
        return
    within = (*inside, id(value))
    if isinstance(value, Tensor):
        kind = "" if value.layout == torch.strided else str(value.layout)
        dense = (value.detach().to_dense() if kind else value.detach()).cpu().resolve_conj().resolve_neg().contiguous()
        hasher.update(f"T{value.dtype}{tuple(value.shape)}{kind}".encode())
        hasher.update(_condensed(dense.reshape(1, -1).view(torch.uint8).numpy()).data if dense.numel() else b"")
    elif isinstance(value, np.ndarray) and value.dtype != object:
        hasher.update(f"A{value.dtype.str}{value.shape}".encode())
        hasher.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8) if value.size else b"")
    elif isinstance(value, (bool, int, float, complex, str, bytes, np.generic)) or value is None:
        hasher.update(f"V{type(value).__name__}{value!r};".encode())
    elif isinstance(value, Mapping):
        hasher.update(f"M{len(value)}".encode())
        for key in value:
            _feed(hasher, key, within)
            _feed(hasher, value[key], within)
    elif isinstance(value, (list, tuple, np.ndarray)):
        hasher.update(f"L{len(value)}".encode())
        for each in value:
            _feed(hasher, each, within)
    elif isinstance(value, (set, frozenset)):
        hasher.update(f"S{len(value)}".encode())
        for digest in sorted(map(sample_digest, value)):
            hasher.update(digest.to_bytes(8, "little"))
    elif hasattr(value, "__array__") or hasattr(value, "__array_interface__"):  # pictures and the like
        _feed(hasher, np.asarray(value))
    else:
        _feed_object(hasher, value, within)


def _feed_object(hasher: Any, value: Any, within: tuple[int, ...]) -> None:
    """Any other object by what it holds, never by where it lives."""
    hasher.update(f"O{type(value).__qualname__}".encode())
    slots = [name for kind in type(value).__mro__ for name in _names(getattr(kind, "__slots__", ()))]
    held = {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots if hasattr(value, name)}}
    if held:
        _feed(hasher, dict(sorted(held.items())), within)
    elif callable(value):
        hasher.update(getattr(value, "__qualname__", "").encode())
    elif "__repr__" in {name for kind in type(value).__mro__[:-1] for name in vars(kind)}:
        hasher.update(repr(value).encode())


def _names(slots: str | Iterable[str]) -> list[str]:
    """Names of slots that hold data."""
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]
