"""The corpus `plugin:epub`: books in EPUB files, one document each."""

import glob
import posixpath
import re
import zipfile
from collections.abc import Sequence
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

from pydantic import Field

from uiollms import ConfigError, CorpusPlugin, Document

BLOCKS = {"p", "div", "br", "li", "tr", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6"}
HIDDEN = {"head", "script", "style"}
LARGEST = 2**26  # bytes of one chapter; a zip file of this size can claim to contain far more


class Epub(CorpusPlugin):
    """Books in EPUB files, one document each, in the order of their paths."""

    files: str = Field(description="pattern of the files, such as books/*.epub")
    min_characters: int = Field(0, ge=0, description="shorter chapters are left out")

    def open(self) -> Sequence[Document]:
        return Books(self.paths(), self.min_characters)

    def missing(self) -> str | None:
        return None if self.paths() else f"no file matches {self.files}; correct `files`"

    def paths(self) -> list[str]:
        return sorted(glob.glob(self.files, recursive=True))


class Books(Sequence[Document]):
    """The books of a list of files. A book is read at every access."""

    def __init__(self, paths: list[str], min_characters: int) -> None:
        self.paths, self.min_characters = paths, min_characters

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Document:
        path = self.paths[i]
        try:
            chapters = [chapter_text(html) for html in read_chapters(path)]
        except (OSError, KeyError, ValueError, zipfile.BadZipFile, ElementTree.ParseError) as error:
            raise ConfigError(f"{path}: is no readable EPUB file ({error})") from None
        chapters = [text for text in chapters if len(text) >= self.min_characters]
        return Document("\n\n".join(chapters), path)


def read_chapters(path: str) -> list[str]:
    """Returns the XHTML of a book's chapters in reading order, which is the spine of its package
    file."""
    with zipfile.ZipFile(path) as book:
        container = ElementTree.fromstring(read_part(book, "META-INF/container.xml"))
        package_path = container.find(".//{*}rootfile").attrib["full-path"]
        package = ElementTree.fromstring(read_part(book, package_path))
        folder = posixpath.dirname(package_path)
        paths = {item.attrib["id"]: item.attrib["href"] for item in package.findall(".//{*}item")}
        names = [paths[part.attrib["idref"]] for part in package.findall(".//{*}itemref")]
        found = [posixpath.normpath(posixpath.join(folder, unquote(name))) for name in names]
        return [read_part(book, name) for name in found]


def read_part(book: zipfile.ZipFile, name: str) -> str:
    if book.getinfo(name).file_size > LARGEST:
        raise ValueError(f"{name} has more than {LARGEST} bytes")
    return book.read(name).decode("utf-8-sig")


def chapter_text(html: str) -> str:
    """The text of an XHTML page, a line for each block."""
    reader = TextReader()
    reader.feed(html)
    lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(reader.parts).split("\f"))
    return "\n".join(line for line in lines if line)


class TextReader(HTMLParser):
    """Collects the text of a page, with a form feed at the edges of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in HIDDEN
        self.parts += ["\f"] if tag in BLOCKS else []

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in HIDDEN
        self.parts += ["\f"] if tag in BLOCKS else []

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)
