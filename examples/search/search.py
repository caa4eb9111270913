"""Search a folder of Markdown by meaning.

    python examples/search/search.py "How do I make a checkpoint smaller?" "Can it fetch a picture from the web?"

Each file is cut into its sections; their vectors are one matrix, and the passages whose product with the question's
vector is largest are shown. Without a question, three about this project's own documents are asked.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import mlx_gemma3 as g3

DOCS = Path(__file__).resolve().parents[2] / "docs"
# Questions, and the document whose passage should come first.
QUESTIONS = {
    "How do I make a checkpoint smaller?": "convert.md",
    "How much memory do the keys and values of a long conversation take?": "memory.md",
    "How do I use the model from a Swift application?": "swift.md",
}
MOST = 3000  # characters of a passage


@dataclass(frozen=True)
class Passage:
    file: str
    title: str
    text: str


def passages(folder: Path) -> list[Passage]:
    """The sections of all Markdown files, long ones in parts."""
    found = []
    for path in sorted(folder.rglob("*.md")):
        title = path.stem
        for section in re.split(r"^(?=#{1,3} )", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            heading = re.match(r"#+ (.*)", section)
            title = heading[1].strip() if heading else title
            for start in range(0, len(section), MOST):
                if text := section[start : start + MOST].strip():
                    found.append(Passage(str(path.relative_to(folder)), title, text))
    return found


class Index:
    """Passages and their vectors."""

    def __init__(self, engine: g3.Engine, found: list[Passage], *, dimensions: int | None = None) -> None:
        self.engine, self.passages, self.dimensions = engine, found, dimensions
        # EmbeddingGemma's prompt for documents has a place for the title.
        texts = [f"title: {passage.title} | text: {passage.text}" for passage in found]
        self.vectors = np.array(engine.embed(texts, dimensions=dimensions), np.float32)  # (N, D), each of length 1

    def search(self, question: str, count: int = 3) -> list[tuple[float, Passage]]:
        """The passages most like the question, the best first, each with its cosine."""
        (vector,) = self.engine.embed(question, kind="query", dimensions=self.dimensions)
        likeness = self.vectors @ np.array(vector, np.float32)
        return [(float(likeness[n]), self.passages[n]) for n in np.argsort(-likeness)[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("questions", nargs="*", help="what to look for")
    parser.add_argument("-m", "--model", default="embeddinggemma-300m")
    parser.add_argument("--folder", type=Path, default=DOCS, help="of Markdown files")
    parser.add_argument("--dimensions", type=int, help="512, 256 or 128 for a smaller index")
    options = parser.parse_args()
    try:
        with g3.load(options.model) as engine:
            index = Index(engine, passages(options.folder), dimensions=options.dimensions)
            for question in options.questions or QUESTIONS:
                sys.stdout.write(f"\n{question}\n")
                for likeness, passage in index.search(question):
                    words = " ".join(passage.text.split())[:100]
                    sys.stdout.write(f"  {likeness:.3f}  {passage.file}, {passage.title}: {words}\n")
    except g3.Gemma3Error as error:
        raise SystemExit(f"search: {error}") from None


if __name__ == "__main__":
    main()
