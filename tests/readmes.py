"""The READMEs and the migration guide as data: fenced blocks, inline code, links, headings.

blocks("sh")                       # of all pages, in order
python_block("train/README.md", "Add a format")
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "shards/README.md",
    "preprocess/README.md",
    "model/README.md",
    "train/README.md",
    "train/MIGRATING.md",
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    heading: str
    """The nearest one above."""
    language: str
    text: str
    line: int
    """Of the page, where the fence opens."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def blocks(language: str | None = None, page: str | None = None) -> list[Block]:
    """Return the fenced blocks of all pages, or of one; of one language, or of all."""
    pages = [page] if page else PAGES
    return [b for p in pages for b in _blocks(p) if language is None or b.language == language]


def _blocks(page: str) -> Iterator[Block]:
    text = text_of(page)
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        plain = FENCE.sub("", before)  # a comment in a block is no heading
        heading = [found[1] for found in HEADING.finditer(plain)][-1]
        yield Block(page, heading, match[1], match[2], before.count("\n") + 1)


def python_block(page: str, heading: str) -> str:
    """Return the one Python block under a heading."""
    (found,) = [block for block in blocks("python", page) if block.heading == heading]
    return found.text


def prose(page: str) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", text_of(page))


def spans(page: str) -> list[str]:
    """Return the inline code of a page; what goes over a line end is put on one line."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def links(page: str) -> list[str]:
    """Return the targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: str) -> set[str]:
    """Return what may follow `#` in a link to a page, as GitHub makes it of headings."""
    made = set()
    for title in HEADING.findall(prose(page)):
        plain = re.sub(r"[`*]|\[|\]\([^)]*\)", "", title).strip().lower()
        made.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return made
