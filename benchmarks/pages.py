"""How the built pages look in Chromium: what is cut, loaded from outside, or too small to read.

    mkdocs build -d site
    python benchmarks/pages.py site [--pictures FOLDER] [--verbose] [PAGE ...]
    python benchmarks/pages.py site --widths

Every page at 1400 and 400 pixels, light and dark. A table or a formula is cut if it is wider than
the box in which it scrolls; a figure's least font is the one that the reader gets, at the width at
which the figure stands. Tables that stand as lists of rows and formulas that are set smaller, since
they would not fit otherwise, are counted too. With `--widths`, what `docs/check.py` takes for the
widths of tables and formulas over what they are: it must not be less. Needs a Chromium.
"""

import argparse
import base64
import functools
import http.server
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading

MEASURE = r"""
(async () => {
  await document.fonts.ready;
  await new Promise((done) => setTimeout(done, 300));
  const seen = (box) => box.offsetParent !== null && !box.closest("details:not([open])");
  const cut = (selector) => [...document.querySelectorAll(selector)]
    .filter((box) => seen(box) && box.scrollWidth > box.clientWidth + 1)
    .map((box) => `${box.scrollWidth - box.clientWidth} px: ${box.textContent.slice(0, 60)}`);
  const right = document.querySelector(".md-content__inner").getBoundingClientRect().right;
  const inline = [...document.querySelectorAll(".md-content span.arithmatex")]
    .filter((box) => seen(box) && !box.closest("table, .highlight"))
    .map((box) => [box, box.getBoundingClientRect().right - right])
    .filter(([box, over]) => over > 1)
    .map(([box, over]) => `${Math.round(over)} px: ${box.textContent.slice(0, 60)}`);
  const figures = [...document.querySelectorAll(".md-content img")].map((picture) =>
    [picture.src, picture.getBoundingClientRect().width]);
  // Code is no text: `x[0][1]` is meant. What stands around code is.
  const text = (node) => node.nodeType === Node.TEXT_NODE ? node.data
    : node.nodeType !== Node.ELEMENT_NODE || node.matches("pre, script, style, .katex") ? ""
    : node.matches("code") ? "`" : [...node.childNodes].map(text).join("");
  const article = document.querySelector("article");
  const inCode = [...article.querySelectorAll("code")]
    .filter((code) => !code.closest("pre") && /\]\[wspace/.test(code.textContent))
    .map((code) => code.textContent);
  const raw = text(article)
    .match(/\[[^\]]*\]\[[^\]]*\]|\]\([\w.\/#-]+\)|\\[([]|\$\$|\{[:#][^}]*\}/g) ?? [];
  return {
    page: Math.max(0, document.documentElement.scrollWidth - innerWidth),
    tables: cut(".md-typeset__scrollwrap, .md-typeset__table"),
    formulas: [...cut("div.arithmatex"), ...inline],
    code: cut(".md-content pre > code"),
    katex: document.querySelectorAll(".katex-error").length,
    stacked: document.querySelectorAll("table[data-stacked]").length,
    smaller: [...document.querySelectorAll("div.arithmatex")].filter((box) => box.style.fontSize)
      .map((box) => `${box.style.fontSize} ${box.textContent.slice(0, 60)}`),
    raw: [...raw, ...inCode], figures,
  };
})()
"""
# The widths that tables and formulas need, and those that they have, on a screen that is wide.
WIDTHS = r"""
(async () => {
  await document.fonts.ready;
  await new Promise((done) => setTimeout(done, 300));
  const found = [];
  for (const table of document.querySelectorAll("article table:not([class])")) {
    const box = (table.closest(".md-typeset__scrollwrap") ?? table).parentElement;
    const room = box.clientWidth;
    table.style.cssText = "display: table; width: 0";
    found.push(["table", table.offsetWidth, room, table.textContent.slice(0, 40)]);
    table.style.cssText = "";
  }
  for (const box of document.querySelectorAll("article div.arithmatex")) {
    box.style.fontSize = "";
    const html = box.querySelector(".katex-html");
    const sum = [...html.children].reduce((sum, x) => sum + x.getBoundingClientRect().width, 0);
    const room = box.clientWidth;
    found.push(["formula", sum, room, box.textContent.slice(0, 40)]);
  }
  return found;
})()
"""

ROW = "{:6} {:8} {:5} {:5} {:7} {:5} {:6} {:7}"


class Browser:
    """A Chromium that is spoken to through pipes."""

    def __init__(self, command, profile):
        """Starts it, with a profile of its own."""
        there, self._send = os.pipe()
        self._receive, back = os.pipe()

        def plug():
            # Both first out of the way of 3 and 4, which are the ends that Chromium takes.
            inward, outward = os.dup2(there, 20), os.dup2(back, 21)
            os.dup2(inward, 3)
            os.dup2(outward, 4)

        self.process = subprocess.Popen(
            [
                command,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
            ],
            preexec_fn=plug,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        self._count, self._rest, self.events = itertools.count(1), b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    _session = None

    def _message(self):
        while b"\0" not in self._rest:
            chunk = os.read(self._receive, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self._rest += chunk
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        """What the browser answers; events that come before the answer are kept."""
        number = next(self._count)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._send, data) :]
        while (answer := self._message()).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, url, *, width, dark):
        """Opens a page, as a reader who comes for the first time."""
        # Material keeps the scheme of the page before, and writes it down as long as it is open.
        self._go("about:blank")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        origin = url[: url.index("/", 8)]
        self.call("Storage.clearDataForOrigin", origin=origin, storageTypes="local_storage")
        self._go(url)

    def _go(self, url):
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._message())

    def evaluate(self, script):
        """The value of an expression, or of its promise."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def asked(self):
        """The addresses that the page asked for since it was opened."""
        requests = (e for e in self.events if e.get("method") == "Network.requestWillBeSent")
        return [e["params"]["request"]["url"] for e in requests]

    def picture(self, file):
        """Writes the whole page as a picture."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16000)}
        answer = self.call(
            "Page.captureScreenshot", captureBeyondViewport=True, clip=clip | {"scale": 1}
        )
        file.write_bytes(base64.b64decode(answer["data"]))

    def close(self):
        """Ends the browser that was started."""
        self.call("Browser.close")
        self.process.wait()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_):
        """Nothing."""


