"""Megatron's format: its own files read back, ours have its bytes, and every malformed one is refused by place."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from nano3.config import UserError
from nano3.data.indexed import CODES, TABLES, IndexedDataset, IndexedWriter, token_dtype

FIXTURES = Path(__file__).parent / "fixtures"  # written by IndexedDatasetBuilder of megatron-core 0.16.1
DTYPES = ["uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"]
DOCUMENTS = [[(37 * k + 11 * j + 5) % 120 for j in range(3 * k + 1)] for k in range(5)] + [[7, 8, 9, 1, 2]]


def write(prefix: Path, dtype: str = "int32") -> Path:
    with IndexedWriter(prefix, dtype) as w:
        for document in DOCUMENTS[:-1]:
            w.add(document)
        w.add(DOCUMENTS[-1], lengths=[3, 2])
    return prefix


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_of_megatron_core_read_back(dtype: str) -> None:
    data = IndexedDataset(FIXTURES / f"megatron_{dtype}")
    assert data.dtype == np.dtype(dtype)
    assert (len(data), data.documents) == (7, 6)
    assert [data[i].tolist() for i in range(7)] == [*DOCUMENTS[:-1], [7, 8, 9], [1, 2]]
    assert [data.tokens[slice(*data.span(d))].tolist() for d in range(6)] == DOCUMENTS
    assert data.document_starts(0, 6).tolist() == np.cumsum([0, *map(len, DOCUMENTS)]).tolist()
    assert data.document_starts(2, 4).tolist() == np.cumsum([0, *map(len, DOCUMENTS)])[2:5].tolist()
    assert not data.tokens.flags.writeable


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_files_are_megatrons_byte_for_byte(dtype: str, tmp_path: Path) -> None:
    write(tmp_path / "ours", dtype)
    for suffix in (".bin", ".idx"):
        ours, theirs = tmp_path / f"ours{suffix}", FIXTURES / f"megatron_{dtype}{suffix}"
        assert ours.read_bytes() == theirs.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["ours.bin", "ours.idx"]  # no temporary is left


def test_modes_of_multimodal_files() -> None:
    data = IndexedDataset(FIXTURES / "megatron_modes")
    assert data.modes.tolist() == [0, 1]
    assert [data[i].tolist() for i in range(2)] == [[0, 1, 2, 3], [4, 5]]
    assert IndexedDataset(FIXTURES / "megatron_int32").modes is None


def test_sequences_without_documents_are_documents(tmp_path: Path) -> None:
    raw = (FIXTURES / "megatron_int32.idx").read_bytes()  # what add_item without end_document leaves behind
    (tmp_path / "a.idx").write_bytes(raw[:26] + struct.pack("<Q", 1) + raw[34 : 34 + 12 * 7] + struct.pack("<q", 0))
    (tmp_path / "a.bin").write_bytes((FIXTURES / "megatron_int32.bin").read_bytes())
    data = IndexedDataset(tmp_path / "a")
    assert (len(data), data.documents) == (7, 7)
    assert data.tokens[slice(*data.span(6))].tolist() == [1, 2]


def test_empty_files_and_empty_documents(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "none", "uint16"):
        pass
    assert IndexedDataset(tmp_path / "none").documents == 0
    with IndexedWriter(tmp_path / "gaps", "uint16") as w:
        for document in ([], [1], [], [2, 3], []):
            w.add(document)
    data = IndexedDataset(tmp_path / "gaps")
    assert [data.tokens[slice(*data.span(d))].tolist() for d in range(5)] == [[], [1], [], [2, 3], []]


def test_what_travels_to_a_worker_is_the_name(tmp_path: Path) -> None:
    data = IndexedDataset(write(tmp_path / "a"))
    assert len(raw := pickle.dumps(data)) < 300
    assert np.array_equal(pickle.loads(raw).tokens, data.tokens)


def test_an_exception_leaves_the_old_files_and_no_others(tmp_path: Path) -> None:
    write(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def write_too_wide() -> None:
        with IndexedWriter(tmp_path / "a", "uint16") as w:
            w.add([1, 2])
            w.add(np.array([3, 70000]))

    with pytest.raises(UserError, match="uint16 cannot hold"):
        write_too_wide()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("ids", "lengths"), [([-1], None), ([1, 2], [1]), ([1, 2], [3]), ([1], [])])
def test_a_document_that_cannot_be_stored_is_refused(ids: list[int], lengths: list | None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="document 0"), IndexedWriter(tmp_path / "a", "uint16") as w:
        w.add(np.array(ids), lengths)


def test_types_without_a_code_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="uint32 have no code"):
        IndexedWriter(tmp_path / "a", "uint32")


def test_the_type_of_ids_is_megatrons_choice() -> None:
    assert [token_dtype(v) for v in (256, 65499, 65500, 131072)] == ["<u2", "<u2", "<i4", "<i4"]


# --- malformed pairs: each must be refused with the file's name, and the place where the damage is known


def refused(prefix: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as error:
        IndexedDataset(prefix)
    assert str(prefix) in str(error.value)


def damaged(tmp_path: Path, idx: bytes, ids: bytes) -> Path:
    (tmp_path / "bad.idx").write_bytes(idx)
    (tmp_path / "bad.bin").write_bytes(ids)
    return tmp_path / "bad"


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_missing_half_is_named(missing: str, tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    Path(f"{prefix}{missing}").unlink()
    refused(prefix, rf"a\{missing}: no such file")


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_a_pair_cut_anywhere_is_refused(dtype: str, tmp_path: Path) -> None:
    idx, ids = ((FIXTURES / f"megatron_{dtype}{s}").read_bytes() for s in (".idx", ".bin"))
    for cut in range(len(idx)):  # about 180 lengths
        refused(damaged(tmp_path, idx[:cut], ids), "byte ")
    for cut in range(len(ids)):
        refused(damaged(tmp_path, idx, ids[:cut]), "was cut off")
    refused(damaged(tmp_path, idx, ids + b"\0"), "appended to")
    for more in (1, 6, 8):  # 7 more would be the modes
        refused(damaged(tmp_path, idx + bytes(more), ids), "byte 18")


def test_a_wrong_byte_anywhere_is_refused(tmp_path: Path) -> None:
    idx, ids = ((FIXTURES / f"megatron_int32{s}").read_bytes() for s in (".idx", ".bin"))
    count = 0
    for at in range(len(idx)):
        for flip in (0x01, 0x80, 0xFF):
            raw = bytearray(idx)
            raw[at] ^= flip
            if at == 17 and CODES.get(raw[at], "").endswith("4"):
                continue  # float32 in place of int32 is another file, not a malformed one
            if at >= TABLES + 12 * 7 + 8 and at < TABLES + 12 * 7 + 8 * 6 and order(raw) >= 0:
                continue  # another cut into documents is as good
            refused(damaged(tmp_path, bytes(raw), ids), "byte|bytes")
            count += 1
    assert count > 350


def order(raw: bytes) -> int:
    """The least step of the document table; negative if it is out of order or leaves the file."""
    table = np.frombuffer(bytes(raw[TABLES + 12 * 7 :]), "<i8")
    return -1 if table.max() > 7 else int(np.diff(table).min())


@pytest.mark.parametrize(
    ("at", "value", "place"),
    [
        (18, 2**64 - 1, "byte 18"),  # counts that a reader would allocate
        (18, 2**40, "byte 18"),
        (26, 2**63, "byte 18"),
        (26, 0, "byte 26"),
        (9, 2, "byte 9: version 2"),
        (TABLES + 4 * 7 + 8, 2**40, f"byte {TABLES + 4 * 7 + 8}: sequence 1 begins at {2**40}"),
        (TABLES + 12 * 7, 1, f"byte {TABLES + 12 * 7}: the first document"),
        (TABLES + 12 * 7 + 16, 6, f"byte {TABLES + 12 * 7 + 24}: document entry 3 is 3"),
        (TABLES + 12 * 7 + 48, 6, f"byte {TABLES + 12 * 7 + 48}: the documents end at sequence 6 of 7"),
    ],
)
def test_the_place_is_named(at: int, value: int, place: str, tmp_path: Path) -> None:
    idx, ids = ((FIXTURES / f"megatron_int32{s}").read_bytes() for s in (".idx", ".bin"))
    refused(damaged(tmp_path, idx[:at] + struct.pack("<Q", value) + idx[at + 8 :], ids), place)


def test_a_negative_length_is_named(tmp_path: Path) -> None:
    idx, ids = ((FIXTURES / f"megatron_int32{s}").read_bytes() for s in (".idx", ".bin"))
    at = TABLES + 4 * 2
    refused(damaged(tmp_path, idx[:at] + struct.pack("<i", -7) + idx[at + 4 :], ids), f"byte {at}: sequence 2 has")
