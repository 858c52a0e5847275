"""What a reader would stumble over on the built pages: found without a browser.

    mkdocs build -d site
    python -m docs.check site

Prints and fails on: a link without target, or with two; a reference, a formula or an attribute that
stands on the page as it was written; a table or a formula that is wider than its column on a screen
of 1400 pixels; anything that is loaded from outside; a page that no navigation leads to.

Formulas are laid out by KaTeX itself, in V8. Words are measured in DejaVu, which is wider than what
most readers have. `benchmarks/pages.py` measures the same in a browser.
"""

import argparse
import dataclasses
import functools
import html.parser
import json
import pathlib
import re
import sys
import urllib.parse
from collections.abc import Iterator

import matplotlib as mpl
from fontTools.ttLib import TTFont
from py_mini_racer import MiniRacer

KATEX = pathlib.Path(__file__).parent / "assets" / "katex" / "katex.min.js"
COLUMN = 688.0  # pixels of the text, on a screen of 1400
TEXT, SMALL, CODE, FORMULA = 16.0, 12.8, 0.85, 1.08  # fonts: of text, of tables; in those: of code
PADDING, NARROW = 0.8, 0.5  # of a cell, and in tables of eight columns or more
OUTSIDE = re.compile(r"\s*(?:https?:)?//", re.IGNORECASE)
RAW = re.compile(r"\[[^\]\n]*\]\[[^\]\n]*\]|\]\([\w./#-]+\)|\\[(\[]|\$\$|(?<!\w)\{ ?[:.#][^}\n]*\}")
RAW_IN_CODE = re.compile(r"\]\[(?:wspace|jax|numpy)\b[^\]]*\]")
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
LOADED = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "audio": ("src",),
    "video": ("src", "poster"),
    "embed": ("src",),
    "object": ("data",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
    "link": ("href",),
}

# Widths as the style sheet of KaTeX makes them: boxes stand beside each other, but for the lines of
# a stack, of which the widest counts. What is unknown is an error.
LAYOUT = r"""
var self = this;
const SIZES = [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.44, 1.728, 2.074, 2.488];
const WRITTEN = {mathnormal: "", mathrm: "\\mathrm", textrm: "\\textrm", mathbf: "\\mathbf",
  mathit: "\\mathit", text: "\\text", mathsf: "\\mathsf", mathtt: "\\mathtt", mathbb: "\\mathbb",
  mathcal: "\\mathcal", amsrm: "", mord: "", mop: "\\mathrm", mopen: "", mclose: "",
  minner: "", mpunct: "", mrel: "", mbin: ""};
const em = (length) => {
  if (!length) return 0;
  if (!/^-?[\d.]+em$/.test(length)) throw new Error(`no width of ${length}`);
  return parseFloat(length);
};
const alone = (letter, name) =>
  widest(katex.__renderToHTMLTree(
    `${WRITTEN[name]}{${"{}%#&$_".includes(letter) ? "\\" : ""}${letter}}`, {displayMode: true}));
const symbol = (node) => {
  if (node.text.length === 1 || /^[\u200b\ud800-\udbff]/.test(node.text)) return node.width;
  // The class of the font stands behind the class of the kind.
  const name = node.classes.findLast((x) => x in WRITTEN);
  if (name === undefined) throw new Error(`no width of ${node.text} in ${node.classes}`);
  return [...node.text].reduce((sum, x) => sum + (x === "\u00a0" ? 0.25 : alone(x, name)), 0);
};
const width = (node) => {
  const has = (name) => node.classes?.includes(name), style = node.style ?? {};
  let inner;
  if (node.text !== undefined) inner = symbol(node) + Math.max(0, node.italic ?? 0);
  else if (has("rlap") || has("llap") || has("clap") || has("vlist-s")) inner = 0;
  else if (has("nulldelimiter")) inner = 0.12;
  else {
    const widths = (node.children ?? []).map(width);
    inner = has("vlist") || has("vlist-t")
      ? Math.max(0, ...widths) : widths.reduce((sum, x) => sum + x, 0);
  }
  inner = Math.max(inner, em(style.minWidth), em(style.width));
  for (const side of ["marginLeft", "marginRight", "paddingLeft", "paddingRight"])
    inner += em(style[side]);
  if (has("katex-root")) inner -= 0.2777777778;
  const size = (prefix) => {
    const found = node.classes?.find((x) => x.startsWith(prefix));
    return found && SIZES[parseInt(found.slice(prefix.length)) - 1];
  };
  return size("reset-size") ? (inner * size("size")) / size("reset-size") : inner;
};
const bases = (node) =>
  node.classes?.includes("katex-base") ? [node] : (node.children ?? []).flatMap(bases);
const widest = (tree) => bases(tree).reduce((sum, x) => sum + width(x), 0);
// In ems: of a displayed formula the whole width, of one in a line what does not break.
const laidOut = (tex, displayMode) => {
  const parts = bases(katex.__renderToHTMLTree(tex, {displayMode, throwOnError: true})).map(width);
  return displayMode ? [parts.reduce((sum, x) => sum + x, 0)] : parts;
};
const measured = (tex, displayMode) => {
  try {
    return JSON.stringify(laidOut(tex, displayMode));
  } catch (error) {
    return JSON.stringify(error.message);
  }
};
"""


