"""Refusal of bad arguments: by leaf path, by argument name, with the mend.

What shows in shapes and dtypes raises always. What shows only in values raises where the value
is known, and elsewhere, under tracing, becomes NaN.
"""

import fnmatch
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeAlias, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import KeyPath, keystr, tree_leaves_with_path
from jaxtyping import Array, Bool, DTypeLike, Float, Real

from wspace import _pieces
from wspace._leaves import Factored
from wspace._numerics import accumulator, arithmetic_eps, coarsest_eps
from wspace._words import counted, described, layout_of, shortened
from wspace.typing import Coefficients, Layout, LeafCoefficients, Scalar, ScalarLike

WEIGHT_DTYPES = frozenset(map(np.dtype, (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)))

WEIGHTS_AND_MASKS = WEIGHT_DTYPES | {np.dtype(bool)}

Function = TypeVar("Function", bound=Callable[..., Any])

Numbers: TypeAlias = Float[Array | np.ndarray, "k ..."]
"""One number a point, or a row with one for each leaf: float64 NumPy where they are known, a JAX
array where they are traced."""

OneOrEach: TypeAlias = ScalarLike | Real[Array | np.ndarray, " leaves"]
"""One number, or an array with one for each leaf."""


def is_factored(node: object) -> bool:
    """Whether `node` stands for one leaf without being an array."""
    return isinstance(node, Factored)


def is_weight(leaf: object) -> bool:
    """Whether a leaf is an array of a dtype that weights have."""
    return getattr(leaf, "dtype", None) in WEIGHT_DTYPES and hasattr(leaf, "shape")


def native(leaf: Any) -> Any:
    """A leaf, and weights that NumPy holds in the other byte order in that of the machine."""
    if isinstance(leaf, np.ndarray) and not leaf.dtype.isnative:
        turned = leaf.dtype.newbyteorder("=")
        return leaf.astype(turned) if turned in WEIGHT_DTYPES else leaf
    return leaf


def shapes_of(
    name: str,
    tree: object,
    leaves: Sequence[Any],
    dtypes: AbstractSet[np.dtype] = WEIGHT_DTYPES,
) -> list[tuple[int, ...]]:
    """The shapes of the leaves of a tree, raising unless all of them have one of some dtypes."""
    try:
        if {leaf.dtype for leaf in leaves} <= dtypes:
            return [leaf.shape for leaf in leaves]
    except AttributeError:
        pass
    raise _no_weight(name, tree, dtypes)


def path_of(path: KeyPath) -> str:
    """A leaf's path as errors and tables print it."""
    return keystr(path) or "(root)"


def name_of(path: KeyPath) -> str:
    """A leaf's keys, places and fields joined by dots, as files name it."""
    return keystr(path, simple=True, separator=".")


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether one of the globs matches a name, or is the name."""
    return any(name == glob or fnmatch.fnmatchcase(name, glob) for glob in globs)


def known_layout(layout: Any) -> None:
    """Raises unless an argument says how layers store their matrices."""
    one_of("layout", layout, get_args(Layout))


def in_other_layout(layout: Layout, fits: bool = True) -> str:
    """What to do about a matrix of the wrong side, if it fits the other way round."""
    if not fits:
        return ""
    if layout == "in_out":
        return "; if your layers store (out, in), as torch and equinox do, give layout='out_in'"
    return "; if your layers store (in, out), as flax and haiku do, give layout='in_out'"


def is_traced(*values: object) -> bool:
    """Whether a value is known only when the traced program runs."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def same_layout(dtypes: AbstractSet[np.dtype] = WEIGHT_DTYPES, /, **trees: object) -> None:
    """Raises unless the trees, by name, share structure and leaf shapes, every leaf floating.

    Where `dtypes` are given, leaves have one of these.
    """
    flat = {}
    for name, x in trees.items():
        leaves, structure = jax.tree.flatten(x, is_leaf=is_factored)
        flat[name] = structure, shapes_of(name, x, leaves, dtypes)
    (first, layout), *rest = flat.items()
    for name, other in rest:
        if other != layout:
            _refuse_layout(first, trees[first], name, trees[name])


