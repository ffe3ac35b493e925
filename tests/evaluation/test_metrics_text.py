"""Text metrics against recorded values of nltk and rouge 1.0.1, and against the packages where they are."""

from __future__ import annotations

import random
import sys

import pytest

from minigpt5_jax.evaluation.metrics import text
from minigpt5_jax.evaluation.metrics.text import bleu, cleaned, meteor, rouge, rouge_score

PAIRS = [
    ("the red fox runs over the snow", "a red fox ran in the snow."),
    ("We left at dawn. The lake was cold.", "The lake was cold. We left before dawn."),
    ("the the the cat", "the cat sat. the cat ran."),
]
# characters BLEU-1, -2; words BLEU-1, -2; rouge; rouge-score
GOLDEN = [
    (0.700000, 0.640582, 0.428571, 0.267261, 0.615385, 0.571429),
    (0.841031, 0.813599, 0.875000, 0.707107, 0.875000, 0.500000),
    (0.444962, 0.403954, 0.454898, 0.303265, 0.666667, 0.600000),
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    words = ["a", "The", "cat", "cat.", "sat", "runs,", "it", ".", "..", "on  a", "é"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 14))) for _ in range(count)]


@pytest.mark.parametrize("pair, golden", list(zip(PAIRS, GOLDEN)))
def test_recorded_values(pair, golden):
    ours = [bleu(*pair, order, unit) for unit in ("char", "word") for order in (1, 2)]
    assert [*ours, rouge(*pair), rouge_score(*pair)] == pytest.approx(golden, abs=5e-7)


def test_bleu_is_that_of_nltk():
    nltk = pytest.importorskip("nltk.translate.bleu_score", reason="nltk is not installed")
    texts = random_texts(60)
    for got, want in zip(texts, reversed(texts)):
        for unit, cut in (("char", str), ("word", str.split)):
            for order in (1, 2):
                with _quiet():
                    theirs = nltk.sentence_bleu([cut(want)], cut(got), weights=(1 / order,) * order)
                assert bleu(got, want, order, unit) == pytest.approx(theirs, rel=1e-9, abs=0)


def _quiet():
    import warnings

    context = warnings.catch_warnings()
    warnings.simplefilter("ignore")
    return context


def test_bleu_without_a_common_pair_is_tiny_and_without_a_common_word_zero():
    assert 0 < bleu("a b", "b a", 2) < 1e-150
    assert bleu("x", "a", 1) == bleu("", "a", 1) == bleu("x", "a", 2, "char") == 0
    with pytest.raises(ValueError, match="char, word"):
        bleu("a", "a", 1, "token")


def test_rouge_is_that_of_the_package():
    package = pytest.importorskip("rouge", reason="the package rouge 1.0.1 is not installed (optional)")
    texts, theirs = random_texts(200), package.Rouge(metrics=["rouge-l"])
    for got, want in zip(texts, reversed(texts)):
        try:
            score = theirs.get_scores(got, want)[0]["rouge-l"]["f"]
        except ValueError:
            with pytest.raises(text.EmptyTextError):
                rouge(got, want)
        else:
            assert rouge(got, want) == pytest.approx(score, abs=1e-12)


def test_rouge_of_odd_texts():
    assert rouge("a cat sat", "a cat sat") == pytest.approx(0.999999995, abs=1e-12)
    assert rouge(". .", "a cat") == 0
    for empty in ("", ".", "..."):
        with pytest.raises(text.EmptyTextError, match="text without words"):
            rouge(empty, "a cat")
    with pytest.raises(text.EmptyTextError, match="reference without words"):
        rouge("a cat", "")
    words = " ".join(map(str, range(1200)))  # the package's recursion ends here
    assert len(words.split()) > sys.getrecursionlimit()
    assert rouge(words, words) == pytest.approx(1, abs=1e-8)


def test_rouge_score_is_that_of_the_package():
    package = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    scorer, texts = package.RougeScorer(["rougeL"]), random_texts(60)
    for got, want in zip(texts, reversed(texts)):
        assert rouge_score(got, want) == pytest.approx(scorer.score(want, got)["rougeL"].fmeasure, abs=1e-12)


