"""The check of the built pages: it finds each fault in a small page that has it, and no other."""

import contextlib
import json
import pathlib
import re

import pytest

pytest.importorskip("py_mini_racer")
pytest.importorskip("matplotlib")

from docs import check, queries

LONG = "x" * 100
WIDE = r"\sum_i a_i + " * 20


def page(article, nav="", head=""):
    return (
        f"<html><head>{head}</head><body><nav class='md-nav md-nav--primary'><a href='.'>Home</a>"
        f"{nav}</nav><article>{article}</article></body></html>"
    )


def table(*cells):
    return f"<table><tbody><tr>{''.join(f'<td>{x}</td>' for x in cells)}</tr></tbody></table>"


def found(folder, article, *, files=(), **frame):
    (folder / "index.html").write_text(page(article, **frame))
    for name, text in dict(files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return [what for _, what in check.faults(folder)]


@pytest.fixture(scope="module")
def ruler():
    with contextlib.closing(check.Ruler()) as ruler:
        yield ruler


def test_a_page_without_fault_passes(tmp_path):
    article = (
        "<h2 id='here'>Here</h2><a href='#here'>up</a> <a href='https://example.org'>out</a>"
        "<p>Brackets [as here] (and here), <code>x[0][1]</code> and <code>f(x)[y]</code></p>"
        "<pre><code>[text][wspace.tree] and $$</code></pre><img src='a.svg'>"
        r"<div class='arithmatex'>\[x^2\]</div><span class='arithmatex'>\(x_{i}\)</span>"
    )
    assert not found(tmp_path, article + table("one", LONG[:50]), files={"a.svg": "<svg/>"})


@pytest.mark.parametrize(
    ("article", "what"),
    [
        ("<a href='#there'>x</a>", "no anchor"),
        ("<a href='there/'>x</a>", "no page"),
        ("<h2 id='a'>x</h2><h2 id='a'>y</h2>", "two places"),
        ("<p>see [<code>f</code>][wspace.f]</p>", "raw on the page"),
        ("<p>see [this][]</p>", "raw on the page"),
        ("<p>see [this](other.md)</p>", "raw on the page"),
        (r"<p>so \(x\)</p>", "raw on the page"),
        ("<p>so $$x$$</p>", "raw on the page"),
        ("<p>Digits. {: .caption }</p>", "raw on the page"),
        ("<ul><li><code>A [`S`][wspace.S]</code></li></ul>", "raw in code"),
        (
            "<ul><li class='doc-section-item'><code>The weights</code> more</li></ul>",
            "a sentence as a type",
        ),
        (table("a", f"<code>{LONG}</code>"), "a table of"),
        (table(*[LONG[:20]] * 6), "a table of"),
        (table(rf"<span class='arithmatex'>\({{{WIDE}}}\)</span>"), "a table of"),
        (rf"<div class='arithmatex'>\[{WIDE}\]</div>", "a formula of"),
        (rf"<p><span class='arithmatex'>\({{{WIDE}}}\)</span></p>", "a formula of"),
        (r"<div class='arithmatex'>\[\frac{x\]</div>", "cannot be measured"),
        ("<script src='https://example.org/x.js'></script>", "from outside"),
        ("<img src='//example.org/x.png'>", "from outside"),
        ("<img src='a.svg' srcset='a.svg, https://example.org/x.png 2x'>", "from outside"),
        ("<link rel='stylesheet' href='https://example.org/x.css'>", "from outside"),
        ("<style>@import 'https://example.org/x.css';</style>", "from outside"),
        ("<p style='background: url(https://example.org/x.png)'>x</p>", "from outside"),
        ("<iframe src='http://example.org'></iframe>", "from outside"),
        ("<pre class='mermaid'><code>graph</code></pre>", "from outside"),
    ],
)
def test_a_fault_is_found(article, what, tmp_path):
    assert what in found(tmp_path, article, files={"a.svg": "<svg/>"})[0]


def test_a_style_sheet_that_loads_from_outside_is_found(tmp_path):
    style = "@font-face { src: url(https://example.org/x.woff2) }"
    assert "from outside" in found(tmp_path, "", files={"a.css": style})[0]


def test_a_page_that_no_navigation_reaches_is_found(tmp_path):
    files = {"other/index.html": page("<p>x</p>")}
    links = "<a href='other/'>x</a>"
    (one,) = found(tmp_path, links, files=files)
    assert "no navigation" in one
    assert not found(tmp_path, "", nav=links, files=files)


def test_a_folder_without_pages_does_not_pass(tmp_path):
    with pytest.raises(ValueError, match="build it by mkdocs"):
        list(check.faults(tmp_path))


def test_a_formula_is_as_wide_as_its_symbols(ruler):
    # The tables of KaTeX, in ems: x is 0.57153, a relation has 5/18 to either side.
    (x,) = ruler.formula("x", True)
    (equation,) = ruler.formula("x = x", True)
    assert x == pytest.approx(0.57153)
    assert equation == pytest.approx(2 * x + 0.77778 + 2 * 5 / 18, rel=1e-3)
    (script,) = ruler.formula("2^{2}", True)
    assert script == pytest.approx(0.5 + 0.7 * 0.5 + 0.05, rel=1e-3)
    rows = ruler.formula(r"\begin{aligned} x &= x \\ x &= x + x \end{aligned}", True)
    assert rows == pytest.approx(ruler.formula(r"\begin{aligned} x &= x + x \end{aligned}", True))


def test_what_breaks_in_a_line_counts_part_by_part(ruler):
    parts = ruler.formula("a = b", False)
    assert len(parts) == 2
    assert sum(parts) == pytest.approx(ruler.formula("a = b", True)[0])


@pytest.fixture(scope="module")
def searched():
    material = pytest.importorskip("material")
    scripts = pathlib.Path(material.__file__).parent / "templates" / "assets" / "javascripts"
    (worker,) = scripts.glob("workers/search.*.min.js")
    config = {
        "lang": ["en"],
        "separator": r"[\s\-,:!=\[\]()\"/`_]+|\.(?!\d)|&[lg]t;",
        "pipeline": ["stopWordFilter"],
        "fields": {"title": {"boost": 1000.0}, "text": {"boost": 1.0}, "tags": {"boost": 1e6}},
    }
    docs = [
        {"location": "one/", "title": "Means", "text": "The latest few (LAWA), of one run."},
        {"location": "one/#two", "title": "running_mean", "text": "Means of all, lawa too."},
        {"location": "three/", "title": "Paths", "text": "Between lawa and lawa, lawa."},
        {"location": "four/", "title": "LAWA", "text": "Nothing."},
    ]
    with contextlib.closing(queries.Search(worker, {"config": config, "docs": docs})) as found:
        yield found


def test_the_search_of_the_site_finds_pages_in_their_order(searched):
    assert searched.pages("lawa")[0] == "four/"  # a title counts for more
    assert set(searched.pages("lawa")) == {"one/", "three/", "four/"}
    assert searched.pages("running")[0] == "one/"  # a section is found, its page is said
    assert searched.pages("nowhere") == []


def test_a_query_whose_page_is_not_among_the_first_two_is_missed(searched):
    assert not queries.missed(searched, {"running": ["one/"], "lawa": ["four/", "elsewhere/"]})
    (line,) = queries.missed(searched, {"lawa": ["elsewhere/"], "run": ["one/"]})
    assert line.startswith("'lawa': found ['four/'")
    assert queries.missed(searched, {"nowhere": ["one/"]})


@pytest.mark.parametrize(
    ("shown", "copied"),
    [
        (">>> x = 1\n>>> for i in x:\n...     f(i)\n1\n", "x = 1\nfor i in x:\n    f(i)"),
        ("$ wspace merge \\\n    A\nwrote A\n$ ls\n", "wspace merge \\\n    A\nls"),
        ("x = 1\nprint(x)  # > 0\n", None),
    ],
)
def test_what_was_typed_is_copied_alone(shown, copied):
    py_mini_racer = pytest.importorskip("py_mini_racer")
    with contextlib.closing(py_mini_racer.MiniRacer()) as engine:
        engine.eval(
            "var copied = null, addEventListener = () => {};"
            "const parentElement = { setAttribute: (_, text) => { copied = text; } };"
            f"const code = {{ textContent: {json.dumps(shown)}, parentElement }};"
            "var document = { fonts: { ready: { then() {} } },"
            "querySelectorAll: (selector) => selector === 'pre > code' ? [code] : [] };"
        )
        engine.eval((pathlib.Path(check.__file__).parent / "assets" / "frame.js").read_text())
        assert json.loads(engine.eval("JSON.stringify(copied)")) == copied


def test_the_check_has_the_sizes_of_the_style_sheet():
    style = (pathlib.Path(check.__file__).parent / "assets" / "extra.css").read_text()
    rules = dict(re.findall(r"^([.:][^{}]*) \{([^{}]*)\}", style, re.MULTILINE))
    cells = ".md-typeset table:not([class])"
    assert f"font-size: {check.FORMULA}em" in rules[".md-typeset .katex"]
    assert f"padding: 0.6em {check.PADDING}em" in rules[f"{cells} th,\n{cells} td"]
    assert f"padding-inline: {check.NARROW}em" in rules[f"{cells}:has(th:nth-child(8)) :is(th, td)"]
