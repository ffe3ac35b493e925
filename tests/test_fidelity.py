"""Every citation of docs/fidelity.md ("fidelity 6.3", "Q38") leads to a heading of it."""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "fidelity.md"
PATTERNS = (
    "minigpt5_jax/**/*.py",
    "minigpt5_jax/**/*.md",
    "configs/*.py",
    "benchmarks/**/*.py",
    "tests/**/*.py",
    "docs/*.md",
    "README.md",
    "CONTRIBUTING.md",
    "ARCHITECTURE.md",
)
KEY_TABLES = ("config_keys.py", "keys.py")  # "(4.1)" is a section in the table of configuration keys
FIXED = "Behaviour that is fixed"

# A citation may go on in the next line: of a comment, a docstring, a quotation, a string in two pieces.
_BREAK = r"""[ \t]*["']?[ \t]*\n[ \t]*(?:\#+:?|>|[rf]?["'])?[ \t]*"""
_GAP = rf"(?:{_BREAK}|[ \t]+)"
_WORD = r"(?<![\w.-])(?:[Rr]eference|[Ff]idelity|docs/fidelity\.md)\b"
_END = r"(?![\w%]|\.\d)"
_SECTION = rf"[1-9]\d?\.\d{{1,2}}{_END}"
_FIRST = rf"(?:{_SECTION}|\d{{1,2}}{_END})"
_NEXT = rf"(?:{_SECTION}|\d{{1,2}}(?=[.,;:)\]-]|$){_END})"  # "4.2, 18 rows" cites one section
_TO = rf"(?:[-\u2013]|{_GAP}to{_GAP})"
_AND = rf"(?:[,;/]?{_GAP}(?:(?:and|or){_GAP})?(?:sections?{_GAP})?)"
_LIST = rf"(?P<list>{_FIRST}(?:(?:{_TO}|{_AND}){_NEXT})*)"
_BEFORE = re.compile(rf"{_WORD}[`)]*(?:{_GAP}|,?{_GAP}sections?{_GAP}){_LIST}", re.M)
_BEHIND = re.compile(
    rf"\b[Ss]ections?{_GAP}{_LIST}{_GAP}of{_GAP}(?:the{_GAP})?{_WORD}(?!{_GAP}\w+\.md)", re.M
)
_BARE = re.compile(r"\((?P<list>[1-9]\.\d{1,2}(?:, [1-9]\.\d{1,2})*)\)")
_ITEM = re.compile(rf"(?P<first>\d+(?:\.\d+)?)(?:{_TO}(?P<last>\d+(?:\.\d+)?))?")
_QUIRK = re.compile(rf"(?<!\w)Q(?P<first>\d{{1,2}})\b(?:{_TO}Q?(?P<last>\d{{1,2}})\b)?")


class Citation(NamedTuple):
    """Where it stands, and what it names: ``6.3``, ``7`` or ``Q38``."""

    path: str
    line: int
    target: str


def expand(first: str, last: str | None) -> list[str]:
    """Everything from ``first`` to ``last``, counted as numbers: 1.7 to 1.10 are four sections."""
    if last is None:
        return [first]
    (chapter, dot, low), (other, _, high) = first.rpartition("."), last.rpartition(".")
    between = range(int(low), int(high) + 1)
    return [f"{chapter}{dot}{n}" for n in between] if chapter == other and between else [first, last]


def find(text: str, path: str = "", *, bare: bool = False) -> list[Citation]:
    """Every section and quirk that a text cites.

    Args:
      bare: whether a number in parentheses is a section by itself.
    """
    found: list[tuple[int, str]] = []
    for pattern in (_BEFORE, _BEHIND, *([_BARE] if bare else [])):
        for match in pattern.finditer(text):
            for item in _ITEM.finditer(text, *match.span("list")):
                found += [(item.start(), target) for target in expand(item["first"], item["last"])]
    for match in _QUIRK.finditer(text):
        found += [(match.start(), f"Q{number}") for number in expand(match["first"], match["last"])]
    found.sort(key=lambda place: place[0])  # all of a range stand at its beginning
    return [Citation(path, text.count("\n", 0, start) + 1, target) for start, target in found]


@pytest.fixture(scope="module")
def cited() -> list[Citation]:
    """What all files cite; this one has examples only."""
    files = {path for pattern in PATTERNS for path in ROOT.glob(pattern)} - {Path(__file__).resolve()}
    return [
        citation
        for path in sorted(files)
        for citation in find(
            path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)), bare=path.name in KEY_TABLES
        )
    ]