def test_meteor_without_synonyms():
    pytest.importorskip("nltk", reason="nltk is not installed")
    values = [meteor(*pair) for pair in PAIRS[:2]]
    assert values == pytest.approx([0.474684, 0.822840], abs=5e-7)
    assert meteor("a big car", "a large automobile") == pytest.approx(0.166667, abs=5e-7)
    assert meteor("a big car", "a big auto") == pytest.approx(0.625, abs=5e-7)


def test_meteor_takes_synonyms_where_a_wordnet_is_given():
    pytest.importorskip("nltk", reason="nltk is not installed")

    class Names:
        def __init__(self, *names):
            self.names = names

        def lemmas(self):
            return [self._Lemma(name) for name in self.names]

        class _Lemma:
            def __init__(self, name):
                self._name = name

            def name(self):
                return self._name

    class Tiny:
        def synsets(self, word):
            return [Names("car", "auto")] if word in ("car", "auto") else []

    assert meteor("a big car", "a big auto", Tiny()) == pytest.approx(0.981481, abs=5e-7)


def test_a_folder_without_wordnet_is_named(tmp_path):
    pytest.importorskip("nltk", reason="nltk is not installed")
    with pytest.raises(FileNotFoundError, match=r"lexnames, index.noun.*wordnet.zip"):
        text.open_wordnet(str(tmp_path))


def test_sacrebleu_with_its_signature():
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (optional)")
    texts, references = [p[0] for p in PAIRS], [p[1] for p in PAIRS]
    score, each, signature = text.sacre_bleu(texts, references)
    assert score == sacrebleu.corpus_bleu(texts, [references]).score
    assert each[0] == sacrebleu.sentence_bleu(texts[0], [references[0]], use_effective_order=True).score
    assert "tok:13a" in signature


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(text.MissingPackageError, match="pip install sacrebleu"):
        text.sacre_bleu(["a"], ["a"])


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("A fox.### ", "A fox."),
        ("A fox [IMG0][IMG1] more", "A fox"),
        (" ...! ", ""),
        ("###", ""),
        ("<s> hi", "<s> hi"),
    ],
)
def test_texts_are_cleaned_as_the_papers_do(raw, clean):
    assert cleaned(raw) == clean


def cider_d_as_written(texts, references):
    """coco-caption's loops, once more, over words."""
    import numpy as np

    def grams(line):
        words = line.lower().split()
        return [" ".join(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1)]

    names = sorted({gram for line in [*texts, *references] for gram in grams(line)})
    frequency = np.array([sum(gram in grams(line) for line in references) for gram in names])
    weights = np.log(len(references)) - np.log(np.maximum(1, frequency))
    order = np.array([len(gram.split()) for gram in names])
    found = []
    for got, want in zip(texts, references):
        a, b = (np.array([grams(line).count(gram) for gram in names]) * weights for line in (got, want))
        parts = []
        for n in range(1, 5):
            one, two = a[order == n], b[order == n]
            norm = np.linalg.norm(one) * np.linalg.norm(two)
            parts.append((np.minimum(one, two) * two).sum() / norm if norm else 0.0)
        longer = len(got.split()) - len(want.split())
        found.append(10 * np.mean(parts) * np.exp(-(longer**2) / 72))
    return found


def test_cider_d_by_its_formula():
    references = [
        "the red fox runs over the snow",
        "a lake in the cold morning light",
        "we left at dawn for the red hills",
    ]
    texts = [
        "a red fox runs over snow",
        "a lake in the cold morning light",
        "the the the the red hills at dawn",
    ]
    got = text.cider_d(texts, references)
    assert got == pytest.approx(cider_d_as_written(texts, references), abs=1e-9)
    assert got[1] == pytest.approx(10) and 0 < got[2] < got[0] < 10
    assert text.cider_d(["The lake!"], ["the lake"]) == [0.0], "one reference leaves no word rare"
    assert text.cider_d(["", "a"], ["a b", "c d"]) == [0.0, 0.0] and text.cider_d([], []) == []