@dataclasses.dataclass
class Node:
    """An element of a page."""

    tag: str
    attributes: dict[str, str]
    parent: "Node | None"
    children: list["Node | str"] = dataclasses.field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """Its classes."""
        return self.attributes.get("class", "").split()

    def all(self) -> Iterator["Node"]:
        """Itself and all elements in it."""
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.all()

    def around(self) -> Iterator["Node"]:
        """The elements that it is in, from the inside out."""
        if self.parent:
            yield self.parent
            yield from self.parent.around()

    def text(self) -> str:
        """All text in it."""
        return "".join(x if isinstance(x, str) else x.text() for x in self.children)


class _Parser(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = self._open = Node("page", {}, None)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs}, self._open)
        self._open.children.append(node)
        if tag not in VOID:
            self._open = node

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.children.append(Node(tag, {k: v or "" for k, v in attrs}, self._open))

    def handle_endtag(self, tag: str) -> None:
        for node in (self._open, *self._open.around()):
            if node.tag == tag and node.parent:
                self._open = node.parent
                return

    def handle_data(self, data: str) -> None:
        self._open.children.append(data)


def parsed(text: str) -> Node:
    """A page as a tree."""
    parser = _Parser()
    parser.feed(text)
    return parser.root


def content(page: Node) -> Node:
    """What the page itself says: all of it but the frame."""
    return next((x for x in page.all() if x.tag == "article"), page)


def engine_with(*scripts: str) -> MiniRacer:
    """V8 with scripts in it. It is to be closed, or Python does not end."""
    engine = MiniRacer()
    try:
        for script in scripts:
            engine.eval(script)
    except BaseException:
        engine.close()
        raise
    return engine


class Ruler:
    """Widths in pixels, of words and of formulas. It is to be closed."""

    def __init__(self) -> None:
        """Starts the engine, with KaTeX in it."""
        folder = pathlib.Path(mpl.get_data_path(), "fonts", "ttf")
        self._fonts = {
            style: _advances(folder / f"DejaVuSans{style}.ttf") for style in ("", "-Bold", "Mono")
        }
        self._engine = engine_with(LAYOUT, KATEX.read_text())
        self.formula = functools.cache(self._formula)

    def close(self) -> None:
        """Ends the engine."""
        self._engine.close()

    def word(self, text: str, size: float, style: str = "") -> float:
        """The width of a word."""
        advances = self._fonts[style]
        return size * sum(advances.get(ord(x), 1.0) for x in text)

    def _formula(self, tex: str, displayed: bool) -> list[float]:
        given = f"measured({json.dumps(tex)}, {json.dumps(displayed)})"
        widths = json.loads(self._engine.eval(given))
        if isinstance(widths, str):
            raise ValueError(widths)
        return widths


def _advances(file: pathlib.Path) -> dict[int, float]:
    font = TTFont(file)
    unit, advances = font["head"].unitsPerEm, font["hmtx"].metrics
    return {x: advances[name][0] / unit for x, name in font.getBestCmap().items()}


def column(node: Node) -> float:
    """The width that an element of a page can take."""
    width = COLUMN
    for x in node.around():
        if x.tag == "article":
            break
        small = any(y.tag == "details" or "admonition" in y.classes for y in (x, *x.around()))
        font = SMALL if small else TEXT
        if x.tag == "li":
            width -= 1.25 * font
        elif x.tag == "blockquote":
            width -= 0.6 * 20 + 4
        elif x.tag == "details" or "admonition" in x.classes:
            width -= 2 * 0.6 * 20 + 2
    return width


