"""One configuration for every lane: strict promotion, eight CPU devices, repeatable draws."""

import functools
import gc
import importlib.metadata
import itertools
import os
import pathlib
import platform

# Compiling is nearly all of the work, so programs are kept for the next run and for the processes
# that tests start. `pytest --cache-clear` drops them.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "d" / "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# One thread a worker for the small matrices of the tests: more of them starve each other. It is
# read when the library is loaded, so before jax is.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Workers keep the memory that they freed: half of the system's time goes into giving it back.
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
# Compiling takes half of the time with XLA's older code generator, which later versions lack, and
# without optimization; but then products are fused with additions in some places and not in others,
# unless the processor is said to have no such instructions. Exact laws have a marker, and a lane
# that tests what users run, by XLA_FLAGS set to nothing.
if importlib.metadata.version("jaxlib").startswith("0.10.") and platform.machine() == "x86_64":
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 "
        "--xla_cpu_max_isa=AVX --xla_cpu_parallel_codegen_split_count=1",
    )

import hypothesis
import jax
import pytest
from jax._src.interpreters import mlir
from jaxtyping import TypeCheckError

# Threads for every device and to spare, however few the cores: else collectives starve each other.
os.environ["NPROC"] = "32"
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Half of the time in which a small program is lowered goes into a fresh context of MLIR: share one.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

# Compilation makes the first draw slow and later ones fast, so a deadline measures nothing. Nor
# does the health of a few derandomized draws, which change with every number in the sources.
for name, count in (("default", 10), ("few", 2)):
    hypothesis.settings.register_profile(
        name,
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=count,
        suppress_health_check=[
            hypothesis.HealthCheck.filter_too_much,
            hypothesis.HealthCheck.too_slow,
        ],
    )
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.register_profile(
    "guards",
    deadline=None,
    database=None,
    max_examples=10_000,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# Scripts that test_tasks.py runs: importing them to look for doctests would run them, too.
collect_ignore_glob = ["tasks/*.py"]


def pytest_collection_finish():
    """Has garbage collected seldom, and not what stays: JAX makes that a third of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_runtest_setup(item):
    """Skips what is true in float32 alone."""
    for mark in item.iter_markers("float32"):
        if jax.config.jax_enable_x64:
            pytest.skip(mark.kwargs["reason"])


@pytest.fixture(scope="session")
def refuses(pytestconfig):
    """Expects an error by type and message, or jaxtyping's where it checks signatures first."""

    def expect(error, *, match):
        if pytestconfig.getoption("jaxtyping_packages"):
            return pytest.raises((error, TypeCheckError))
        return pytest.raises(error, match=match)

    return expect


@pytest.fixture
def programs():
    """The number of programs compiled so far."""
    count = [0]

    def listen(event, *_, **__):
        count[0] += event == "/jax/core/compile/jaxpr_to_mlir_module_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count[0]
    jax.monitoring.unregister_event_duration_listener(listen)


MAPS = pathlib.Path("/proc/self/maps")
ROOM = 45_000  # of the 65,530 memory maps that Linux gives a process by default
ended = itertools.count(1)


def pytest_runtest_teardown():
    """Drops compiled programs, some maps each, before there is no room for another one."""
    if next(ended) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > ROOM:
        jax.clear_caches()
