"""Scores of texts against one reference each: BLEU, CIDEr-D, both ROUGE-L, METEOR (docs/evaluation.md).

All are pure Python.  BLEU and the ROUGE-L of the package ``rouge`` are implemented here because the papers'
numbers depend on how they treat characters, sets and full stops.
"""

from __future__ import annotations

import math
import re
import string
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

BLEU_UNITS = ("char", "word")
LONGEST = 4
"""Words of the n-grams of CIDEr-D at most."""


class MissingPackageError(ImportError):
    """A metric needs a package that is not installed; the message says which and how to get it."""


class EmptyTextError(ValueError):
    """A text without anything to score."""


def cleaned(text: str) -> str:
    """A text as the papers score it: without ``###``, up to the first voken, '' if only punctuation is left.

    Source: ``metric.py`` of MiniGPT-5.  The text of its dummy token is left in (Q42).
    """
    text = text.replace("###", "").partition("[IMG0]")[0].strip()
    return "" if all(c in string.punctuation or c.isspace() for c in text) else text


def bleu(text: str, reference: str, order: int, unit: str = "word") -> float:
    """BLEU of n-grams up to ``order`` with equal weights, one reference, not smoothed.

    nltk's ``sentence_bleu`` with ``method0``: 0 where nothing of length 1 is shared, and about 1e-154 where
    only a higher order is not.

    Args:
      unit: ``word`` counts what white space separates; ``char`` counts characters, as MiniGPT-5's code does,
        which hands raw strings to nltk (Q41).

    Raises:
      ValueError: an unknown unit, or an order below 1.
    """
    if unit not in BLEU_UNITS or order < 1:
        raise ValueError(f"bleu_unit is one of {', '.join(BLEU_UNITS)}, and an order at least 1")
    got, want = (list(text), list(reference)) if unit == "char" else (text.split(), reference.split())
    if not got or not set(got) & set(want):
        return 0.0
    logs = []
    for n in range(1, order + 1):
        ours, theirs = _ngrams(got, n), _ngrams(want, n)
        shared, total = sum((ours & theirs).values()), max(1, sum(ours.values()))
        logs.append(math.log(shared / total if shared else sys.float_info.min))
    brevity = 1.0 if len(got) > len(want) else math.exp(1 - len(want) / len(got))
    return brevity * math.exp(math.fsum(logs) / order)


