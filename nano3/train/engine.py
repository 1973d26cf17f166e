"""torch.distributed.checkpoint, told what a rank owns and how a file looks.

The planners hand it the boxes that `nano3.model.layout.pieces` finds; the storage writes and reads them as
`storage.py` says.  What remains torch's: exchanging the plans, checking that the boxes tile every tensor, matching the
boxes that are wanted with those that were saved, and telling all ranks of a failure on one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from nano3.model.layout import Piece
from nano3.parallel.mesh import Mesh
from nano3.train.storage import (
    Chunk,
    Container,
    FileRecord,
    Item,
    Progress,
    commit,
    make_folder,
    manifest_of,
    sweep,
    temporary_folder,
    write_file,
)

Shares = dict[str, list[Piece]]


def write(final: Path, shares: Shares, progress: Progress, extra: dict[str, str], mesh: Mesh) -> None:
    """Write a checkpoint of all ranks' pieces (CPU tensors).  extra: small text files beside them.

    Raises CheckpointException, with the cause, on every rank if one of them fails; the checkpoint is then absent.
    """
    with _quiet():
        dcp.save(
            {},  # the planner knows
            storage_writer=_Writer(final, progress, extra),
            planner=_SavePlanner(shares),
            process_group=mesh.host,
            no_dist=mesh.host is None,
        )


def read(container: Container, shares: Shares, mesh: Mesh) -> None:
    """Fill the pieces' tensors.  Raises CheckpointException on every rank if one of them fails."""
    with _quiet():
        dcp.load(
            {key: found[0].tensor for key, found in shares.items()},
            storage_reader=_Reader(container),
            planner=_LoadPlanner(shares),
            process_group=mesh.host,
            no_dist=mesh.host is None,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _box(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape)


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, shares: Shares) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {(p.key, torch.Size(p.offsets)): p for found in shares.values() for p in found}

    def create_local_plan(self) -> SavePlan:
        items = []
        for (key, offsets), p in self.pieces.items():
            about = TensorWriteData(_box(p), TensorProperties.create_from_tensor(p.tensor), p.shape)
            items.append(WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=about))
        self.plan = SavePlan(items)
        return self.plan

    def piece(self, item: WriteItem) -> Piece:
        return self.pieces[item.index.fqn, item.index.offset]


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, shares: Shares) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.shares = shares

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for key, found in self.shares.items():
            about = self.metadata.state_dict_metadata[key]
            items += create_read_items_for_chunk_list(key, about, [_box(p) for p in found])
        return LoadPlan(items)

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        """The part of a piece that the item fills."""
        piece = self.shares[item.dest_index.fqn][item.dest_index.index]
        return _part(piece.tensor, item.dest_offsets, item.lengths)


def _part(x: Tensor, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    return x[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]


@dataclass(frozen=True)
class _Stored:
    """What a rank reports of one written item."""

    file: str
    record: FileRecord
    item: Item


class _Writer(StorageWriter):
    """One file a rank, under a temporary name; the first rank makes it a checkpoint when all are done."""

    def __init__(self, final: Path, progress: Progress, extra: dict[str, str]) -> None:
        self.final, self.temporary = final, temporary_folder(final)
        self.progress, self.extra = progress, extra

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:  # before any other rank has its plan, and so before it writes
            sweep(self.final.parent)
            make_folder(self.temporary)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            SavePlan(plan.items, storage_data=f"rank-{i:05d}.safetensors", planner_data=plan.planner_data)
            for i, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        items = []
        for w in plan.items:
            p = planner.piece(w)
            shapes = (tuple(p.shape), tuple(p.offsets), tuple(p.tensor.shape))
            items.append(Item(p.key, p.tensor.dtype, *shapes, data=lambda p=p: [p.tensor]))
        if not items:
            done.set_result([])
            return done
        file = plan.storage_data
        record = write_file(self.temporary / file, items)
        results = []
        for w, item in zip(plan.items, items, strict=True):
            about = Item(item.key, item.dtype, item.shape, item.offsets, item.chunk, data=list)  # without the data
            results.append(WriteResult(w.index, item.bytes, _Stored(file, record, about)))
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        for name, text in self.extra.items():
            (self.temporary / name).write_text(text)
        written: dict[str, tuple[FileRecord, list[Item]]] = {}
        for result in (r for rank in results for r in rank):
            stored = result.storage_data
            written.setdefault(stored.file, (stored.record, []))[1].append(stored.item)
        commit(self.temporary, self.final, manifest_of(self.progress, written))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _Reader(StorageReader):
    def __init__(self, container: Container) -> None:
        self.container = container

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors, where = {}, {}
        for key, entry in self.container.entries.items():
            boxes = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in entry.chunks]
            properties = TensorProperties(dtype=entry.dtype)
            tensors[key] = TensorStorageMetadata(properties, torch.Size(entry.shape), boxes)
            where |= {MetadataIndex(key, torch.Size(c.offsets)): c for c in entry.chunks}
        return Metadata(tensors, storage_data=where)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.where: dict[MetadataIndex, Chunk] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            saved = self.container.chunk(item.storage_index.fqn, self.where[item.storage_index])
            planner.resolve_tensor(item).copy_(_part(saved, item.storage_offsets, item.lengths))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