def entries(
    name: str,
    tree: Any,
    like: Any,
    kinds: str,
    *,
    of: str = "the weights",
    is_leaf: Callable[[Any], bool] | None = None,
) -> list[tuple[Any, Any, str]]:
    """For each leaf of `like`: the entry that `tree` has there, the leaf, and its name in errors.

    `kinds` says what the entries are. Each is one leaf of `tree`, as `is_leaf` tells leaves.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    try:
        given = structure.flatten_up_to(tree)
        for entry in given:
            if not (len(parts := jax.tree.leaves(entry, is_leaf)) == 1 and parts[0] is entry):
                raise ValueError("an entry is a tree itself")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be a tree like {of}, with {kinds}: "
            f"got {layout_of(tree)} for {layout_of(like)}"
        ) from error
    return [
        (entry, leaf, f"{name} at leaf {path_of(path)}")
        for entry, (path, leaf) in zip(given, leaves, strict=True)
    ]


def of_points(function: Function) -> Function:
    """Marks a function whose first argument is a sequence of trees, for `tree.per_leaf`."""
    vars(function)["takes_points"] = True
    return function


def listed(name: str, trees: Any) -> list[Any]:
    """The trees of an argument that takes a sequence of them, at least one."""
    if isinstance(trees, str | bytes | Mapping | AbstractSet) or not hasattr(trees, "__iter__"):
        raise TypeError(
            f"{name} must be a sequence of trees, got {described(trees)}: give a list of trees, "
            "such as [x, y]"
        )
    if hasattr(trees, "shape") or hasattr(trees, "_fields"):
        is_array = hasattr(trees, "shape")
        leaves = counted(len(jax.tree.leaves(trees)), "leaf", "leaves")
        named = f"the named tuple {type(trees).__name__} of {leaves}"
        what = described(trees) if is_array else named
        mend = "list(x) for the rows of an array" if is_array else "[x, y]"
        raise TypeError(
            f"{name} must be a sequence of trees, got {what}, which is one tree: give a list of "
            f"trees, such as {mend}"
        )
    trees = list(trees)
    if not trees:
        raise ValueError(f"{name} is empty: give at least one tree")
    return trees


def each(name: str, trees: Sequence[Any]) -> dict[str, Any]:
    """Trees of one argument by the names that errors call them."""
    return {f"{name}[{i}]": x for i, x in enumerate(trees)}


def floating_leaves(**trees: object) -> None:
    """Raises unless every leaf of the trees, by name, is an array of weights."""
    for name, tree in trees.items():
        shapes_of(name, tree, jax.tree.leaves(tree, is_leaf=is_factored))


def _no_weight(name: str, tree: object, dtypes: AbstractSet[np.dtype]) -> TypeError:
    """What is said of the first leaf of a tree that is no array of one of some dtypes."""
    path, leaf = next(
        (path, leaf)
        for path, leaf in tree_leaves_with_path(tree, is_leaf=is_factored)
        if isinstance(leaf, Factored)
        or getattr(leaf, "dtype", None) not in dtypes
        or not hasattr(leaf, "shape")
    )
    return no_weight(f"leaf {path_of(path)} of {name}", leaf)


def no_weight(where: str, leaf: object) -> TypeError:
    """What is said of a leaf that is no array of weights."""
    if isinstance(leaf, Factored):
        return TypeError(
            f"{where} is a {type(leaf).__name__} edit, not weights: "
            "add it to a base by lowrank.apply, or multiply it out by lowrank.materialize"
        )
    dtype = getattr(leaf, "dtype", None)
    what = f"is a {type(leaf)}" if dtype is None else f"has dtype {dtype}"
    if native(leaf) is not leaf:
        return TypeError(
            f"{where} {what}, not in the byte order of this machine, which JAX does not take: "
            'give leaf.astype(leaf.dtype.newbyteorder("="))'
        )
    return TypeError(
        f"{where} {what}; weights are float64, float32, bfloat16 or float16 arrays: "
        "set other leaves aside by tree.partition, and put them back by tree.join"
    )


def no_tree(**arrays: object) -> None:
    """Raises unless every argument, by name, is one array."""
    for name, x in arrays.items():
        is_array = hasattr(x, "dtype") and hasattr(x, "shape")
        if not is_array and not isinstance(x, bool | int | float | complex):
            raise TypeError(
                f"{name} must be one array, got {described(x)}: give one leaf, or take the leaves "
                "one by one by tree.per_leaf"
            )


def one_array(**arrays: object) -> None:
    """Raises unless every argument, by name, is one array of weights, not a tree of them."""
    no_tree(**arrays)
    floating_leaves(**arrays)


def _refuse_layout(first: str, x: Any, name: str, y: Any) -> None:
    for several, own, one, other in ((first, x, name, y), (name, y, first, x)):
        if isinstance(own, list | tuple) and own and not hasattr(own, "_fields"):
            layouts = {jax.tree.structure(part) for part in own}
            if layouts == {jax.tree.structure(other)}:
                raise ValueError(
                    f"{several} is {described(own)}, each of its parts a tree like {one}, where "
                    f"one tree is meant: give {several}[0], or another of them"
                )
    shapes, others = (
        {path_of(path): leaf.shape for path, leaf in tree_leaves_with_path(tree)} for tree in (x, y)
    )
    for path in sorted(shapes.keys() ^ others.keys()):
        has, lacks = (first, name) if path in shapes else (name, first)
        raise ValueError(
            f"{has} has a leaf {path} that {lacks} lacks: both must be trees of one structure, "
            f"and {first} is {described(x)}, {name} {described(y)}"
        )
    for path, shape in shapes.items():
        if others[path] != shape:
            raise ValueError(
                f"leaf {path} has shape {shape} in {first}, {others[path]} in {name}: "
                "both must be points of one weight space"
            )
    where, one, other = _first_difference(x, y)
    raise ValueError(
        f"{first} and {name} have equal paths but different containers: at {path_of(where)} "
        f"{described(one)} and {described(other)}"
        + (", which differ in what is no leaf" if type(one) is type(other) else "")
    )


def _first_difference(x: Any, y: Any, path: KeyPath = ()) -> tuple[KeyPath, Any, Any]:
    """Where two trees of equal paths first differ, and what they have there."""
    if type(x) is type(y):
        parts, others = (
            tree_leaves_with_path(tree, is_leaf=lambda part, tree=tree: part is not tree)
            for tree in (x, y)
        )
        for (where, part), (_, other) in zip(parts, others, strict=True):
            if jax.tree.structure(part) != jax.tree.structure(other):
                return _first_difference(part, other, (*path, *where))
    return path, x, y


def scalar(
    name: str, value: Any, domain: Callable[[Any], Any] | None = None, words: str = "finite"
) -> ScalarLike:
    """A real number, inside its domain where it is known and NaN outside where it is traced.

    A traced one is in at least float32, so that no arithmetic on it runs in half precision.
    """
    if shape := _shape_of_numbers(value):
        raise ValueError(f"{name} must be one number, got shape {shape}: use jax.vmap for many")
    try:
        tree_of_tracers = is_traced(value) and not isinstance(value, Tracer)
        if tree_of_tracers or isinstance(value, str | bytes) or is_complex(value):
            raise TypeError
        known = _at_least_single(value) if is_traced(value) else float(value)
    except (OverflowError, TypeError, ValueError) as error:
        inside = "" if domain is None else f" {words}"
        raise TypeError(
            f"{name} must be a real number{inside}, got {described(value)}: give one number"
        ) from error
    if is_traced(known):
        if domain is None:
            return known
        return jnp.where(domain(floating(known)) & jnp.isfinite(known), known, jnp.nan)
    if not math.isfinite(known) or (domain is not None and not domain(known)):
        raise ValueError(f"{name} must be {words}, got {known}")
    return known


def _shape_of_numbers(value: Any) -> tuple[int, ...]:
    """The shape of an array, or of a list of numbers."""
    if isinstance(value, list | tuple) and all(isinstance(x, int | float) for x in value):
        return (len(value),)
    return tuple(getattr(value, "shape", ()))


def single(name: str, value: Any) -> None:
    """Raises unless a value is one of what formulas take: a real number, a truth value or a key."""
    is_number = isinstance(value, bool | int | float) or hasattr(value, "dtype")
    if not _is_key(value) and (not is_number or np.shape(value) != () or is_complex(value)):
        raise TypeError(f"{name} must be one real number, or a random key, got {described(value)}")


def _at_least_single(value: Array) -> Array:
    """A traced number in at least float32; one that widens nothing stays so."""
    return value if value.dtype in (jnp.float32, jnp.float64) else floating(value)


def is_complex(value: Any) -> bool:
    """Whether a number or an array has an imaginary part, be it zero."""
    return isinstance(value, complex) or jnp.issubdtype(
        getattr(value, "dtype", bool), jnp.complexfloating
    )


def nonnegative(name: str, value: Any) -> ScalarLike:
    """A real number of at least 0, as `scalar` checks it."""
    return scalar(name, value, lambda x: x >= 0, "finite and at least 0")


def above_zero(name: str, value: Any) -> ScalarLike:
    """A real number above 0, as `scalar` checks it."""
    return scalar(name, value, lambda x: x > 0, "finite and positive")


def between(name: str, value: Any, low: int, high: int) -> ScalarLike:
    """A real number above `low` and below `high`, as `scalar` checks it."""
    return scalar(name, value, lambda x: (x > low) & (x < high), f"between {low} and {high}")


def floating(value: Any) -> Array:
    """An array of at least float32 holding `value`."""
    array = jnp.asarray(value)
    return array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)


def share(name: str, value: Any) -> float:
    """A share of entries above 0 and up to 1, known when tracing, since it counts entries."""
    if is_traced(value):
        raise TypeError(
            f"{name} must be a plain number, since it decides how many entries stay, got a traced "
            "one: close over it, or select by selection.top_mask, whose count may be traced"
        )
    scalar(name, value, lambda known: 0 < known <= 1, "above 0 and at most 1")
    return float(value)


def known_answer(name: str, path: KeyPath, answer: Any) -> bool:
    """What a function says of a leaf, known when tracing, since it decides structure."""
    if is_traced(answer):
        raise TypeError(
            f"{name} must say of leaf {path_of(path)} what is known when tracing, since it decides "
            "structure, got a traced answer: go by the name, the shape or the dtype"
        )
    return bool(answer)


def one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """A value that is among the choices."""
    # An array has no truth value that could be compared.
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {described(value)}"
        )
    return value


def flag(name: str, value: Any) -> bool:
    """A truth value known when tracing, since it decides what is computed."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {described(value)}")
    return bool(value)