def _ngrams(items: Sequence[str], n: int) -> Counter:
    return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def sacre_bleu(texts: Sequence[str], references: Sequence[str]) -> tuple[float, list[float], str]:
    """BLEU of a corpus, of each text, and sacrebleu's signature; from 0 to 100.

    Each text alone is scored with ``effective_order``, as sacrebleu asks for single sentences.

    Raises:
      MissingPackageError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise MissingPackageError("sacrebleu is not installed; pip install sacrebleu") from None
    corpus, single = BLEU(), BLEU(effective_order=True)
    score = corpus.corpus_score(list(texts), [list(references)]).score
    each = [single.sentence_score(got, [want]).score for got, want in zip(texts, references, strict=True)]
    return score, each, str(corpus.get_signature())


def cider_d(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """CIDEr-D of each text against its one reference, from 0 to 10.

    Cosines of n-grams up to 4, weighted by how rare they are among the references, counts of the text clipped
    to those of the reference, times a Gaussian (sigma 6) of the difference in length.  The formula is that of
    coco-caption, where length is counted in bigrams.  Its PTB tokenizer, which needs Java, is replaced by
    lower-case words without punctuation.
    """
    words = [[re.findall(r"\w+", text.lower()) for text in side] for side in (texts, references)]
    orders = range(1, LONGEST + 1)
    counted = [[[_ngrams(line, n) for n in orders] for line in side] for side in words]
    seen = Counter(gram for line in counted[1] for counts in line for gram in counts)
    rare = math.log(len(references)) if references else 0.0

    def weighted(counts: Counter) -> dict[tuple, float]:
        return {gram: count * (rare - math.log(max(1, seen[gram]))) for gram, count in counts.items()}

    scores = []
    for got, want in zip(*counted, strict=True):
        total, difference = 0.0, sum(got[1].values()) - sum(want[1].values())
        for ours, theirs in zip(map(weighted, got), map(weighted, want)):
            shared = sum(min(ours[gram], theirs[gram]) * theirs[gram] for gram in ours.keys() & theirs.keys())
            norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
            total += shared / norm if norm else shared
        scores.append(10 * total / LONGEST * math.exp(-(difference**2) / 72))
    return scores


def _table(one: Sequence[str], other: Sequence[str]) -> list[list[int]]:
    """Length of the longest common subsequence of every two beginnings."""
    table = [[0] * (len(other) + 1)]
    for word in one:
        above, row = table[-1], [0]
        for j, against in enumerate(other):
            row.append(above[j] + 1 if word == against else max(above[j + 1], row[j]))
        table.append(row)
    return table


def _common_words(one: Sequence[str], other: Sequence[str]) -> set[str]:
    """Words on the longest common subsequence that ``rouge`` reads out, without its recursion."""
    table, words = _table(one, other), set()
    i, j = len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            words.add(one[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def rouge(text: str, reference: str) -> float:
    """ROUGE-L (F) by the rule of the package ``rouge`` 1.0.1, which MiniGPT-5's numbers are made with.

    Sentences end at full stops, words at spaces, case and punctuation stay.  Words on the common
    subsequence of any two sentences are counted once, against the sets of words of both texts; identical
    texts give 0.999999995.

    Raises:
      EmptyTextError: a text is empty, or has nothing but full stops.
    """
    got, want = ([" ".join(s.split()).split(" ") for s in t.split(".") if s] for t in (text, reference))
    if not got or not want:
        which = "text" if not got else "reference"
        raise EmptyTextError(f"ROUGE-L of a {which} without words: {(text if not got else reference)!r}")
    common: set[str] = set()
    for sentence in want:
        for against in got:
            common |= _common_words(sentence, against)
    precision, recall = (len(common) / len({w for s in side for w in s}) for side in (got, want))
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def rouge_score(text: str, reference: str) -> float:
    """ROUGE-L (F) by the rule of the package ``rouge-score``, without stemming.

    Lower case, words of ASCII letters and digits only (other scripts vanish), one sequence, no sets.  0 where
    either text has no words.
    """
    got, want = (re.findall("[a-z0-9]+", t.lower()) for t in (text, reference))
    if not got or not want:
        return 0.0
    common = _table(want, got)[-1][-1]
    precision, recall = common / len(got), common / len(want)
    return 2 * precision * recall / (precision + recall) if common else 0.0


class NoSynonyms:
    """A WordNet without entries: METEOR then matches words and their stems only."""

    @staticmethod
    def synsets(word: str) -> list[Any]:
        """No synonyms."""
        return []


def meteor(text: str, reference: str, wordnet: Any = None) -> float:
    """METEOR of nltk (alpha 0.9, beta 3, gamma 0.5) on lower-case words, punctuation apart.

    It is not METEOR 1.5 of COCO, which has a table of paraphrases and other parameters.

    Args:
      wordnet: an nltk ``WordNetCorpusReader``; without one there are no synonyms, and the result should be
        called so.

    Raises:
      MissingPackageError: nltk is not installed.
    """
    try:
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError:
        raise MissingPackageError("nltk is not installed; pip install nltk") from None
    got, want = (re.findall(r"\w+|[^\w\s]", t.lower()) for t in (text, reference))
    return float(single_meteor_score(want, got, wordnet=NoSynonyms() if wordnet is None else wordnet))


def open_wordnet(folder: str) -> Any:
    """An nltk reader of WordNet 3 in ``folder`` (``index.noun``, ``data.noun``, ``lexnames`` and so on).

    Raises:
      MissingPackageError: nltk is not installed.
      FileNotFoundError: a file that the reader needs is not there.
    """
    from pathlib import Path

    try:
        import nltk
        from nltk.corpus.reader.wordnet import WordNetCorpusReader
    except ImportError:
        raise MissingPackageError("nltk is not installed; pip install nltk") from None
    kinds = ("noun", "verb", "adj", "adv")
    needed = ("lexnames", *(f"{form}.{kind}" for kind in kinds for form in ("index", "data")))
    if absent := [name for name in needed if not (Path(folder) / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} is no WordNet: {', '.join(absent)} missing; unpack nltk's wordnet.zip"
        )
    if folder not in nltk.data.path:  # nltk reads below these folders only
        nltk.data.path.insert(0, folder)
    return WordNetCorpusReader(folder, None)