@pytest.fixture(scope="module")
def chapters() -> dict[str, str]:
    """Chapter of the page -> its text."""
    parts = re.split(r"^## (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def entries(chapters) -> list[tuple[str, str]]:
    """(what an entry is cited as, its text) in the order of the page."""
    found = []
    for chapter, heading in (("Quirks", r"(Q\d+)\. \S.*"), ("Facts", r"(\d+(?:\.\d+)?) \S.*")):
        for part in re.split(r"^### ", chapters[chapter], flags=re.M)[1:]:
            title, _, body = part.partition("\n")
            match = re.fullmatch(heading, title)
            assert match, f"{title!r} under {chapter!r} is not written as {heading!r}"
            found.append((match[1], body.strip()))
    return found


def test_every_citation_has_an_entry(cited, entries):
    there = {name for name, _ in entries}
    lost = [f"{c.path}:{c.line}: {c.target}" for c in cited if c.target not in there]
    assert not lost, f"{len(lost)} citations that docs/fidelity.md has no entry for:\n" + "\n".join(lost)


def test_the_citations_are_found(cited):
    outside = [citation for citation in cited if ROOT / citation.path != PAGE]
    assert len(outside) >= 150
    assert len({citation.path for citation in outside}) >= 40


def test_headings_are_unique(entries):
    counts = collections.Counter(name for name, _ in entries)
    assert not [name for name, count in counts.items() if count > 1]


def test_every_quirk_has_an_entry_in_order(entries):
    numbers = [int(name[1:]) for name, _ in entries if name.startswith("Q")]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 51


def test_every_quirk_says_what_both_do_and_which_key_decides(entries):
    for name, body in entries:
        marks = re.findall(r"^- (Original|Here|Key): \S", body, flags=re.M)
        assert not name.startswith("Q") or marks == ["Original", "Here", "Key"], name


def test_every_fact_has_a_text(entries):
    assert not [name for name, body in entries if len(body) < 40]


def test_keys_that_are_named_exist(chapters):
    """Except in the chapter of former keys.  Keys of the model's parts have short names in their table."""
    files = [*ROOT.glob("minigpt5_jax/config/*.py"), *ROOT.glob("minigpt5_jax/parts/*/*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    text = "".join(body for chapter, body in chapters.items() if chapter != FIXED)
    sections = r"(?:run|data|model|loss|optimizer|tuning|mesh|weights|inference)\.[a-z]\w*"
    named = set(re.findall(rf"`({sections}|model\.(?:backbone|mapper|generator)\.\w+)`", text))
    assert len(named) >= 40
    written = {key: key.rpartition(".")[2] if key.count(".") == 2 else key for key in named}
    assert not [key for key, name in written.items() if f'"{name}"' not in code]


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("(reference 6.3)", ["6.3"]),
        ("(fidelity 6.3).", ["6.3"]),
        ("Fidelity 6.3's rule", ["6.3"]),
        ("as docs/fidelity.md 6.3 has it", ["6.3"]),
        ("see `docs/fidelity.md` section 6.3", ["6.3"]),
        ("[fidelity 6.3](docs/fidelity.md)", ["6.3"]),
        ("(reference section 0)", ["0"]),
        ("released (reference 7).", ["7"]),
        ("Reference sections 2.4, 3.", ["2.4", "3"]),
        ("(reference, sections 3.2 and 3.5)", ["3.2", "3.5"]),
        ("(reference sections 1.2-1.5, 2.3)", ["1.2", "1.3", "1.4", "1.5", "2.3"]),
        ("fidelity 1.7-1.10, 3.3", ["1.7", "1.8", "1.9", "1.10", "3.3"]),
        ("(fidelity 5.2 to 5.4, 6.4)", ["5.2", "5.3", "5.4", "6.4"]),
        ("fidelity 7.1\u20137.2", ["7.1", "7.2"]),
        ("(fidelity 8.3; section 8.4)", ["8.3", "8.4"]),
        ("# Section 11 of the reference; these", ["11"]),
        ("Sections 2.2 and 2.3 of docs/fidelity.md", ["2.2", "2.3"]),
        ('"""Words (fidelity\n    6.3, 6.4)."""', ["6.3", "6.4"]),
        ("# one (fidelity 6.3,\n    # 6.4 and\n    # 7.1)", ["6.3", "6.4", "7.1"]),
        ('"by the rule (fidelity "\n    "6.3)"', ["6.3"]),
        ("the reference, sections 2.2,\n2.3, 5.2", ["2.2", "2.3", "5.2"]),
        ("(fidelity 4.2, 18 rows; 3 of them)", ["4.2"]),
        ("fidelity 7.2, 131 tensors, 0.99 of", ["7.2"]),
        ("(Q38)", ["Q38"]),
        ("quirks Q2, Q8", ["Q2", "Q8"]),
        ("(fidelity 6.2, Q32-Q34)", ["6.2", "Q32", "Q33", "Q34"]),
        ("Q9 to\n    # Q11", ["Q9", "Q10", "Q11"]),
        ("(Q21, Q26; fidelity 0)", ["Q21", "Q26", "0"]),
        ("reference values, the references 3.1, preference 3.1, a reference, 3 images", []),
        ("(reference performance.md section 4.10)", []),
        ("section 4.10 of reference performance.md", []),
        ("Q4_K_M, FAQ1, Q-Former, Qwen2.5, Q123", []),
        ("config.copy_and_resolve_references() 7.1", []),
        ("high fidelity 100 times, fidelity 3.14159, fidelity 50%", []),
        ("at level (4.1)", []),
    ],
)
def test_what_is_taken_for_a_citation(text, targets):
    assert [citation.target for citation in find(text)] == targets


def test_a_number_in_parentheses_is_a_section_in_the_table_of_keys_only():
    assert [c.target for c in find('Key(2e-5, "AdamW (4.1, 4.2)", low=0.0)', bare=True)] == ["4.1", "4.2"]


def test_lines_are_those_of_the_numbers():
    text = "x\n# one (fidelity 6.3,\n# 6.4)\n\nQ38"
    assert [(c.line, c.target) for c in find(text)] == [(2, "6.3"), (3, "6.4"), (5, "Q38")]