def random_key(value: Any) -> None:
    """Raises unless the argument `key` is one random key."""
    if not _is_key(value):
        raise TypeError(
            f"key must be one random key, such as jax.random.key(0), got {described(value)}: "
            "use jax.vmap for many"
        )


def _is_key(value: Any) -> bool:
    """Whether a value is one random key, also one of `jax.random.PRNGKey`."""
    if not isinstance(value, jax.Array | np.ndarray):
        return False
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value.shape == ()
    return value.dtype == jnp.uint32 and value.ndim == 1


def function(name: str, value: Any, words: str = "a function") -> None:
    """Raises unless a value can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be {words}, got {described(value)}")


def rank(value: Any, name: str = "rank") -> int:
    """A rank or a count: a non-negative integer known when tracing, since it decides shapes."""
    try:
        if isinstance(value, bool):
            raise TypeError
        known = operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"{name} must be a plain integer, since it decides shapes, got {described(value)}"
        ) from error
    if known < 0:
        raise ValueError(f"{name} must be at least 0, got {known}")
    return known


def for_each_leaf(name: str, value: Any, like: Any) -> list[Any]:
    """For each leaf of `like` what a tree has there, or for a subtree that holds the leaf."""
    given = {tuple(map(str, path)): leaf for path, leaf in tree_leaves_with_path(value)}
    found, used = [], set()
    for path, _ in tree_leaves_with_path(like):
        keys = tuple(map(str, path))
        place = next((keys[:i] for i in range(len(keys) + 1) if keys[:i] in given), None)
        if place is None:
            raise ValueError(
                f"{name} has no number for leaf {path_of(path)}: give one number for all, or one "
                "at each leaf or at a subtree that holds it, as tree.by_name does"
            )
        used.add(place)
        found.append(given[place])
    for path, _ in tree_leaves_with_path(value):
        if tuple(map(str, path)) not in used:
            raise ValueError(f"{name} has a number at {path_of(path)}, where the weights have none")
    return found


def is_tree(value: Any) -> bool:
    """Whether an argument is a tree with a leaf, rather than a leaf itself or nothing."""
    return bool(jax.tree.leaves(value)) and not jax.tree_util.all_leaves([value])


def by_leaf(
    name: str, value: Any, like: Any, checked: Callable[[str, Any], Any] | None = None
) -> Any:
    """A number, or an array of as many as there are leaves where it is a tree, checked each."""
    checked = scalar if checked is None else checked
    if not is_tree(value):
        return checked(name, value)
    paths = [path_of(path) for path, _ in tree_leaves_with_path(like)]
    given = for_each_leaf(name, _in_hand(value), like)
    return _together([checked(f"{name} at leaf {p}", x) for p, x in zip(paths, given, strict=True)])


def _together(numbers: Sequence[Any]) -> Numbers:
    """Numbers, or rows of them, as one array: of NumPy where all are known."""
    if not is_traced(numbers):
        return np.array(np.broadcast_arrays(*numbers) if numbers else [], float)
    wide = accumulator(*(floating(x).dtype for x in numbers))
    return jnp.stack(jnp.broadcast_arrays(*(floating(x).astype(wide) for x in numbers)))


def scalars(name: str, values: LeafCoefficients, count: int, like: Any = None) -> list[Any]:
    """One real number per point, finite where it is known, or one per point and leaf of `like`."""
    if like is not None and _is_tree_of_rows(values, count, like):
        rows = _rows(_in_hand(values), count)
        return [by_leaf(f"{name}[{i}]", x, like) for i, x in enumerate(rows)]
    ordered(name, values)
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} numbers for {count} points: give one number a point"
        )
    # Entries of an array are taken out one by one, each by a program.
    if isinstance(values, jax.Array | np.ndarray) and not is_traced(values):
        values = values.tolist()
    if like is None:
        return [whole(f"{name}[{i}]", value) for i, value in enumerate(values)]
    return [by_leaf(f"{name}[{i}]", value, like) for i, value in enumerate(values)]


def _is_tree_of_rows(values: Any, count: int, like: Any) -> bool:
    """Whether coefficients are a tree with a number a point at each leaf, as a fit returns them."""
    if isinstance(values, Sequence) and jax.tree.structure(values) != jax.tree.structure(like):
        return False
    rows = [] if hasattr(values, "shape") else jax.tree.leaves(values)
    return bool(rows) and all(np.shape(row) == (count,) for row in rows)


def _in_hand(numbers: Any) -> Any:
    """Numbers of leaves that are known, read by one wait for the device, not one each."""
    return numbers if is_traced(numbers) else jax.device_get(numbers)


def _rows(values: Any, count: int) -> list[Any]:
    return [jax.tree.map(lambda row, i=i: row[i], values) for i in range(count)]


def whole(name: str, value: Any) -> ScalarLike:
    """A real number where a tree of them has no meaning."""
    if is_tree(value):
        raise TypeError(
            f"{name} is a tree of numbers, but here a point is taken whole: give one number a "
            "point, or take every leaf by itself, by tree.per_leaf"
        )
    return scalar(name, value)


def ordered(name: str, values: Any) -> None:
    """Raises unless an argument is a sequence or an array: numbers in an order of their own."""
    is_array = hasattr(values, "shape") and hasattr(values, "__len__") and values.shape != ()
    if isinstance(values, str | bytes | bytearray) or not (
        isinstance(values, Sequence) or is_array
    ):
        raise TypeError(
            f"{name} must be a sequence of numbers, such as a list or an array, got "
            f"{described(values)}"
        )


def numbers(name: str, values: LeafCoefficients | None, count: int, like: Any = None) -> Numbers:
    """One real number per point, ones if None; or a row per point, with one per leaf of `like`."""
    if values is None:
        return np.ones(count)
    return _together(scalars(name, values, count, like))


def affine(coefficients: LeafCoefficients | None, count: int, like: Any = None) -> Numbers:
    """Coefficients divided by their sum; equal ones if None; NaN if traced and near zero in sum."""
    given = numbers("coefficients", coefficients, count, like)
    c = to_one(given)
    if isinstance(c, np.ndarray):
        total = c.sum(axis=0)
        bad = cancels(total, np.abs(c).sum(axis=0))
        if np.any(bad):
            place = int(np.argmax(bad))
            own = given if given.ndim == 1 else given[:, place]
            path = (
                ""
                if given.ndim == 1
                else f" at leaf {path_of(tree_leaves_with_path(like)[place][0])}"
            )
            raise ValueError(
                f"coefficients {shortened(str(own.tolist()))}{path} sum to {own.sum():g}, nothing "
                f"beside their size {np.abs(own).sum():g}: an average divides by the sum, so "
                "make it differ from zero"
            )
        return c / total
    total, size = (x.sum(axis=0, keepdims=True) for x in (c, jnp.abs(c)))
    return c / jnp.where(cancels(total, size), jnp.nan, total)


def to_one(c: Numbers) -> Numbers:
    """Numbers whose ratios alone matter, over a power of two: the largest is from 1 to 4 in size.

    Neither their sum nor their squares overflow then, and a cast keeps the largest.
    """
    if isinstance(c, np.ndarray):
        _, exponent = np.frexp(np.abs(c).max(axis=0, initial=0))
        return np.ldexp(c, 1 - exponent)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(c), axis=0, keepdims=True, initial=0))
    mantissa, _ = jnp.frexp(largest)
    # XLA may multiply by the inverse, which must be no subnormal number either.
    unit = jnp.maximum(largest / (4 * mantissa), jnp.finfo(c.dtype).tiny)
    return c / jnp.where(largest > 0, unit, 1)


def cancels(total: Any, size: Any) -> Any:
    """Whether a sum is nothing beside the sum of the sizes, so that nothing is divided by it."""
    return (abs(total) < 1e-6 * size) | (size == 0)


def positive(name: str, values: Coefficients | None, count: int) -> Numbers:
    """One positive number per point, brought to one, since only ratios matter; ones if None.

    NaN where traced and not positive.
    """
    c = numbers(name, values, count)
    if not isinstance(c, np.ndarray):
        return to_one(jnp.where((c > 0) & jnp.isfinite(c), c, jnp.nan))
    if not (c > 0).all():
        raise ValueError(f"{name} must be positive, got {shortened(str(c.tolist()))}")
    return to_one(c)


def matrix_rounding(stored: Iterable[DTypeLike], wide: DTypeLike, rows: int = 1) -> float:
    r"""How far rounded matrices may be from orthonormal, symmetric or positive semidefinite.

    $2\,\varepsilon$ of the coarsest dtype stored, which covers what rounding does to the inner
    products of unit vectors and, beside the largest, to entries and eigenvalues; and
    $64 \sqrt n\,\varepsilon$ of the arithmetic, for eigenvalues of matrices with $n$ rows.
    """
    stored = list(stored)
    return 2 * coarsest_eps(stored) + 64 * rows**0.5 * arithmetic_eps(stored, wide)


def unpacked(numbers: Numbers) -> list[Any]:
    """The numbers, or the rows, one by one; known ones as Python floats, which widen nothing."""
    is_row = isinstance(numbers, np.ndarray) and numbers.ndim == 1
    return numbers.tolist() if is_row else list(numbers)


def refuse(bad: Bool[Array, ""] | bool, message: Callable[[], str]) -> Scalar | float:
    """Raises `ValueError` if `bad` is known to hold; else 0, or NaN where it turns out to hold.

    Added to a result, the number makes the result NaN where it is not defined.
    """
    if is_traced(bad):
        return jnp.where(bad, jnp.nan, 0.0)  # weakly typed, so that it widens nothing
    if bad:
        raise ValueError(message())
    return 0.0


def poisoned(x: Any, bad: Bool[Array, ""] | bool, message: Callable[[], str]) -> Any:
    """`x`, but NaN where `bad` turns out to hold; raises `ValueError` if that is known."""
    return x + refuse(bad, message)


def where_orthonormal(
    x: Any, gram: Float[Array, "... k k"], stored: Iterable[DTypeLike], name: str
) -> Any:
    """`x`, refused unless a Gram matrix is that of vectors orthonormal to their rounding."""
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    off = jnp.max(jnp.abs(gram - eye), initial=0)
    return poisoned(
        x,
        ~(off <= matrix_rounding(stored, gram.dtype)),
        lambda: (
            f"{name} is not orthonormal: its inner products are off by up to {off:.3g}: "
            "orthonormalize it first, trees by geometry.orthonormalize, columns by jnp.linalg.qr"
        ),
    )


def finite(**trees: object) -> None:
    """Raises if a leaf with known values holds NaN or an infinity; traced leaves pass."""
    leaves = [(name, *leaf) for name, x in trees.items() for leaf in tree_leaves_with_path(x)]
    known = [(name, path, jnp.asarray(x)) for name, path, x in leaves if not is_traced(x)]
    arrays = [x for *_, x in known]
    together: dict[Any, Array] = {}  # one flag to read, wherever the leaves lie
    for group in _pieces.groups([arrays]):
        sound = _are_finite([arrays[i] for i in group])
        if is_traced(sound):  # as all is that is computed while something else is traced
            continue
        where = sound.sharding
        together[where] = sound & together[where] if where in together else sound
    if all(map(bool, together.values())):
        return
    name, path, _ = next(row for row in known if not _are_finite([row[-1]]))
    raise ValueError(
        f"leaf {path_of(path)} of {name} holds NaN or an infinity: "
        "no distance or rank is defined for it; mend the weights first"
    )


@jax.jit
def _are_finite(leaves: Sequence[Array]) -> Bool[Array, ""]:
    return functools.reduce(jnp.logical_and, [jnp.isfinite(x).all() for x in leaves])


def measured(
    out_of_range: Bool[Array, ""] | bool, points: Sequence[Any], dtype: Any
) -> Scalar | float:
    """Refuses points that hold NaN, or whose squares, as their dtype rounds them, measure nothing.

    As `refuse`, but a leaf that is not finite is named first.
    """
    if not is_traced(out_of_range) and out_of_range:
        finite(**each("points", points))
    return refuse(
        out_of_range,
        lambda: (
            f"points are so small, near or far that squares of their entries leave the range of "
            f"{dtype}: multiply all points by one number, and the result by its inverse"
        ),
    )
