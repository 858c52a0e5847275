"""The pages: their code runs, their pictures are what the script draws, nothing is loaded."""

import contextlib
import importlib.util
import inspect
import io
import pathlib
import re
import tomllib

import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

from tests.helpers import same_picture
from wspace import merge, negative

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [page for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))] if page.exists()]
ASSETS = [
    file
    for file in [ROOT / "mkdocs.yml", *sorted(DOCS.rglob("*"))]
    if file.suffix in (".yml", ".md", ".css", ".js", ".svg", ".html")
]
OUTSIDE = r"(?:https?:)?//[\w.]"
LOADS = re.compile(
    "|".join(
        (
            rf"\b(?:src|srcset|data|poster)\s*=\s*[\"']?\s*{OUTSIDE}",  # an element
            rf"<link\b[^>]*\bhref\s*=\s*[\"']?\s*{OUTSIDE}",
            rf"<(?:image|use)\b[^>]*\bhref\s*=\s*[\"']?\s*{OUTSIDE}",
            rf"!\[[^\]]*\]\(\s*<?{OUTSIDE}",  # a picture in Markdown
            rf"url\(\s*[\"']?\s*{OUTSIDE}",  # a style sheet
            rf"@import\s+[\"']{OUTSIDE}",
            rf"\b(?:fetch|import|importScripts)\s*\(\s*[\"'`]{OUTSIDE}",  # a script
            rf"^\s*-\s*[\"']?{OUTSIDE}",  # a list in mkdocs.yml, such as extra_javascript
        )
    ),
    re.MULTILINE,
)


def name(file):
    return str(file.relative_to(ROOT))


OUTPUT = re.compile(r"\n\s*```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run(page, *, compared=True):
    """Runs the Python blocks of a page, and compares what they print with the text block below."""
    for example in Document.parse(str(page), PythonCodeBlockParser()):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            example.evaluate()
        shown = OUTPUT.match(example.document.text, example.region.end)
        if shown and compared:
            assert printed.getvalue() == shown[1], f"{page.name}, line {example.line}"


@pytest.mark.float32(reason="a page shows what its code prints in float32")
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_code_of_a_page_runs_and_prints_what_it_shows(page, pytestconfig):
    # Where signatures are checked, jaxtyping refuses first, in other words.
    run(page, compared=not pytestconfig.getoption("jaxtyping_packages"))


def test_a_page_that_shows_another_output_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n1\n```\n\n```python\nprint(2)\n```\n")
    run(page)
    page.write_text("```python\nprint(1)\n```\n\nThis prints:\n\n```text\n2\n```\n")
    run(page)
    page.write_text("```python\nprint(1)\n```\n\n```text\n1\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 1"):
        run(page)


@pytest.mark.parametrize("file", ASSETS, ids=name)
def test_a_page_loads_nothing_from_outside(file):
    assert not LOADS.findall(file.read_text())


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://example.org/x.js"></script>',
        "<img src='//example.org/x.png'>",
        '<link rel="stylesheet" href="https://example.org/x.css">',
        "![a picture](https://example.org/x.svg)",
        "@font-face { src: url(https://example.org/x.woff2) }",
        "@import 'https://example.org/x.css';",
        "extra_javascript:\n  - https://example.org/x.js",
    ],
)
def test_what_would_load_from_outside_is_recognized(text):
    assert LOADS.search(text)


def test_a_link_is_not_taken_for_a_load():
    assert not LOADS.search("[arXiv](https://arxiv.org/abs/1912.05671), <https://arxiv.org>")


def test_what_is_cited_is_this_version():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert cited == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_reference_takes_what_a_package_exports_and_not_its_files():
    griffe = pytest.importorskip("griffe")
    extensions = griffe.load_extensions(str(DOCS / "members.py"))
    package = griffe.load("wspace", search_paths=[ROOT], extensions=extensions)
    for module in (merge, negative):
        found = package[module.__name__.removeprefix("wspace.")]
        for name in module.__all__:
            assert found[name].is_module == inspect.ismodule(getattr(module, name)), name


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("assets")
    script.main(folder)
    return folder


@pytest.mark.float32(reason="pictures are drawn from results in float32")
def test_every_picture_is_drawn(drawn):
    kept = {file.name for file in (DOCS / "assets").glob("*.svg")}
    assert kept == {file.name for file in drawn.iterdir()}


@pytest.mark.float32(reason="pictures are drawn from results in float32")
@pytest.mark.parametrize("picture", sorted(file.name for file in DOCS.glob("assets/*.svg")))
def test_a_picture_is_what_the_script_draws(picture, drawn):
    same_picture(DOCS / "assets" / picture, drawn / picture)
