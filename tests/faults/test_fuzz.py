"""Every parser of outside input, given what nobody should write: an error of ours or a value, no traceback, no hang.

`pytest -s` shows the seed; `INFL_CACHE_SEED=17` repeats one.
"""

import contextlib
import json
import os
import random
import struct
from argparse import ArgumentError

import google_crc32c
import numpy as np
import pytest

from infl_cache.arguments import parser
from infl_cache.config import Options, SelectionOptions, option_fields, read_config_file
from infl_cache.disk.arrays import read_arrays
from infl_cache.disk.lines import read_lines
from infl_cache.disk.manifest import Manifest
from infl_cache.disk.matrix import MatrixFile
from infl_cache.disk.state import MAGIC, read_header, read_state, write_state
from infl_cache.errors import InflCacheError
from infl_cache.maths.load import load_task
from infl_cache.stages.plan import asked_of
from infl_cache.stages.selection import check_selection, parse_tests
from infl_cache.stages.validate import ValidateOptions
from infl_cache.stages.verify import part_of
from tests.faults import times
from tests.faults.test_hostile import limited

# In all: 10,000 in the long version.
INPUTS = times(60, 1250)
WORDS = [
    "", " ", "0", "-1", "1e400", "nan", "inf", "-inf", "0x10", "1_000", "10**9", "10^9", "1e-400", "9" * 5000, "٣", "½",
    "true", "null", "~", "[]", "{}", "[[[[", "{{", ":", "::", "0:", ":5", "::0", "::-1", "5:2", "0:1:1:1", "all", "ALL",
    "é", "\u202e", "\0", "\n", "\r\n", "\t", "'", '"', "\\", "`id`", "$(id)", "; rm -rf x", "../../x", "/etc/passwd",
    "!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!binary aGk=", "&a [*a]", "*a", "<<: 1",
    "a.py:f", "os:system", ":f", "a.py:", "a.b.c:d", "x" * 3000, "__import__('os')", "%s%s%n", "{0.__class__}",
    "GB", "1GB",
    "5%", "-5%", "7GB/s", "1e9TB", "lz4", "zstd", "cuda:99", "meta", "exact", "float8", "0,1,1,2", "1.5", "1,,2",
    "--", "-",
]  # fmt: skip
YAML = "task: a.py:f\nrun: runs/x\ndamping: 0.1\ntest: 0:8\nsolver: cg\nmemory: 4GB\n"
YAML += "task_args:\n  width: 3\nprogress: false\n"
TOML = 'task = "a.py:f"\ndamping = 0.1\nsolver = "cg"\n[task_args]\nwidth = 3\n'


@pytest.fixture
def chance():
    seed = int(os.environ.get("INFL_CACHE_SEED") or int.from_bytes(os.urandom(3), "little"))
    print(f"seed {seed}")
    return random.Random(seed)


def text_of(chance, valid):
    """A valid text with some pieces replaced, doubled, dropped or swapped; or words that never were one."""
    if chance.random() < 0.3:
        return "".join(chance.choice(WORDS) for _ in range(chance.randrange(1, 4)))
    pieces = list(valid)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(pieces) + 1)
        act = chance.randrange(4)
        if act == 0:
            pieces[at:at] = chance.choice(WORDS)
        elif act == 1:
            del pieces[at : at + chance.randrange(1, 12)]
        elif act == 2:
            pieces[at:at] = pieces[at : at + 20] * chance.randrange(1, 40)
        else:
            pieces[at : at + 1] = [chr(chance.randrange(1, 0x2FF))]
    return "".join(pieces)


def bytes_of(chance, valid):
    """Valid bytes with some flipped, cut, dropped or put in."""
    data = bytearray(valid)
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(data) + 1)
        act = chance.randrange(4)
        if act == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif act == 1:
            del data[at : at + chance.randrange(1, 30)]
        elif act == 2:
            data[at:at] = chance.randbytes(chance.randrange(1, 9))
        else:
            del data[at:]
    return bytes(data)


def survives(call, *given):
    """Whether a call gave a value or an error of ours; anything else fails the test."""
    try:
        call(*given)
    except InflCacheError as error:
        said = error
    else:
        return
    assert str(said).strip(), "an error without a word"
    assert len(str(said)) < 4000, "an error that repeats all of its input"
    assert said.exit_code in (2, 3, 4, 5, 6)


@pytest.mark.parametrize(("valid", "name"), [(YAML, "x.yaml"), (TOML, "x.toml")])
def test_configuration_files(valid, name, chance, tmp_path):
    file = tmp_path / name
    with limited(240):
        for _ in range(INPUTS):
            text = text_of(chance, valid)
            file.write_bytes(text.encode() if chance.random() < 0.8 else bytes_of(chance, text.encode()))
            survives(lambda: Options.resolve(read_config_file(file)))


