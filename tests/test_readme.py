"""The README: paths exist, commands parse, settings are known."""

import re

import pytest

from nano3.cli import parser, resolve
from nano3.config import UserError
from nano3.parallel.layout import check_layout
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line]


def test_every_path_that_it_links_exists() -> None:
    paths = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(
        r"`((?:tests|docs|benchmarks|nano3|kernels)/[\w/.]+)`", README
    )
    assert len(paths) > 10
    assert [p for p in paths if not (ROOT / p).exists()] == []


TAUGHT = [README, *(p.read_text() for p in sorted((ROOT / "docs").glob("*data*.md")))]
TYPED = [
    line for page in TAUGHT for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()
]


@pytest.mark.parametrize("command", [c for c in TYPED if "train.py" in c])
def test_every_training_command_is_accepted(command: str) -> None:
    args = command.split("#")[0].split("train.py", 1)[1].split()
    files = [a.split("=")[1] for a in args if a.startswith("dataset.path=")]
    assert [f for f in files if not (ROOT / f).exists()] == []
    ranks = re.search(r"--nproc-per-node=(\d+)", command)
    try:
        config, _ = resolve(parser().parse_args(args))
        check_layout(config, int(ranks.group(1)) if ranks else 1)
    except UserError as error:
        pytest.fail(f"{command}: {error}")


def test_the_two_commands_of_the_first_screen_are_what_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert "grep -m1 '^python3 -m venv' README.md" in ci
    assert "grep -m1 'pytest$' README.md" in ci
    assert COMMANDS[0].startswith("python3 -m venv")
    assert COMMANDS[1].endswith("pytest")
