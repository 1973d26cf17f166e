"""Hostile model folders in large numbers: `python -m tests.hf_fuzz CASES SEED FOLDER` runs them, prints the outcome.

Each case breaks config.json, the index or a safetensors header in one or two ways and imports the folder.  It must end
in one clear line, or, if the change did no harm, in an import that `verify` finds identical; nothing outside the output
folder may change, no code in the folder may run, and no case may take long or much memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import convert
from tests.hf_folders import FORMS, random_weights, write_folder
from tests.oracles import GOLDEN

SMALL = replace(
    GOLDEN,
    vocab_size=16,
    hidden_size=16,
    head_dim=4,
    mamba_num_heads=2,
    mamba_head_dim=4,
    ssm_state_size=4,
    n_routed_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=4,
    moe_shared_expert_intermediate_size=4,
)
VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        10**12,
        2**62,
        10**30,
        -(2**63),
        0.5,
        1e308,
        "",
        "NaN",
        "BF16",
        "mamba",
        "x" * 5000,
    ),
    *(
        [],
        {},
        [10**12],
        [-1],
        [[]],
        [None],
        {"a": 1},
        {"__float__": "Infinity"},
        {"__float__": "${x}"},
        [0.0, {}],
        [1, 0],
    ),
    *(
        "${oc.env:HOME}",
        "\u202e\x1b[31m",
        "\ud800",
        "../../outside/secret",
        "a\nb",
        float("nan"),
        float("inf"),
        ["M"] * 9,
    ),
]
PATTERNS = ["", "X", "M" * 10**5, "MEM*", "MEM*EE", "-----", "MEM*E\n", "mem*e", "MEM*E\x00", "É"]
NAMES = [
    *("../outside/secret.safetensors", "/etc/passwd", "..", ".", "", "a/../model.safetensors", "a\\b.safetensors"),
    *("x\0y.safetensors", "absent.safetensors", "config.json", "\x1b[2J.safetensors", "link.safetensors", "n" * 3000),
    *("loop.safetensors", "pipe.safetensors", "folder.safetensors", "pytorch_model.bin"),
]


class Evil:
    """Unpickling this would leave a trace."""

    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


def text_of(value: object) -> bytes:
    return json.dumps(value).encode(errors="surrogatepass")


def break_bytes(r: random.Random, data: bytes) -> bytes:
    """Any file: cut short, bits flipped, bytes added, or something else altogether."""
    kind = r.randrange(6)
    if kind == 0:
        return data[: r.randrange(len(data))]
    if kind == 1:
        out = bytearray(data)
        for _ in range(r.randint(1, 4)):
            out[r.randrange(len(out))] ^= 1 << r.randrange(8)
        return bytes(out)
    if kind == 2:
        at = r.randrange(len(data))
        return data[:at] + r.randbytes(r.randint(1, 9)) + data[at:]
    if kind == 3:
        return r.choice(
            [b"", b"null", b"[]", b"{}", b"3", b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe{", b"\xef\xbb\xbf{}"]
        )
    if kind == 4:
        return data.replace(b":", b":" + r.choice([b"NaN,", b"-", b"1e999", b"9" * 5000, b"0x1", b"'"]), 1)
    return data + r.choice([b"\0", b"{}", b" " * 9, data])


def break_json(r: random.Random, data: bytes, keys: list[str]) -> bytes:
    """Any JSON object: a value replaced, a key gone, twice there, or unknown."""
    value = json.loads(data)
    key = r.choice(keys or list(value))
    kind = r.randrange(4)
    if kind == 0:
        value.pop(key, None)
        return text_of(value)
    if kind == 1:
        return data.rstrip()[:-1] + b", " + text_of({key: r.choice(VALUES)})[1:]
    value[key if kind == 2 else key + r.choice(["", "s", "."])] = r.choice(VALUES)
    return text_of(value)


def break_config(r: random.Random, folder: Path) -> None:
    file = folder / "config.json"
    if not file.is_file() or file.is_symlink():
        return  # a trap by now
    data = file.read_bytes()
    kind = r.randrange(8)
    if kind == 0:
        data = break_bytes(r, data)
    elif kind == 1:
        value = json.loads(data)
        value["hybrid_override_pattern"] = r.choice(PATTERNS)
        if r.random() < 0.5:
            value.pop("num_hidden_layers")
        data = text_of(value)
    elif kind == 2:
        value = json.loads(data)
        del value["hybrid_override_pattern"]
        value["layers_block_type"] = r.choice([*VALUES, ["mamba", "moe", "mamba", "attention", "moe"]])
        data = text_of(value)
    elif kind == 3:
        replace_by_trap(r, file)
        return
    else:
        data = break_json(r, data, [])
    file.write_bytes(data)


def replace_by_trap(r: random.Random, file: Path) -> None:
    """A link out of the folder, a link to itself, a pipe, a folder, a device, nothing."""
    if not file.is_file() or file.is_symlink():
        return
    data = file.read_bytes()
    file.unlink()
    kind = r.randrange(6)
    if kind == 0:
        outside = file.parent.parent / "outside" / file.name
        outside.write_bytes(data)
        file.symlink_to(outside)
    elif kind == 1:
        file.symlink_to(file)
    elif kind == 2:
        os.mkfifo(file)
    elif kind == 3:
        file.mkdir()
    elif kind == 4:
        file.symlink_to("/dev/zero")


def break_index(r: random.Random, folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    if not file.is_file() or file.is_symlink():
        return
    value = json.loads(file.read_bytes())
    names = value["weight_map"]
    key, kind = r.choice(list(names)), r.randrange(8)
    if kind == 0:
        file.write_bytes(break_bytes(r, file.read_bytes()))
        return
    if kind == 1:
        replace_by_trap(r, file)
        return
    if kind == 2:
        names[key] = r.choice(NAMES)
    elif kind == 3:
        names[key] = r.choice(VALUES)
    elif kind == 4:
        names[key] = r.choice(list(names.values()))
    elif kind == 5:
        del names[key]
    elif kind == 6:
        names[r.choice(["model." + key, "backbone.layers.99.norm.weight", "é" * 400, ""])] = names[key]
    else:
        value["weight_map"] = r.choice([*VALUES, list(names), {k: r.choice(NAMES) for k in names}])
    data = text_of(value)
    if r.random() < 0.1:
        data = data.replace(b'"weight_map": {', b'"weight_map": {' + text_of({key: "x"})[1:-1] + b", ")
    file.write_bytes(data)


def break_shard(r: random.Random, folder: Path) -> None:
    files = [p for p in sorted(folder.glob("model*.safetensors")) if p.is_file() and not p.is_symlink()]
    if not files:
        return
    file = r.choice(files)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = r.randrange(9)
    if kind == 0:
        file.write_bytes(break_bytes(r, data))
        return
    if kind == 1:
        lie = r.choice([0, 1, length - 1, length + 1, len(data) - 8, len(data) - 7, 10**8, 2**40, 2**63, 2**64 - 1])
        file.write_bytes(lie.to_bytes(8, "little") + data[8:])
        return
    if kind == 2:
        replace_by_trap(r, file)
        return
    if kind == 3:
        header = break_bytes(r, header)
    elif kind == 4:
        header = break_json(r, header, [])
    else:
        value = json.loads(header)
        tensor = value[key := r.choice([k for k in value if k != "__metadata__"])]
        if kind == 5:
            tensor["dtype"] = r.choice([*VALUES, "F16", "I16", "BF17", "NaN", "F8_E4M3", "F4", "bf16", "F64"])
        elif kind == 6:
            old = tensor["shape"]
            new = [
                *VALUES,
                [10**12],
                [2**62, 2**62],
                [*old, 1],
                [1, *old],
                old[::-1],
                [0],
                [*old[1:], *old[:1]],
                [1] * 99,
            ]
            tensor["shape"] = r.choice(new)
        elif kind == 7:
            a, b = tensor["data_offsets"]
            pairs = [[b, a], [a, a], [a + 1, b + 1], [a, b + 1], [-1, b], [0, len(body)], [0, 2**62], [a, b, b], [a]]
            tensor["data_offsets"] = r.choice([*VALUES, *pairs, [float(a), b], [str(a), b]])
        else:
            other = r.choice(
                [
                    "mtp.layers.0.norm.weight",
                    f"{key}_scale",
                    f"model.{key.partition('.')[2]}",
                    key[:-1],
                    "",
                    "\x1b[31m",
                    "x" * 400,
                ]
            )
            value = {other if k == key else k: v for k, v in value.items()}
        header = text_of(value)
    file.write_bytes(len(header).to_bytes(8, "little") + header + body)


def break_others(r: random.Random, folder: Path) -> None:
    """The files that are carried along, and what a folder may hold instead of safetensors."""
    kind = r.randrange(3)
    if kind == 0:
        replace_by_trap(r, folder / r.choice(["tokenizer_config.json", "chat_template.jinja", "LICENSE"]))
    elif kind == 1:
        for p in folder.glob("*.safetensors*"):
            p.unlink()
    else:
        (folder / "model.safetensors").write_bytes(b"\0" * 8)


BREAKERS: list[Callable[[random.Random, Path], None]] = [
    *([break_config] * 4),
    *([break_index] * 4),
    *([break_shard] * 6),
    break_others,
]


def originals(home: Path) -> list[Path]:
    """Good folders, with code and a pickle in them that would leave traces."""
    out = []
    for i, form in enumerate(FORMS):
        folder = write_folder(home / f"good{i}", SMALL, random_weights(SMALL, i), form, i, shards=1 + i)
        (folder / "modeling_nemotron_h.py").write_text("import os\nos.mkdir('code_was_run')\n")
        (folder / "configuration_nemotron_h.py").write_text("import os\nos.mkdir('code_was_run')\n")
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
        config = json.loads((folder / "config.json").read_bytes())
        config["auto_map"] = {"AutoConfig": "configuration_nemotron_h.Config", "AutoModel": "modeling_nemotron_h.Model"}
        (folder / "config.json").write_text(json.dumps(config))
        out.append(folder)
    return out


def seen(root: Path) -> dict[str, tuple[int, int, int]]:
    """Everything under a folder, except what an import may write."""
    out = {}
    for path in root.rglob("*"):
        if path.relative_to(root).parts[0] != "out":
            about = path.lstat()
            out[str(path)] = (about.st_mode, about.st_size, about.st_mtime_ns)
    return out


def one_case(r: random.Random, goods: list[Path], root: Path) -> str:
    """Returns `refused` or `harmless`; raises AssertionError on anything else."""
    shutil.copytree(r.choice(goods), root / "hf")
    (root / "outside").mkdir()
    (root / "outside" / "secret.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (root / "hf" / "link.safetensors").symlink_to(root / "outside" / "secret.safetensors")
    r.choice(BREAKERS)(r, root / "hf")
    if r.random() < 0.25:
        with contextlib.suppress(
            ValueError, TypeError, LookupError, AttributeError, OSError
        ):  # broken too much already
            r.choice(BREAKERS)(r, root / "hf")
    before = seen(root)
    out, err, start = io.StringIO(), io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = convert.main(["import", "--hf-model", str(root / "hf"), "--megatron-path", str(root / "out")])
        if status == 0:
            same = convert.main(["verify", str(root / "hf"), str(root / "out")])
    assert time.perf_counter() - start < 10, "slow"
    assert seen(root) == before, "something outside the output folder changed"
    if status == 0:
        assert same == 0, out.getvalue() + err.getvalue()
        return "harmless"
    text = err.getvalue()
    assert status == 2
    assert text.startswith("convert.py: error: ")
    assert text.count("\n") == 1
    assert text[:-1].isprintable(), repr(text)
    assert 30 < len(text) < 1000, text
    assert not (root / "out" / "latest_checkpointed_iteration.txt").exists()
    return "refused"


def main(cases: int, seed: int, home: Path) -> None:
    goods = originals(home)
    convert.parser = cache(convert.parser)  # to build it anew would be a sixth of the time
    outcomes: Counter[str] = Counter()
    one_case(random.Random(-1), goods, warm := home / "warm")  # what every run needs is in memory after this
    shutil.rmtree(warm)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(cases):
        root = home / "case"
        root.mkdir()
        try:
            outcomes[one_case(random.Random(seed * 10**6 + i), goods, root)] += 1
        except BaseException:
            print(f"case {seed * 10**6 + i}, left in {root}", file=sys.stderr)
            raise
        shutil.rmtree(root)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({**outcomes, "memory": grown, "code_was_run": Path("code_was_run").exists()}))


if __name__ == "__main__":
    os.chdir(sys.argv[3])
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