def served(folder):
    """A server of a folder, on a port of its own."""
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=pathlib.Path)
    parser.add_argument("pages", nargs="*", help="such as conventions or api/merge; else all")
    parser.add_argument("--browser", default="chromium")
    parser.add_argument("--pictures", type=pathlib.Path, help="a folder for pictures of the pages")
    parser.add_argument("--json", type=pathlib.Path, help="a file for all that is measured")
    parser.add_argument("--verbose", action="store_true", help="names what is cut")
    parser.add_argument("--widths", action="store_true", help="compares them with docs/check.py")
    given = parser.parse_args()
    pages = given.pages or [
        str(file.parent.relative_to(given.site)) for file in sorted(given.site.rglob("index.html"))
    ]
    server = served(given.site)
    root = f"http://127.0.0.1:{server.server_port}/"
    if given.widths:
        compare(given.site, root, pages, given.browser)
        return
    kept, totals = {}, {}
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(given.browser, profile)
        names = ("tables", "formulas", "code", "raw", "outside", "page", "lists", "smaller")
        print(f"{'page':26} {'width':>5} {'':5} {ROW.format(*names)} least font")
        for page, width, dark in itertools.product(pages, (1400, 400), (False, True)):
            browser.open(f"{root}{page}/", width=width, dark=dark)
            found = browser.evaluate(MEASURE)
            found["outside"] = [
                url for url in browser.asked() if not url.startswith((root, "data:"))
            ]
            fonts = {
                url.rsplit("/", 1)[1]: least_font((given.site / url[len(root) :]).read_text(), w)
                for url, w in found["figures"]
            }
            found["fonts"] = fonts = {name: x for name, x in fonts.items() if x}
            shade = "dark" if dark else "light"
            kept[f"{page} {width} {shade}"] = found
            counts = [len(found[k]) for k in ("tables", "formulas", "code", "raw", "outside")]
            counts += [found["page"] > 0, found["stacked"], len(found["smaller"])]
            for i, n in enumerate(counts):
                totals.setdefault((width, shade), [0] * len(counts))[i] += n
            least = f"{min(fonts.values()):.1f}" if fonts else ""
            row = f"{width:5} {shade:5} {ROW.format(*counts)}"
            print(f"{page:26} {row} {least:>10}", flush=True)
            if given.verbose:
                for kind in ("tables", "formulas", "raw", "outside", "smaller"):
                    for what in found[kind]:
                        print(f"    {kind}: {what!r}")
            if given.pictures:
                given.pictures.mkdir(exist_ok=True, parents=True)
                stem = page.replace("/", "-").strip(".") or "home"
                browser.picture(given.pictures / f"{stem}-{width}-{shade}.png")
        browser.close()
    server.shutdown()
    for (width, shade), counts in totals.items():
        print(f"{'all':26} {width:5} {shade:5} " + ROW.format(*counts))
    if given.json:
        given.json.write_text(json.dumps(kept, indent=1))


def compare(site, root, pages, command):
    """Prints the least and the largest ratio of the widths by `docs/check.py` to the widths."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    from docs import check

    ruler, ratios = check.Ruler(), {"table": [], "formula": []}
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(command, profile)
        for page in pages:
            browser.open(f"{root}{page}/", width=1400, dark=False)
            found = browser.evaluate(WIDTHS)
            tree = check.content(check.parsed((site / page / "index.html").read_text()))
            said = [
                ("table", check.least_width(x, ruler), check.column(x))
                for x in tree.all()
                if x.tag == "table" and not x.classes
            ]
            said += [
                ("formula", check.formula_width(x, tex, displayed, ruler), check.column(x))
                for x, tex, displayed in check.formulas(tree)
                if x.tag == "div"
            ]
            for (kind, width, column), (_, true, room, text) in zip(said, found, strict=True):
                if true:
                    ratios[kind].append((width / true, page, text))
                    if column > room + 1:
                        print(f"{page}: a column of {room}, said to be {column:.0f}: {text!r}")
        browser.close()
    ruler.close()
    for kind, found in ((kind, x) for kind, x in ratios.items() if x):
        print(f"{len(found)} of {kind}: said over true width {min(found)[0]:.3f} to", end=" ")
        print("{:.3f}, {}, {!r}".format(*max(found)))


GLYPHS = re.compile(
    r"<g [^>]*transform=\"translate\([^)]*\) (?:rotate\([^)]*\) )?scale\(([\d.]+) -"
)


def least_font(picture, width):
    """The least font of a picture of matplotlib, in pixels where it stands at a width."""
    scales = [float(x) for x in GLYPHS.findall(picture)]
    across = float(re.search(r"viewBox=\"0 0 ([\d.]+)", picture)[1])
    return min(scales) * 100 * width / across if scales else None


if __name__ == "__main__":
    main()