def test_options_of_python(chance):
    names, values = (
        [name for name, _, _ in option_fields()],
        [*WORDS, None, -1, 0, 1.5, [], {}, b"x", (), 1 << 70, object()],
    )
    with limited(240):
        for _ in range(INPUTS):
            given = {chance.choice(names): chance.choice(values) for _ in range(chance.randrange(1, 4))}
            survives(Options.resolve, given)


def test_the_command_line(chance):
    flags = ["--" + name.replace("_", "-") for name, _, _ in option_fields()] + [
        "--task",
        "--run",
        "--task-args.x",
        "--n-train",
    ]
    commands = [
        "grads",
        "stest",
        "influence",
        "run",
        "plan",
        "validate",
        "status",
        "verify",
        "export",
        "report",
        "x",
        "",
    ]
    with limited(500):
        for _ in range(INPUTS // 4):
            line = [chance.choice(commands)]
            for _ in range(chance.randrange(4)):
                line += [chance.choice(flags), chance.choice(WORDS)][: chance.randrange(1, 3)]
            with contextlib.suppress(ArgumentError, InflCacheError, SystemExit):  # what `main` makes one line of
                parser().parse_args(line)


def test_words_of_single_options(chance, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = [
        lambda text: Options.resolve({"memory": text}),
        lambda text: parse_tests(text, 50),
        lambda text: check_selection(SelectionOptions(test=text), 50),
        part_of,
        lambda text: asked_of({"n_train": text, "disk": text}),
        lambda text: ValidateOptions.resolve({"test": text, "kind": text}),
        lambda text: load_task(text) if "os" not in text else None,
    ]
    with limited(240):
        for number in range(INPUTS):
            survives(
                calls[number % len(calls)], text_of(chance, chance.choice(["0:10,5,7", "5%", "10^9", "4GB", "a.py:f"]))
            )


def test_the_manifest(chance, tmp_path):
    file, manifest = tmp_path / "manifest.json", Manifest({"n_train": 3}, {})
    layout = {"path": "x", "n_rows": 9, "row_shape": [2], "dtype": "float32", "chunk_rows": 4, "chunk_row_shape": [2]}
    record = {"path": "g/zarr.json", "size": 3, "crc": 5}
    plan = {"n_rows": 9, "block_rows": 4, "arrays": [layout], "metadata": [record]}
    manifest.stages["grads"] = {"identity": {"form": "auto"}, "fingerprint": "x", "plan": plan, "options": {}}
    manifest.write(file)
    valid = file.read_bytes()
    with limited(240):
        for number in range(INPUTS):
            if number % 2:
                file.write_bytes(bytes_of(chance, valid))
            else:  # with a checksum that fits
                try:
                    content = json.loads(text_of(chance, valid.decode()))
                    stages, task = content["stages"], content["task"]
                    checksum = Manifest(task, stages).checksum()
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
                file.write_text(json.dumps({"format": 1, "checksum": checksum, "task": task, "stages": stages}))
            survives(Manifest.read, file)


def test_the_state_of_an_iteration(chance, tmp_path):
    file = tmp_path / "x.state"
    write_state(file, {"stage": "x"}, {"step": 3}, {"value": np.ones((2, 3)), "step": np.array(3)})
    valid = file.read_bytes()
    (length,) = struct.unpack("<Q", valid[len(MAGIC) : len(MAGIC) + 8])
    head, body = valid[len(MAGIC) + 8 : len(MAGIC) + 8 + length], valid[len(MAGIC) + 8 + length : -4]

    def read():
        header = read_header(file)
        if header is not None:
            read_state(file, header)

    with limited(240):
        for number in range(INPUTS):
            if number % 2:
                data = bytes_of(chance, valid)
            else:
                changed = text_of(chance, head.decode()).encode()
                data = MAGIC + struct.pack("<Q", len(changed)) + changed + body
                data += struct.pack("<I", google_crc32c.value(data))
            file.write_bytes(data)
            survives(read)


def test_matrices_and_arrays(chance, tmp_path):
    matrix, arrays = tmp_path / "x.npy", tmp_path / "x.npz"
    np.save(matrix, np.ones((4, 5), np.float32))
    np.savez(arrays, a=np.arange(5), b=np.ones((2, 2)))
    valid = matrix.read_bytes(), arrays.read_bytes()

    def head():
        MatrixFile(matrix).close()

    with limited(240):
        for number in range(INPUTS):
            if number % 2:
                matrix.write_bytes(bytes_of(chance, valid[0]))
                survives(head)
            else:
                arrays.write_bytes(bytes_of(chance, valid[1]))
                survives(read_arrays, arrays)


def test_lines_of_results(chance, tmp_path):
    file = tmp_path / "x.jsonl"
    valid = b'{"a": 1, "crc": 5}\n{"b": [1, 2]}\n'
    with limited(120):
        for _ in range(INPUTS):
            file.write_bytes(bytes_of(chance, valid))
            survives(lambda: list(read_lines(file)))
