"""Models in files, merged, steered and measured by commands."""

import pathlib
import tempfile

import jax

from wspace import checkpoint
from wspace.__main__ import main

folder = tempfile.mkdtemp()
a, c, out, away = (str(pathlib.Path(folder, name)) for name in ("a", "c", "out", "away"))
for seed, path in enumerate((a, c)):
    checkpoint.save(path, {"w": jax.random.normal(jax.random.key(seed), (4, 4))})
assert main(["merge", "linear", a, c, "--coefficients", "0.7", "0.3", "-o", out]) == 0
assert (
    main(["steer", "exit", a, c, "--avoid", out, "--radius", "2", "--towards", a, "-o", away]) == 0
)
assert main(["distance", a, c]) == 0
