"""The house stands: imports point down, each foreign library has one door, and nothing on disk is ever run."""

import ast
from pathlib import Path

import pytest

import infl_cache.errors

PACKAGE = Path(infl_cache.errors.__file__).parent
GROUND = ("errors", "progress", "config", "interrupt", "heap", "processor")
ROOF = (
    "infl_cache.stages", "infl_cache.reading", "infl_cache.pipeline", "infl_cache.arguments", "infl_cache.__main__",
    "infl_cache.ptif", "infl_cache.plotting", "infl_cache.selecting", "infl_cache.trusted", "infl_cache.pages",
)  # fmt: skip
MOST_LINES = 300

# What only the disk column does with files, by the name a call has in the source.
FILE_CALLS = {
    "open", "io.open", "os.open", "os.replace", "os.rename", "os.remove", "os.unlink", "os.mkdir", "os.makedirs",
    "os.rmdir", "os.fsync", "os.write", "os.pwrite", "os.truncate", "os.link", "os.symlink", "torch.save", "torch.load",
    "np.save", "np.savez", "np.load", "np.memmap", "np.fromfile", "np.savetxt", "np.loadtxt",
}  # fmt: skip
FILE_METHODS = {
    "open", "read_text", "read_bytes", "write_text", "write_bytes", "touch", "mkdir", "rmdir", "unlink", "symlink_to",
    "hardlink_to", "tofile",
}  # fmt: skip
FILE_MODULES = {"zarr", "sqlite3", "shutil", "tempfile", "mmap", "h5py", "filelock"}
RUNS_CODE = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