def formulas(page: Node) -> Iterator[tuple[Node, str, bool]]:
    """The formulas of a page, what was written for each, and whether it is displayed."""
    for node in page.all():
        if "arithmatex" in node.classes:
            tex = node.text().strip()
            opened, closed = tex[:2], tex[-2:]
            if (opened, closed) not in ((r"\(", r"\)"), (r"\[", r"\]")):
                raise ValueError(f"a formula without delimiters: {tex[:60]}")
            yield node, tex[2:-2].strip(), opened == r"\["


def least_width(table: Node, ruler: Ruler) -> float:
    """The least width of a table: in each of its columns the longest that does not break."""
    rows = [x for x in table.all() if x.tag == "tr"]
    cells = [[x for x in row.children if isinstance(x, Node)] for row in rows]
    count = max(len(row) for row in cells)
    padding = (NARROW if count >= 8 else PADDING) * SMALL
    columns = [0.0] * count
    for row in cells:
        for i, cell in enumerate(row):
            columns[i] = max(columns[i], _longest(cell, ruler, cell.tag == "th") + 2 * padding)
    return sum(columns) + 2


def _longest(cell: Node, ruler: Ruler, bold: bool) -> float:
    longest = run = 0.0
    for width in _pieces(cell, ruler, "-Bold" if bold else ""):
        run = 0.0 if width is None else run + width
        longest = max(longest, run)
    return longest


def _pieces(node: Node, ruler: Ruler, style: str) -> Iterator[float | None]:
    """Widths of what stands in a line, with None where it may break."""
    for child in node.children:
        if isinstance(child, str):
            for part in re.split(r"(\s+)", child.replace("\u00a0", "_")):
                if part:
                    yield None if part.isspace() else ruler.word(part, SMALL, style)
        elif child.tag == "br":
            yield None
        elif child.tag == "code":
            # Code in tables does not break, and has padding.
            yield ruler.word(child.text(), CODE * SMALL, "Mono") + 2 * 0.2941176471 * CODE * SMALL
        elif "arithmatex" in child.classes:
            ((_, tex, displayed),) = formulas(child)
            yield from _breaking([x * FORMULA * SMALL for x in ruler.formula(tex, displayed)])
        elif "headerlink" not in child.classes:
            yield from _pieces(child, ruler, "-Bold" if child.tag in ("strong", "b") else style)


def formula_width(node: Node, tex: str, displayed: bool, ruler: Ruler) -> float:
    """The width of a formula, or of what does not break in one."""
    small = any(x.tag in ("table", "details") or "admonition" in x.classes for x in node.around())
    widest = max(ruler.formula(tex, displayed), default=0.0)
    return widest * FORMULA * (SMALL if small else TEXT)


def _breaking(widths: list[float]) -> Iterator[float | None]:
    for i, width in enumerate(widths):
        if i:
            yield None
        yield width


def cut(page: Node, ruler: Ruler) -> Iterator[str]:
    """Tables and formulas of a page that are wider than their column."""
    article = content(page)
    for table in (x for x in article.all() if x.tag == "table" and not x.classes):
        width = least_width(table, ruler)
        if width > column(table):
            head = " | ".join(x.text().strip() for x in table.all() if x.tag == "th")
            yield f"a table of {width:.0f} px in a column of {column(table):.0f}: {head[:80]}"
    for node, tex, displayed in formulas(article):
        try:
            width = formula_width(node, tex, displayed, ruler)
        except ValueError as error:
            yield f"a formula that cannot be measured ({error}): {tex[:80]}"
            continue
        if width > column(node):
            yield f"a formula of {width:.0f} px in a column of {column(node):.0f}: {tex[:80]}"


def raw(page: Node) -> Iterator[str]:
    """References, formulas and attributes that stand on the page as they were written."""

    def words(node: Node) -> str:
        if node.tag in ("pre", "script", "style") or "arithmatex" in node.classes:
            return ""
        if node.tag == "code":
            return "`"
        return "".join(x if isinstance(x, str) else words(x) for x in node.children)

    article = content(page)
    for found in RAW.findall(words(article)):
        yield f"raw on the page: {found[:80]}"
    for node in article.all():
        if "doc-section-item" in node.classes:
            # The words of a section before a colon are taken for a type.
            code = next((x for x in node.children if isinstance(x, Node)), node)
            if code.tag == "code" and re.match(r"[A-Z]\w* [a-z]", code.text()):
                yield f"a sentence as a type: {code.text()[:80]}"
        inline = node.tag == "code" and not any(x.tag == "pre" for x in node.around())
        if inline and RAW_IN_CODE.search(node.text()):
            yield f"raw in code: {node.text()[:80]}"


