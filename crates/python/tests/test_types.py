"""The stubs tell what the native module has."""

import ast
import inspect
import pathlib

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


def test_everything_public_is_documented():
    for name in ternion.__all__:
        value = getattr(ternion, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
    assert (pathlib.Path(ternion.__file__).parent / "py.typed").exists()
