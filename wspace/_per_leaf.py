"""A function of trees, leaf by leaf: every leaf is a tree of its own."""

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves_with_path

from wspace import _checks


def in_passes(
    steps: Callable[..., Generator[tuple[Callable[..., Any], tuple[Any, ...]], Any, Any]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a function of trees whose entries are read, few numbers are solved for, and used.

    `steps` takes what the function takes, measures, yields a solver and its arguments, is sent what
    the solver returned, and returns the function's result. Under tracing `per_leaf` then solves for
    all leaves of one dtype together, where each would otherwise be compiled by itself.
    """

    def marked(function: Callable[..., Any]) -> Callable[..., Any]:
        vars(function)["steps"] = steps
        return function

    return marked


def run_steps(steps: Generator[tuple[Callable[..., Any], tuple[Any, ...]], Any, Any]) -> Any:
    """The result of a function by its steps, as `in_passes` takes them."""
    solve, numbers = next(steps)
    return _finished(steps, solve(*numbers))


def _finished(steps: Generator[Any, Any, Any], solved: Any) -> Any:
    try:
        steps.send(solved)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("steps yield once")


def _run_together(several: Sequence[Generator[Any, Any, Any]]) -> list[Any]:
    """The results of several runs of one function, solved at once where numbers share a dtype."""
    asked = [next(steps) for steps in several]
    alike: dict[Any, list[int]] = {}
    for i, (_, numbers) in enumerate(asked):
        alike.setdefault(tuple(jnp.asarray(n).dtype for n in numbers), []).append(i)
    results: list[Any] = [None] * len(several)
    for indices in alike.values():
        numbers = [asked[i][1] for i in indices]
        solved = jax.vmap(asked[0][0])(*jax.tree.map(lambda *xs: jnp.stack(xs), *numbers))
        for k, i in enumerate(indices):
            results[i] = _finished(several[i], jax.tree.map(lambda x, k=k: x[k], solved))
    return results


def per_leaf(function: Callable[..., Any], *, many: int | None = None) -> Callable[..., Any]:
    r"""The form of a function that treats every leaf as a point of its own.

    An array is a tree, so `per_leaf(slerp)` turns each tensor by its own angle, where `slerp`
    turns the whole model by one.

    Args:
        function: A function of trees.
        many: How many of its first arguments are sequences of trees, 0 or 1. The functions of this
            library say so themselves: 1 for [`average.mean`][wspace.average.mean], 0 for
            [`interpolate.lerp`][wspace.interpolate.lerp]. For others it is 0, and must be given
            where the first argument may be read both ways: a list of trees of one layout.

    Returns:
        A function of the same arguments. Those with the structure of the first one's tree are
        taken apart, alone or in lists; others, such as scalars, are passed on. What `function`
        returns for a leaf comes back with a tree in place of each array.

    Raises:
        TypeError: If the first argument is one tree where a sequence of trees is meant.
        ValueError: If an argument may be read both ways: as a sequence of trees or as one; or, a
            list of numbers, as one number a point or as one a leaf.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average, tree
        >>> tree.per_leaf(tree.norm)({"w": jnp.array([3.0, 4.0]), "b": jnp.array([2.0])})
        {'b': Array(2., dtype=float32), 'w': Array(5., dtype=float32)}
        >>> tree.per_leaf(average.mean)([{"w": jnp.zeros(1)}, {"w": jnp.ones(1)}])
        {'w': Array([0.5], dtype=float32)}
    """
    name = _unwrapped(function, "__name__") or "the function"

    @functools.wraps(function)
    def leafwise(first: Any, *args: Any, **kwargs: Any) -> Any:
        takes_points = _takes_points(function, first, name) if many is None else bool(many)
        firsts = _checks.listed(f"the first argument of {name}", first) if takes_points else [first]
        structure = jax.tree.structure(firsts[0])
        paths = [_checks.path_of(path) for path, _ in tree_leaves_with_path(firsts[0])]

        def leaves_of(where: str, argument: Any) -> list[Any]:
            if jax.tree.structure(argument) == structure:
                if _is_list_of_numbers(argument):
                    raise ValueError(
                        f"{where} of {name} is a list of {len(argument)} numbers, and so many "
                        "leaves have the trees: give an array for one number a point, or a tree "
                        "of arrays for one a leaf"
                    )
                return jax.tree.leaves(argument)
            is_list = isinstance(argument, list | tuple) and len(argument) > 0
            if is_list and all(jax.tree.structure(x) == structure for x in argument):
                return [list(xs) for xs in zip(*map(jax.tree.leaves, argument), strict=True)]
            return [argument] * structure.num_leaves

        if not structure.num_leaves:
            return firsts[0]
        leading = [list(xs) for xs in zip(*map(structure.flatten_up_to, firsts), strict=True)]
        given = [leaves_of(f"argument {i}", value) for i, value in enumerate(args, 2)]
        rows = list(zip(*given, strict=True)) if given else [()] * len(leading)
        options = {key: leaves_of(key, value) for key, value in kwargs.items()}
        steps = _unwrapped(function, "steps") if _checks.is_traced(first, args, kwargs) else None
        results = []
        for i, (xs, row) in enumerate(zip(leading, rows, strict=True)):
            own = {key: values[i] for key, values in options.items()}
            try:
                results.append((steps or function)(xs if takes_points else xs[0], *row, **own))
            except (TypeError, ValueError) as error:
                error.add_note(f"where (root) is leaf {paths[i]}, taken by itself")
                raise
        if steps:
            results = _run_together(results)
        inner = jax.tree.structure(results[0])
        return jax.tree.transpose(structure, inner, structure.unflatten(results))

    return leafwise


def _unwrapped(function: Any, name: str) -> Any:
    """An attribute of a function, or for a partial one of the function it is made of."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, name, None)


def _takes_points(function: Any, first: Any, name: str) -> bool:
    """Whether a function's first argument is a sequence of trees, as far as that is known."""
    if _unwrapped(function, "takes_points"):
        return True
    module = _unwrapped(function, "__module__") or ""
    if module.startswith("wspace.") or not isinstance(first, list | tuple) or len(first) < 2:
        return False
    layouts = {
        (jax.tree.structure(x), tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(x)))
        for x in first
        if not hasattr(first, "_fields")
    }
    if len(layouts) == 1:
        raise ValueError(
            f"the first argument of {name} is {len(first)} trees of one layout: give per_leaf "
            "many=1 if they are points, or many=0 if together they are one tree"
        )
    return False


def _is_list_of_numbers(argument: Any) -> bool:
    is_list = isinstance(argument, list | tuple) and len(argument) > 0
    return is_list and all(isinstance(x, int | float) for x in argument)