def outside(page: Node) -> Iterator[str]:
    """What the page loads from elsewhere."""
    for node in page.all():
        if node.tag == "link" and set(node.attributes.get("rel", "").split()) <= {
            "canonical",
            "next",
            "prev",
            "license",
            "author",
        }:
            continue
        for name in LOADED.get(node.tag, ()):
            for value in node.attributes.get(name, "").split(", "):
                if OUTSIDE.match(value):
                    yield f"loaded from outside: <{node.tag} {name}={value[:80]}>"
        style = node.text() if node.tag == "style" else node.attributes.get("style", "")
        yield from outside_style(style)
        if "mermaid" in node.classes:
            yield "loaded from outside: the script that draws mermaid"


def outside_style(text: str) -> Iterator[str]:
    """What a style sheet loads from elsewhere."""
    for found in re.findall(r"(?:url\(\s*|@import\s+)[\"']?((?:https?:)?//[^\"')]+)", text):
        yield f"loaded from outside: {found[:80]}"


def targets(site: pathlib.Path, pages: dict[str, Node]) -> Iterator[tuple[str, str]]:
    """Links within the site that lead nowhere or to one of two places, by page."""
    names = {
        url: {x.attributes.get(k) for x in page.all() for k in ("id", "name")}
        for url, page in pages.items()
    }
    for url, page in pages.items():
        ids = [x.attributes["id"] for x in content(page).all() if "id" in x.attributes]
        for name in {x for x in ids if ids.count(x) > 1}:
            yield url, f"two places have the anchor {name}"
        for node in page.all():
            if node.tag != "a" or "href" not in node.attributes:
                continue
            link = urllib.parse.urlsplit(node.attributes["href"])
            if link.scheme or link.netloc:
                continue
            path = urllib.parse.unquote(link.path)
            to = urllib.parse.urljoin(f"/{url}", path).lstrip("/") if path else url
            if to in pages:
                if link.fragment and urllib.parse.unquote(link.fragment) not in names[to]:
                    yield url, f"no anchor for the link {node.attributes['href']}"
            elif not (site / to).is_file():
                yield url, f"no page for the link {node.attributes['href']}"


def unreached(pages: dict[str, Node]) -> Iterator[str]:
    """Pages that the navigation of the first page does not lead to."""
    reached = {""}
    for nav in (x for x in pages[""].all() if "md-nav--primary" in x.classes):
        for link in (x for x in nav.all() if x.tag == "a"):
            href = urllib.parse.urlsplit(link.attributes.get("href", "")).path
            reached.add(urllib.parse.urljoin("/", href).lstrip("/"))
    return (url for url in pages if url not in reached)


def faults(site: pathlib.Path) -> Iterator[tuple[str, str]]:
    """All that is wrong with a site: the page, and what."""
    pages = {
        str(file.parent.relative_to(site)).replace(".", "", 1)
        + "/" * (file.parent != site): parsed(file.read_text())
        for file in sorted(site.rglob("index.html"))
    }
    if "" not in pages:
        raise ValueError(f"no page at {site}: build it by mkdocs build -d {site}")
    ruler = Ruler()
    try:
        for url, page in pages.items():
            for found in (cut(page, ruler), raw(page), outside(page)):
                yield from ((url, what) for what in found)
    finally:
        ruler.close()
    for file in sorted(site.rglob("*.css")):
        for what in outside_style(file.read_text()):
            yield str(file.relative_to(site)), what
    yield from targets(site, pages)
    for url in unreached(pages):
        yield url, "no navigation leads to this page"


def main() -> None:
    """Prints what is wrong, and fails if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=pathlib.Path)
    site = parser.parse_args().site
    found = list(faults(site))
    for url, what in found:
        print(f"{url or 'home'}: {what}")
    count = len(list(site.rglob("index.html")))
    print(f"{count} pages, {len(found)} faults")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
