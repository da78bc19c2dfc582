"""What the disk tests share: a small run, child processes that need no torch, and folders nobody may write to."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import infl_cache.errors
from infl_cache.disk.codecs import Codec
from infl_cache.disk.layout import ArrayLayout, Block, blocks
from infl_cache.disk.run import RunFolder

# The package root imports torch; the disk column does not need it, and a child without it starts at once.
PRELUDE = """
import sys, types
root = types.ModuleType("infl_cache")
root.__path__ = [sys.argv.pop(1)]
sys.modules["infl_cache"] = root
"""


@pytest.fixture
def start_child():
    """`start(code, *arguments)`: a child process with pipes for stdin and stdout, killed when the test ends."""
    children = []

    def start(code: str, *arguments: object) -> subprocess.Popen:
        package = str(Path(infl_cache.errors.__file__).parent)
        command = [sys.executable, "-c", PRELUDE + code, package, *map(str, arguments)]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def nobody_writes():
    """`with nobody_writes() as (folder, seal)`: `seal()` takes every right to write in `folder`, also from root."""

    @contextlib.contextmanager
    def sealed():
        # Not below tmp_path, whose parents only their owner may enter.
        folder = Path(tempfile.mkdtemp())
        folder.chmod(0o755)

        def seal() -> None:
            for path in [folder, *folder.rglob("*")]:
                path.chmod(0o555 if path.is_dir() else 0o444)
            try:
                if os.geteuid() == 0:
                    os.seteuid(65534)
                os.listdir(folder)
            except OSError:
                pytest.skip("nobody cannot enter the folder for temporary files here")

        try:
            yield folder, seal
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
            for path in [folder, *folder.rglob("*")]:
                path.chmod(0o755 if path.is_dir() else 0o644)
            shutil.rmtree(folder)

    return sealed


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes, but for the lock and what SQLite keeps beside an open ledger."""
    passing = (".lock", "ledger.sqlite-")
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(passing)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(name="contents")
def contents_fixture():
    return contents


@dataclass(frozen=True)
class Sample:
    """A stage of ten rows in blocks of four: arrays of several kinds, several chunk files a block."""

    task: dict[str, Any] = field(default_factory=lambda: {"weights": "aa11", "n_train": 10, "loss": "bb22"})
    identity: dict[str, Any] = field(default_factory=lambda: {"form": "auto", "damping": 0.01})
    plan: dict[str, Any] = field(default_factory=lambda: {"n_rows": 10, "block_rows": 4})
    codec: Codec = field(default_factory=lambda: Codec("lz4", 5))
    layouts: tuple[ArrayLayout, ...] = (
        ArrayLayout("dense", 10, (5,), "float32", 2, (3,)),
        ArrayLayout("layer/input", 10, (2, 3), "float64", 4, (2, 3)),
        ArrayLayout("digest", 10, (), "uint64", 4, ()),
    )

    @property
    def blocks(self) -> tuple[Block, ...]:
        return blocks(self.plan["n_rows"], self.plan["block_rows"])

    def data(self, block: Block) -> dict[str, Any]:
        rng = np.random.default_rng(block.index)
        shapes = {each.path: (block.rows, *each.row_shape) for each in self.layouts}
        return {
            "dense": rng.standard_normal(shapes["dense"]).astype(np.float32),
            "layer/input": rng.standard_normal(shapes["layer/input"]),
            "digest": rng.integers(1, 2**63, shapes["digest"], dtype=np.uint64),
        }

    def begin(self, folder: RunFolder, stage: str = "grads") -> None:
        folder.begin_store(stage, self.task, self.identity, self.plan, self.layouts, self.codec)

    def commit(self, folder: RunFolder, *blocks: Block, stage: str = "grads") -> None:
        store = folder.store(stage, "r+")
        for block in blocks:
            folder.commit(
                stage, block, store.write_block(block, self.data(block)), seconds=0.5, digest=f"d{block.index}"
            )

    def make(self, path: Path, n_blocks: int = 3) -> RunFolder:
        """A run folder with the stage grads begun and its first `n_blocks` blocks committed."""
        folder = RunFolder(path)
        with folder.writing():
            self.begin(folder)
            self.commit(folder, *self.blocks[:n_blocks])
        return folder

    def assert_intact(self, folder: RunFolder, *indices: int) -> None:
        """The blocks `indices` are done, and no others, and hold what was put in."""
        assert sorted(folder.done("grads")) == sorted(indices)
        store = folder.store("grads")
        for index in indices:
            read = store.read_block(self.blocks[index])
            for path, values in self.data(self.blocks[index]).items():
                np.testing.assert_array_equal(read[path], values, strict=True)


@pytest.fixture
def sample() -> Sample:
    return Sample()
