"""What readers search for, and the pages that should come up, asked of the search of the site.

    mkdocs build -d site
    python -m docs.queries site [QUERY ...]

Each query has its pages, one of which has to be among the first two. The worker that searches in
the browser is run here, in V8, on the index that was built. With queries given, prints what is
found for them.
"""

import argparse
import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from docs.check import engine_with

# A page by its address in the site, and of the reference, where one is meant, the function.
NAMES, RECIPES, QUESTIONS, FRAMEWORKS = "names/", "recipes/", "questions/", "frameworks/"
COMING, COMMANDS, START, CONVENTIONS = "coming-from/", "commands/", "start-here/", "conventions/"
QUERIES = {
    # What a newcomer asked, as far as it was written down.
    "flax": [FRAMEWORKS],
    "equinox": [FRAMEWORKS],
    "nnx": [FRAMEWORKS],
    "haiku": [FRAMEWORKS],
    "LAWA": ["api/average/", NAMES],
    "lookahead": [NAMES, "api/average/"],
    "ensemble": [NAMES, QUESTIONS, "strength/", "averages-no-member-is/"],
    "cite": ["citing/"],
    "quantization": [NAMES],
    "SWA": ["api/average/", NAMES],
    "loss landscape": [RECIPES, NAMES, "gallery/", "api/plot/"],
    "linear mode connectivity": [NAMES, START, RECIPES],
    "RegMean": ["api/average/", NAMES],
    "install": ["", START],
    "git re-basin": [COMING, NAMES],
    "PyTorch": [COMING, FRAMEWORKS, QUESTIONS, COMMANDS],
    "ties": ["api/merge/"],
    # The same for the names of the literature.
    "EMA": ["api/average/", NAMES],
    "Polyak averaging": ["api/average/", NAMES],
    "optax.incremental_update": [COMING, NAMES],
    "post-hoc EMA": ["api/average/", NAMES],
    "model soup": ["api/soup/", NAMES],
    "greedy soup": ["api/soup/"],
    "WiSE-FT": ["api/interpolate/", NAMES],
    "SLERP": ["api/interpolate/", NAMES],
    "Fisher merging": ["api/average/", NAMES],
    "K-FAC": ["api/average/", NAMES],
    "task vector": ["api/merge/"],
    "task negation": ["api/merge/", NAMES, RECIPES],
    "DARE": ["api/merge/"],
    "DELLA": ["api/merge/"],
    "breadcrumbs": ["api/merge/"],
    "TSV-M": ["api/merge/", NAMES],
    "Iso-C": ["api/merge/", NAMES],
    "KnOTS": ["api/merge/"],
    "LiNeS": ["api/merge/"],
    "EMR merging": ["api/merge/", NAMES],
    "TALL masks": ["api/merge/", NAMES],
    "Model Stock": ["api/average/", NAMES],
    "AdaMerging": ["api/fit/", NAMES],
    "mode connectivity": [NAMES, "api/interpolate/", START],
    "Bezier curve": ["api/interpolate/", NAMES],
    "filter normalization": ["api/perturb/", NAMES],
    "LoRA extraction": [NAMES, "api/lowrank/", RECIPES, COMMANDS],
    "merge_and_unload": [COMING, NAMES],
    "add_weighted_adapter": [COMING, NAMES],
    "LEACE": ["api/negative/", NAMES],
    "ROME": ["api/negative/", NAMES],
    "classifier-free guidance": ["api/negative/", "negative-weight/", NAMES],
    "negative prompt": ["api/negative/", "negative-weight/", NAMES],
    "textual inversion": ["api/fit/", NAMES],
    "ZipIt": [NAMES],
    "permutation alignment": [NAMES, RECIPES, COMING],
    # And of others.
    "everything is NaN": [QUESTIONS],
    "safetensors": ["api/checkpoint/", FRAMEWORKS],
    "bfloat16": [CONVENTIONS, "negative-weight/", "degenerate/"],
    "hugging face": [FRAMEWORKS, COMMANDS],
    "orbax": ["api/checkpoint/", FRAMEWORKS, "many-devices/"],
    "out of memory": ["larger-than-memory/"],
    "sharding": ["many-devices/", "api/checkpoint/"],
    "batch norm": [QUESTIONS],
    "optimizer state": [QUESTIONS, FRAMEWORKS],
    "coefficients per layer": [RECIPES, QUESTIONS, "api/fit/"],
    "unlearning": [NAMES, "api/fit/"],
    "compile time": [QUESTIONS],
    "mergekit": [COMING, COMMANDS],
    "PEFT": [COMING],
    "yaml recipe": [COMMANDS, COMING],
    "changelog": ["changelog/"],
    "license": ["licence/"],
    "hypothesis": ["api/testing/", "testing-operators/", "own-method/"],
    "my own method": ["own-method/"],
    "audit margin": ["reading-an-audit/", "api/negative/", QUESTIONS],
    "plot": ["api/plot/", "gallery/"],
    "barrier": [RECIPES, START],
    "top-k": ["api/selection/", NAMES, "low-rank/"],
    "random key": ["api/tree/", CONVENTIONS],
}


class Search:
    """The search of a site. It is to be closed."""

    def __init__(self, worker: pathlib.Path, index: dict[str, Any]) -> None:
        """Starts the worker, a script, with an index."""
        around = (
            "var self = this, answers = [], heard, URL;"
            "var addEventListener = (_, listener) => { heard = listener; };"
            "var postMessage = (answer) => { answers.push(answer); };"
        )
        setup = _message(0, index | {"options": {"suggest": True}})
        self._engine = engine_with(around, worker.read_text(), setup)

    def pages(self, query: str) -> list[str]:
        """The pages found, best first."""
        self._engine.eval(_message(2, query))
        (answer,) = json.loads(self._engine.eval("JSON.stringify(answers)"))
        return [group[0]["location"].split("#")[0] for group in answer["data"]["items"]]

    def close(self) -> None:
        """Ends the engine."""
        self._engine.close()


def _message(kind: int, data: Any) -> str:
    return f"answers = []; heard({json.dumps({'data': {'type': kind, 'data': data}})})"


@contextlib.contextmanager
def search(site: pathlib.Path) -> Iterator[Search]:
    """The search of a built site."""
    (worker,) = site.glob("assets/javascripts/workers/search.*.min.js")
    index = json.loads((site / "search" / "search_index.json").read_text())
    with contextlib.closing(Search(worker, index)) as found:
        yield found


def missed(found: Search, queries: dict[str, list[str]]) -> list[str]:
    """The queries none of whose pages is among the first two, and what is there."""
    first = {query: found.pages(query)[:2] for query in queries}
    return [
        f"{query!r}: found {first[query]}, not {pages}"
        for query, pages in queries.items()
        if not set(pages) & set(first[query])
    ]


def main() -> None:
    """Prints the queries that miss, and fails if any does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=pathlib.Path)
    parser.add_argument("queries", nargs="*")
    given = parser.parse_args()
    with search(given.site) as found:
        for query in given.queries:
            print(f"{query}: {', '.join(x or 'home' for x in found.pages(query)[:5]) or 'nothing'}")
        wrong = [] if given.queries else missed(found, QUERIES)
    for line in wrong:
        print(line)
    if not given.queries:
        print(f"{len(QUERIES) - len(wrong)} of {len(QUERIES)} queries find their page")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
