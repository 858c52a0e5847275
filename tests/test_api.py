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


KNOWN_AS = {
    "average.running_mean": ("SWA", "stochastic weight averaging", "averaging of checkpoints"),
    "average.window": ("LAWA", "latest weight averaging"),
    "average.ema": ("EMA", "Polyak", "optax.incremental_update"),
    "average.power_ema": ("post-hoc EMA", "EDM2"),
    "average.reconstruct": ("post-hoc EMA", "EDM2"),
    "average.mean": ("soup",),
    "average.karcher_mean": ("multislerp",),
    "average.fisher_mean": ("Fisher merging",),
    "average.regression_mean": ("RegMean",),
    "average.kronecker_mean": ("K-FAC",),
    "average.model_stock": ("Model Stock",),
    "soup.greedy_soup": ("greedy soup",),
    "fit.coefficients": ("learned soup", "AdaMerging", "task-wise", "layer-wise", "DAM"),
    "fit.invert": ("textual inversion",),
    "interpolate.lerp": ("WiSE-FT", "LERP"),
    "interpolate.slerp": ("SLERP",),
    "interpolate.bezier": ("mode connectivity",),
    "merge.task_vector": ("task vector",),
    "merge.task_arithmetic": ("negation", "analogies"),
    "merge.ties": ("TIES",),
    "merge.dare": ("DARE",),
    "merge.della": ("DELLA",),
    "merge.breadcrumbs": ("Breadcrumbs",),
    "merge.tsv_m": ("TSV-M",),
    "merge.iso_c": ("Iso-C",),
    "merge.iso_cts": ("Iso-CTS",),
    "merge.knots": ("KnOTS",),
    "merge.lines": ("LiNeS",),
    "merge.emr": ("EMR",),
    "merge.tall_mask": ("TALL mask",),
    "perturb.filter_normalize": ("filter normalization", "loss landscape"),
    "lowrank.extract": ("LoRA extraction",),
    "lowrank.apply": ("merge_and_unload",),
    "lowrank.combine": ("add_weighted_adapter", "`cat`", "`svd`"),
    "negative.erase_keeping": ("LEACE",),
    "negative.attenuate": ("INLP",),
    "negative.rewrite": ("ROME", "AlphaEdit"),
    "negative.repel": ("task negation",),
    "negative.guide": ("classifier-free guidance", "negative prompt"),
    "negative.guide_perpendicular": ("Perp-Neg",),
}


@pytest.mark.parametrize("name", KNOWN_AS)
def test_names_of_the_literature_stand_before_the_arguments(name):
    said = " ".join((inspect.getdoc(FUNCTIONS[name]) or "").split("Args:")[0].split())
    assert [known for known in KNOWN_AS[name] if known not in said] == []


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
