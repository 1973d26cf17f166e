"""The house: imports point down only, and no file outgrows one sitting."""

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = sorted(p for d in ("kernels", "nano3") for p in (ROOT / d).rglob("*.py"))
MAY = {  # the first prefix that fits a file says what it may import of ours
    "kernels/": ("kernels",),
    "nano3/config.py": (),
    "nano3/presets.py": (),
    "nano3/idle.py": ("nano3.config", "nano3.presets"),
    "nano3/cli.py": ("nano3.config", "nano3.presets", "nano3.idle"),
    "nano3/parallel/": ("nano3.config", "nano3.parallel", "kernels"),
    "nano3/lock.py": ("nano3.config",),
    "nano3/data/": ("nano3.config", "nano3.lock", "nano3.data"),
    "nano3/model/": ("nano3.config", "nano3.model", "nano3.parallel", "kernels"),
    "nano3/train/": ("nano3", "kernels"),
    "nano3/": ("nano3",),
}


def imported(tree: ast.AST) -> set[str]:
    """Modules imported at the top of a file; a `main` that sits above the library may import more inside."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    allowed = next(v for k, v in MAY.items() if name.startswith(k))
    for module in imported(ast.parse(path.read_text())):
        if module.split(".")[0] in ("nano3", "kernels"):
            assert module.startswith(allowed), f"{name} imports {module}"
        if name.startswith("kernels/"):
            assert module.split(".")[0] in {"torch", "triton", "kernels"} | set(sys.stdlib_module_names), (
                f"{name} imports {module}"
            )


LONGEST = 650  # most files stay far below; the SSD kernels are the longest


def test_files_can_be_read_in_one_sitting() -> None:
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > LONGEST}
    assert long == {}


def test_the_kernels_package_has_no_version() -> None:
    assert "__version__" not in (ROOT / "kernels" / "__init__.py").read_text()