class Module:
    """One source file: what it imports, by absolute name, and what it calls."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.lines = source.count("\n") + (not source.endswith("\n"))
        tree = ast.parse(source)
        self.imports: set[str] = set()
        self.from_root: set[str] = set()
        self.calls: list[tuple[str, ast.Call]] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self.imports |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                self.imports |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
                if base == "infl_cache":
                    self.from_root |= {alias.name for alias in node.names}
            if isinstance(node, ast.Call):
                self.calls.append((ast.unparse(node.func), node))
        if any(each == "infl_cache" for node in ast.walk(tree) if isinstance(node, ast.Import) for each in names(node)):
            self.from_root.add("infl_cache")

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.name.endswith(".__init__")
        base = self.name.removesuffix(".__init__").split(".")
        up = node.level - is_package
        return ".".join([*base[: len(base) - up], *([node.module] if node.module else [])])

    def uses(self, *packages: str) -> bool:
        """Whether any import is one of `packages` or lies in it."""
        return any(each == package or each.startswith(f"{package}.") for each in self.imports for package in packages)

    def within(self, *packages: str) -> bool:
        """Whether this module is one of `packages` or lies in it."""
        return any(self.name == each or self.name.startswith(f"{each}.") for each in packages)


def names(node: ast.Import) -> list[str]:
    return [alias.name for alias in node.names]


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(each.value) for each in call.keywords if each.arg == name), None)


def touches_files(module: Module) -> bool:
    """Whether a module opens, writes, moves or removes files itself."""
    called = any(
        name in FILE_CALLS or (isinstance(call.func, ast.Attribute) and call.func.attr in FILE_METHODS)
        for name, call in module.calls
    )
    return called or module.uses(*FILE_MODULES)


def runs_what_it_reads(module: Module) -> bool:
    """Whether a module could run code that lies in a file it reads as data."""
    for name, call in module.calls:
        if keyword(call, "allow_pickle") not in (None, "False"):
            return True
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "torch.save"):
            return True
        if name == "torch.load" and keyword(call, "weights_only") != "True":
            return True
    return module.uses(*RUNS_CODE)


def read_modules() -> list[Module]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join([PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts])
        found.append(Module(name, path.read_text(encoding="utf-8")))
    return found


MODULES = read_modules()
DISK = [module for module in MODULES if module.within("infl_cache.disk")]
MATHS = [module for module in MODULES if module.within("infl_cache.maths")]


def offenders(modules, *, unless=(), **rule):
    (test,) = rule.values()
    return [module.name for module in modules if not module.within(*unless) and test(module)]


def test_both_columns_are_looked_at():
    assert {"infl_cache.disk.store", "infl_cache.disk.codecs", "infl_cache.disk.run"} <= {each.name for each in DISK}
    assert {"infl_cache.maths.task", "infl_cache.maths.params"} <= {each.name for each in MATHS}


def test_the_disk_column_knows_nothing_of_torch_or_maths():
    assert offenders(DISK, rule=lambda each: each.uses("torch", "torchvision", "infl_cache.maths")) == []


def test_the_maths_column_knows_nothing_of_zarr_or_disk_and_opens_no_files():
    assert offenders(MATHS, rule=lambda each: each.uses("zarr", "numcodecs", "infl_cache.disk")) == []
    assert offenders(MATHS, rule=touches_files) == []


def test_no_column_knows_what_stands_on_it():
    assert offenders(DISK + MATHS, rule=lambda each: each.uses(*ROOF)) == []


def test_the_stages_know_nothing_of_the_roof():
    stages = [module for module in MODULES if module.within("infl_cache.stages")]
    assert offenders(stages, rule=lambda each: each.uses(*ROOF[1:])) == []


def test_the_ground_rests_on_nothing_but_itself():
    ground = [module for module in MODULES if module.within(*(f"infl_cache.{each}" for each in GROUND))]
    assert {module.name.split(".")[1] for module in ground} == set(GROUND)
    above = ("infl_cache.disk", "infl_cache.maths", *ROOF, "torch", "zarr")
    assert offenders(ground, rule=lambda each: each.uses(*above)) == []


def test_nobody_imports_the_package_root_but_for_its_version_in_the_options():
    allowed = {"infl_cache.arguments": {"__version__"}}
    assert [(each.name, each.from_root) for each in MODULES if each.from_root - allowed.get(each.name, set())] == []


@pytest.mark.parametrize(
    ("library", "doors"),
    [
        ("zarr", ("infl_cache.disk.store", "infl_cache.disk.codecs")),
        ("tqdm", ("infl_cache.progress",)),
        ("jsonargparse", ("infl_cache.arguments", "infl_cache.__main__")),
        ("filelock", ("infl_cache.disk.lock",)),
        ("sqlite3", ("infl_cache.disk",)),
        ("matplotlib", ("infl_cache.stages.figures.canvas",)),
        ("pyarrow", ("infl_cache.stages.export.parquet",)),
        ("xarray", ("infl_cache.stages.export.named",)),
    ],
)
def test_a_foreign_library_has_one_door(library, doors):
    assert offenders(MODULES, unless=doors, rule=lambda each: each.uses(library)) == []
    assert any(module.uses(library) for module in MODULES if module.within(*doors))


def test_nothing_that_is_read_is_ever_unpickled_or_run():
    assert offenders(MODULES, rule=runs_what_it_reads) == []


def test_no_module_outgrows_its_room():
    assert {module.name: module.lines for module in MODULES if module.lines > MOST_LINES} == {}


def test_there_is_no_room_without_a_purpose():
    rooms = [part for module in MODULES for part in module.name.split(".")]
    assert [room for room in rooms if room in ("utils", "util", "helpers", "common", "misc")] == []


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("import torch.nn as nn", "torch"),
        ("from torch import nn", "torch"),
        ("def f():\n    import torch", "torch"),
        ("from infl_cache import maths", "infl_cache.maths"),
        ("from ..maths import task", "infl_cache.maths"),
        ("from .. import maths", "infl_cache.maths"),
        ("from infl_cache.maths.task import Task", "infl_cache.maths.task"),
    ],
)
def test_an_import_is_found_however_it_is_written(source, package):
    assert Module("infl_cache.disk.store", source).uses(package)
    assert not Module("infl_cache.disk.store", "import torchlike, infl_cache.mathsy").uses(package)


@pytest.mark.parametrize(
    "source", ["import infl_cache", "from infl_cache import Run", "from .. import Run", "import infl_cache as i"]
)
def test_an_import_of_the_root_is_found(source):
    assert Module("infl_cache.disk.store", source).from_root
    assert not Module("infl_cache.disk.store", "import infl_cache.errors").from_root


@pytest.mark.parametrize(
    "source",
    [
        "open('x')",
        "os.replace(a, b)",
        "Path('x').read_text()",
        "path.open()",
        "np.save(f, x)",
        "from shutil import move",
    ],
)
def test_touching_files_is_found(source):
    assert touches_files(Module("infl_cache.maths.task", source))
    assert not touches_files(Module("infl_cache.maths.task", "name.replace('a', 'b'); text.split()"))


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=flag)",
     "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(f, Loader=x)", "eval(text)"],
)  # fmt: skip
def test_running_what_is_read_is_found(source):
    assert runs_what_it_reads(Module("infl_cache.disk.store", source))
    assert not runs_what_it_reads(Module("infl_cache.disk.store", "np.load(f, allow_pickle=False); model.eval()"))
