"""The stubs tell what the native module has."""

import ast
import inspect
import os
import pathlib
import subprocess
import sys

import pytest

import ternion
from ternion import _native


def test_the_stub_of_the_native_module_is_complete():
    stub = ast.parse((pathlib.Path(ternion.__file__).parent / "_native.pyi").read_text())
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    real = {name: value for name, value in vars(_native).items() if inspect.isclass(value)}
    assert classes.keys() == real.keys()
    for name, node in classes.items():
        told = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        told |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
        assert told == {member for member in vars(real[name]) if not member.startswith("_")}, name


def run(module, *arguments, folder, cwd):
    """Runs a tool of the package mypy."""
    pytest.importorskip("mypy")
    config = pathlib.Path(__file__).parents[1] / "pyproject.toml"
    command = [sys.executable, "-m", module, *arguments]
    command += ["--mypy-config-file" if module.endswith("stubtest") else "--config-file", str(config)]
    outcome = subprocess.run(command, cwd=cwd, env={**os.environ, "MYPY_CACHE_DIR": str(folder)}, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_the_hints_are_right(tmp_path):
    run("mypy", "-p", "ternion", folder=tmp_path, cwd=pathlib.Path(__file__).parents[1] / "python")


def test_the_stub_is_that_of_the_native_module(tmp_path):
    # Away from the sources, which have no native module.
    run("mypy.stubtest", "--ignore-disjoint-bases", "ternion._native", folder=tmp_path, cwd=tmp_path)


def test_a_program_with_hints_is_checked_against_them(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import ternion\n"
        "def answer(path: str) -> str:\n"
        "    return ternion.load(path, threads=2).generate('Hi', temperature=0, max_tokens=3).text\n"
    )
    run("mypy", str(program), folder=tmp_path / "cache", cwd=tmp_path)
    program.write_text("import ternion\nlength: str = ternion.load('x').generate('Hi', max_tokens='many').usage\n")
    with pytest.raises(AssertionError, match="max_tokens"):
        run("mypy", str(program), folder=tmp_path / "cache", cwd=tmp_path)


def test_everything_public_is_documented():
    for name in ternion.__all__:
        value = getattr(ternion, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
    assert (pathlib.Path(ternion.__file__).parent / "py.typed").exists()
