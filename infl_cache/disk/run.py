"""The run folder: manifest, ledger and lock together, and the order in which a block becomes a fact."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.codecs import Codec, planned_codec
from infl_cache.disk.configuration import as_yaml
from infl_cache.disk.durable import DISK_FULL, disk_full_is_said, make_folders, remove, write_atomically
from infl_cache.disk.growth import begin_growth, check_metadata, finish_growth
from infl_cache.disk.inside import refuse_links
from infl_cache.disk.layout import ArrayLayout, Block, samples_of, span_blocks
from infl_cache.disk.ledger import BlockRecord, FileRecord, Ledger, done_in
from infl_cache.disk.lock import only_writer
from infl_cache.disk.manifest import Identity, Manifest, differences, fingerprint
from infl_cache.disk.store import Store, check_file, create_store, record_of_chunk, record_of_file
from infl_cache.disk.sweep import CHILDREN, OUTPUTS, forget_unbegun, refuse_other_folders, remove_leftovers
from infl_cache.errors import BadInput, DamagedStore, ForeignRun, IncompleteStore

Force = bool | Literal["all"]


class RunFolder:
    """One folder RUN: `manifest.json`, `ledger.sqlite`, `run.yaml` and the stores."""

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_links(path, only_run=True)
        self.manifest = Manifest.read(path / "manifest.json")
        # What run.yaml says, written when a stage begins or goes on: a killed run knows its options.
        self.configuration: Mapping[str, Any] = {}
        self._ledger: Ledger | None = None
        # Stages that `begin` will remove before it makes a new one.
        self._anew: tuple[str, ...] = ()

    @property
    def exists(self) -> bool:
        """Whether anything was ever written here."""
        return (self.path / "manifest.json").exists()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The only way to change the folder: made if missing, locked, its manifest read afresh."""
        refuse_other_folders(self.path)
        with disk_full_is_said(self.path):
            try:
                make_folders(self.path)
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise
                raise BadInput(f"{self.path}: cannot be a run folder: {error.strerror}; use another --run") from error
            refuse_links(self.path, None)
            with only_writer(self.path):
                self.manifest = Manifest.read(self.path / "manifest.json")
                self._ledger = Ledger(self.path / "ledger.sqlite")
                try:
                    self._refuse_lost_manifest(self._ledger)
                    remove_leftovers(self.path)
                    try:
                        yield
                    finally:
                        if not self.exists:
                            forget_unbegun(self.path)
                finally:
                    self._ledger.close()
                    self._ledger = None

    def _refuse_lost_manifest(self, ledger: Ledger) -> None:
        """Work without the manifest that says what it belongs to is neither used nor removed."""
        if not self.exists and any(ledger.done(stage) for stage in OUTPUTS):
            raise DamagedStore(
                f"{self.path / 'manifest.json'}: expected the identity of the blocks in the ledger, found no file;"
                " restore it, or use another --run"
            )

    def check(self, stage: str, task: Identity, identity: Identity, anew: Iterable[str] = ()) -> None:
        """Raise `ForeignRun` with every differing field unless what is done was made from these identities.

        `anew` are stages that are about to be started over. What was begun but has not one block is no claim.
        Options that other finished work was made with are compared too: none is ever silently ignored.
        """
        kept = [name for name in self.manifest.stages if name not in set(anew) and self.records(name)]
        found = differences(self.manifest.task or task, task) if kept else []
        if stage in kept:
            found += differences(self.manifest.stages[stage]["identity"], identity)
        for name in kept:
            chosen = self.manifest.stages[name].get("options", {}) if name != stage else {}
            asked = {key: self.configuration.get(key, value) for key, value in chosen.items()}
            found += [f"{each} ({name})" for each in differences(chosen, asked)]
        if found:
            raise ForeignRun(
                f"{self.path} belongs to another task or configuration: {'; '.join(found)}."
                f" Use another --run, or start this stage over with --force"
            )

    def claim(self, stage: str, task: Identity, identity: Identity, force: Force) -> dict[str, Any] | None:
        """The plan of `stage` as it was begun, or None if it has yet to begin (again).

        With `force` the stage and its children will be removed by `begin`, once the new ones have been tried;
        with `force="all"`, or in stage 1 for another task, everything will. The other stages refuse another task.
        Nothing is written: a stage that goes on does that once it has seen that its samples are the stored ones.
        """
        self._anew = (stage, *CHILDREN[stage]) if force else (stage,)
        if force == "all" or (force and stage == "grads" and differences(self.manifest.task or task, task)):
            self._anew = tuple(OUTPUTS)
        self.check(stage, task, identity, self._anew if force else ())
        entry = self.manifest.stages.get(stage)
        if force or entry is None or (not self.records(stage) and entry["identity"] != identity):
            return None
        plan: dict[str, Any] = entry["plan"]
        return plan

    def begin(self, stage: str, task: Identity, identity: Identity, plan: dict[str, Any]) -> None:
        """Write down what `stage` will be computed from and how its files are cut, before any of them."""
        self._drop_for(stage)
        self._enter(stage, task, identity, plan)

    def begin_store(
        self, stage: str, task: Identity, identity: Identity, plan: dict[str, Any],
        layouts: Iterable[ArrayLayout], codec: Codec,
    ) -> None:  # fmt: skip
        """`begin`, for a stage whose output is a zarr store: the empty store comes first, then the claim on it."""
        layouts = tuple(layouts)
        self._drop_for(stage)
        files = create_store(self.path / OUTPUTS[stage][0], layouts, codec)
        arrays = [dataclasses.asdict(layout) for layout in layouts]
        metadata = [dataclasses.asdict(file) for file in files]
        entry = {**plan, "arrays": arrays, "metadata": metadata, "codec": dataclasses.asdict(codec)}
        self._enter(stage, task, identity, entry)

    def _drop_for(self, stage: str) -> None:
        """Remove what the claim on `stage` said will be made anew."""
        anew, self._anew = self._anew, ()
        self.drop({stage, *(anew if stage in anew else ())})

    def drop(self, stages: Iterable[str]) -> None:
        """Forget stages and remove their files: first the claim, then the files, so a crash between lies not."""
        stages = tuple(stages)
        present = [stage for stage in stages if stage in self.manifest.stages]
        for stage in stages:
            self._writable.clear(stage)
            self.manifest.stages.pop(stage, None)
        if present:
            self._write_manifest()
        remove(self.path / name for stage in stages for name in OUTPUTS[stage])

    def store(self, stage: str, mode: str = "r") -> Store:
        """The stage's zarr store, after its metadata files have been compared with the manifest."""
        refuse_links(self.path, OUTPUTS[stage])
        if mode == "r+":
            self._finish_growth(stage)
        try:
            check_metadata(self.path, self.plan(stage))
        except DamagedStore:
            # To a reader the store may have grown since the manifest was read.
            before, self.manifest = self.manifest, Manifest.read(self.path / "manifest.json")
            if self._ledger is not None or self.manifest == before:
                raise
            check_metadata(self.path, self.plan(stage))
        plan = self.plan(stage)
        codec = planned_codec(plan, mode == "r+", self.path, stage)
        return Store(self.path / OUTPUTS[stage][0], self.array_layouts(stage), mode, codec)

    def grow(self, stage: str, n_rows: int, **facts: Any) -> None:
        """Give the stage's store at least `n_rows` rows, and its plan the facts that speak of them."""
        self._finish_growth(stage)
        begin_growth(self.path, self.plan(stage), n_rows)
        self.write_configuration()
        self.remember(stage, n_rows=n_rows, **facts)
        self._finish_growth(stage)

    def _finish_growth(self, stage: str) -> None:
        if finish_growth(self.path, self.plan(stage)):
            self._write_manifest()

    def array_layouts(self, stage: str) -> tuple[ArrayLayout, ...]:
        """The arrays of the stage's store as they were laid out."""
        return tuple(ArrayLayout.from_json(each) for each in self.plan(stage)["arrays"])

    def plan(self, stage: str) -> dict[str, Any]:
        """The plan a stage was begun with; `IncompleteStore` if it was not."""
        if stage not in self.manifest.stages:
            raise IncompleteStore(
                f"{self.path}: expected the stage {stage}, found it not begun; run infl-cache {stage.replace('_', '-')}"
            )
        plan: dict[str, Any] = self.manifest.stages[stage]["plan"]
        return plan

    def remember(self, stage: str, **facts: Any) -> None:
        """Add facts to a stage's plan: found out while it ran, and good to know when it is carried on."""
        self.plan(stage).update(facts)
        self._write_manifest()

    def fingerprint(self, stage: str) -> str:
        """The fingerprint of a stage's identity, for the identity of the stages that hang on it."""
        return str(self.manifest.stages[stage]["fingerprint"]) if stage in self.manifest.stages else "not begun"

    def stage_blocks(self, stage: str) -> tuple[Block, ...]:
        """All blocks of a stage, done or not."""
        plan = self.plan(stage)
        try:
            return span_blocks(plan.get("spans", [[0, plan["n_rows"]]]), plan["block_rows"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedStore(f"{self.path / 'manifest.json'}: the plan of {stage} is damaged ({error})") from error

    def samples(self, stage: str) -> NDArray[np.int64]:
        """Which sample each row of the stage's store belongs to; -1 for rows between two spans, which hold none."""
        return samples_of(self.plan(stage))

    def records(self, stage: str) -> dict[int, BlockRecord]:
        """What the ledger says of `stage`, by block, without a look at the files.

        Raises `DamagedStore` if a record's rows are not those of the stage's plan.
        """
        ledger = self.path / "ledger.sqlite"
        found = self._ledger.done(stage) if self._ledger is not None else done_in(ledger, stage)
        planned = {block.index: (block.start, block.stop) for block in self.stage_blocks(stage)} if found else {}
        for index, record in found.items():
            if planned.get(index) != (record.start, record.stop):
                raise DamagedStore(
                    f"{self.path}: {stage} block {index}: expected rows {planned.get(index)} by the manifest, found"
                    f" {(record.start, record.stop)} in the ledger; restore both, or start over with --force"
                )
        return found

    def done(self, stage: str) -> dict[int, BlockRecord]:
        """The blocks of `stage` that are done: in the ledger, and their files have that size and checksum."""
        records = self.records(stage)
        for record in records.values():
            self.check_block(record)
        return records

    def check_block(self, record: BlockRecord) -> None:
        """Raise `DamagedStore` that names file and rows unless the block's files are as committed."""
        for file in record.files:
            check_file(self.path, file, record_of_chunk, f" (rows {record.start} to {record.stop - 1})")

    def require_complete(self, stage: str) -> dict[int, BlockRecord]:
        """The records of a finished stage; `IncompleteStore` with the figures if it is not."""
        total, records = self.stage_blocks(stage), self.records(stage)
        if len(records) < len(total):
            raise IncompleteStore(
                f"{self.path}: expected {stage} to be finished, found {len(records)} of {len(total)} blocks;"
                f" run infl-cache {stage.replace('_', '-')} first"
            )
        return records

    def commit(
        self, stage: str, block: Block, files: Iterable[FileRecord], seconds: float, digest: str = "",
        nonfinite: int = 0, bad_rows: Iterable[int] = (),
    ) -> BlockRecord:  # fmt: skip
        """Make a block whose files are already synced a fact."""
        record = BlockRecord(
            stage, block.index, block.start, block.stop, digest, nonfinite, tuple(bad_rows), seconds, time.time(),
            tuple(files),
        )  # fmt: skip
        self._writable.commit(record)
        return record

    def forget(self, stage: str, blocks: Iterable[int]) -> None:
        """Make blocks of a stage no facts any more: durable when this returns, before anything is made of them."""
        self._writable.forget(stage, blocks)

    def record_file(self, name: str) -> FileRecord:
        """Size and checksum of a file of the folder."""
        return record_of_file(self.path, self.path / name)

    @property
    def _writable(self) -> Ledger:
        if self._ledger is None:
            raise RuntimeError("the folder is changed only inside `with folder.writing()`")
        return self._ledger

    def _enter(self, stage: str, task: Identity, identity: Identity, plan: dict[str, Any]) -> None:
        self.manifest.task = task
        # `test` of an identity is the test set, the option of that name a choice of its samples.
        chosen = identity.keys() - {"test"} if stage in ("grads", "stest") else ()
        self.manifest.stages[stage] = {
            "identity": identity,
            "fingerprint": fingerprint({"task": task, "stage": identity}),
            "options": {key: self.configuration[key] for key in chosen if key in self.configuration},
            "plan": plan,
        }
        self.write_configuration()
        self._write_manifest()

    def _write_manifest(self) -> None:
        self.manifest.write(self.path / "manifest.json")

    def write_configuration(self) -> None:
        """Keep the resolved configuration in a form that runs again as it is."""
        write_atomically(self.path / "run.yaml", as_yaml(self.configuration))
