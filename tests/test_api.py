"""The public surface: declared, documented, and in the catalog of laws."""

import importlib
import importlib.metadata
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import wspace
from tests.catalog import CASES, NOT_ON_TREES

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "api"
MODULES = {
    info.name: importlib.import_module(f"wspace.{info.name}")
    for info in pkgutil.iter_modules(wspace.__path__)
    if not info.name.startswith("_")
}
SYMBOLS = {
    f"{name}.{symbol}": getattr(module, symbol)
    for name, module in MODULES.items()
    for symbol in module.__all__
}
FUNCTIONS = {name: value for name, value in SYMBOLS.items() if inspect.isfunction(value)}
NUMERIC = [name for name in SYMBOLS if not name.startswith(("typing.", "checkpoint.", "testing."))]


def test_every_module_is_exported():
    assert sorted([*wspace.__all__, "testing"]) == sorted(MODULES)  # which needs hypothesis


def test_every_symbol_is_in_the_catalog():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert sorted({name.split(",")[0] for name in names} | NOT_ON_TREES.keys()) == sorted(NUMERIC)


@pytest.mark.parametrize("name", SYMBOLS)
def test_every_symbol_has_its_place_in_the_docs(name):
    page = DOCS / f"{name.split('.')[0]}.md"
    assert f"::: wspace.{name}\n" in page.read_text() + "\n"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_docstring_says_what_goes_in_and_out(name):
    function = FUNCTIONS[name]
    sections = (inspect.getdoc(function) or "").splitlines()
    takes = bool(inspect.signature(function).parameters)
    returns = function.__annotations__["return"] is not None
    for section in ("Examples:", *["Args:"] * takes, *["Returns:"] * returns):
        assert section in sections


def test_import_and_version_load_nothing_and_a_star_loads_every_module():
    code = (
        "import sys, wspace; first = set(sys.modules); version = wspace.__version__\n"
        "late = {'jax', 'numpy', 'importlib.metadata'} & first, {'jax', 'numpy'} & {*sys.modules}\n"
        "from wspace import *\n"
        "print(version, *late, sorted(set(wspace.__all__) - set(globals())))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [importlib.metadata.version("wspace"), "set()", "set()", "[]"]
    assert "__version__" in dir(wspace)
    with pytest.raises(AttributeError, match="module 'wspace' has no attribute 'lerp'"):
        _ = wspace.lerp


def test_import_pulls_in_no_optional_dependency():
    code = (
        "import sys; from wspace import *; print([m for m in ('matplotlib', 'sklearn', "
        "'safetensors', 'hypothesis', 'scipy.optimize', 'beartype') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
