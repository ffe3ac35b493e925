"""Every metric of the protocols, from samples and features to numbers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt5_jax.data.images import FORMATS, load_image
from minigpt5_jax.evaluation.metrics import text as texts
from minigpt5_jax.evaluation.metrics.relevance import Slot, mm_relevance_m5, mm_relevance_official
from minigpt5_jax.evaluation.metrics.similarity import CAPTION_PREFIX, cosines
from minigpt5_jax.evaluation.metrics.statistics import (
    Moments,
    cmmd,
    frechet_distance,
    frechet_distance_of_few,
    inception_score,
    kernel_distance,
    moments,
    read_moments,
)
from minigpt5_jax.evaluation.suite.features import Features, Skipped
from minigpt5_jax.evaluation.suite.protocols import DRAWN, ORACLE, Switches
from minigpt5_jax.evaluation.suite.resampling import Terms
from minigpt5_jax.evaluation.suite.samples import Sample
from minigpt5_jax.shapes import oracle
from minigpt5_jax.shapes.render import IMAGE_SIZE
from minigpt5_jax.weights.errors import WeightFileError

POOL3 = 2048
FEW = 2048
"""Up to as many images, the exact form of FID without an eigenproblem is the quicker one."""
Values = dict[str, float | None]
"""Sample -> its value, None where it has none."""


@dataclasses.dataclass
class Found:
    """A metric's number and what it is made of.

    Attributes:
      value: None where nothing was to be scored.
      variant: which form, with weights and switches.
      n: samples, groups or images it is of.  n_real: real images, of scores of sets.
      values: of single samples.  groups: terms of the score by group, where it is a ratio of sums.
      spread: mean and deviation between subsets, which is no interval of the value.
      name: what to call it, where that is not the metric's own name.
    """

    value: float | None
    variant: str
    n: int
    n_real: int | None = None
    values: Values = dataclasses.field(default_factory=dict)
    groups: dict[str, Terms] = dataclasses.field(default_factory=dict)
    spread: dict[str, Any] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Real:
    """Where real images of scores of sets come from, if not from the references.

    Attributes:
      images: a folder, with all images below it.  stats: sums in the form of MiniGPT-5's repository.
    """

    images: str | None = None
    stats: str | None = None

    @property
    def source(self) -> str:
        """For the results."""
        return self.stats or self.images or "references"

    def paths(self) -> list[Path]:
        """All images of the folder, sorted.

        Raises:
          FileNotFoundError: there are none.
        """
        ends = {f".{name.lower()}" for name in FORMATS} | {".jpg", ".tif"}
        found = sorted(p for p in Path(str(self.images)).rglob("*") if p.suffix.lower() in ends)
        if not found:
            raise FileNotFoundError(
                f"--real_images={self.images} holds no images; give a folder with images in it or below it"
            )
        return found

    def check(self) -> None:
        """Whether what is given can be used.

        Raises:
          FileNotFoundError, WeightFileError: it cannot.
        """
        if self.images:
            self.paths()
        if self.stats and (width := len(read_moments(self.stats).mean)) != POOL3:
            raise WeightFileError(
                f"--real_stats={self.stats} is of features of width {width}, and those of FID have {POOL3}; "
                "give MiniGPT-5's fid_real_feaures.pt, or --real_images"
            )


class Scorer:
    """Scores samples under a protocol.

    Args:
      task: one of the protocols' tasks.  samples: at least one.
      switches: of the protocol.  features: by the networks.  real: images of FID, KID and CMMD.
    """

    def __init__(
        self, task: str, samples: Sequence[Sample], switches: Switches, features: Features, real: Real
    ):
        self.task, self.samples, self.switches = task, samples, switches
        self.features, self.real = features, real

    def __call__(self, name: str) -> Found:
        """The metric of this name.

        Raises:
          Skipped: it cannot be computed.
          ConfigError, DataError, WeightFileError, WeightTableError: a file that was given cannot be used.
        """
        if name in ORACLE:
            return self._oracle(name.removeprefix("oracle_"))
        try:
            return COMPUTE[name](self)
        except texts.MissingPackageError as error:
            raise Skipped(str(error)) from None

    # -- means ----------------------------------------------------------------------------------

    def mean(self, values: Values, variant: str, *, by_group: bool = False) -> Found:
        """A mean over samples, or over the means of their groups."""
        groups: dict[str, list[float]] = {}
        for sample in self.samples:
            if (value := values.get(sample.id)) is not None:
                groups.setdefault(sample.group, []).append(value)
        terms = {
            group: (float(np.mean(some)), 1.0) if by_group else (float(sum(some)), float(len(some)))
            for group, some in groups.items()
        }
        n = len(groups) if by_group else sum(map(len, groups.values()))
        return self.ratio(terms, variant, n, values)

    def ratio(self, terms: dict[str, Terms], variant: str, n: int, values: Values | None = None) -> Found:
        """A ratio of sums over groups."""
        below = sum(term[1] for term in terms.values())
        if not below:
            raise Skipped("there is nothing to compare")
        value = sum(term[0] for term in terms.values()) / below
        return Found(value, variant, n, values=values or {}, groups=terms)

    # -- texts ----------------------------------------------------------------------------------

    @functools.cached_property
    def texts(self) -> dict[str, tuple[str, str]]:
        """Sample -> (text, reference), as the papers clean them."""
        found = {}
        for sample in self.samples:
            text = sample.text
            if self.switches.dummy_token == "stripped":
                text = text.lstrip().removeprefix("<s>").removeprefix("<unk>")
            found[sample.id] = texts.cleaned(text), texts.cleaned(sample.reference.text)
        return found

    @functools.cached_property
    def both(self) -> list[str]:
        """Samples with a text on both sides."""
        return [name for name, (got, want) in self.texts.items() if got and want]

    def text_score(self, score: Callable[[str, str], float], variant: str) -> Found:
        """The mean of a score of texts: 0 where none was written, nothing where none is wanted."""
        return self._text_mean({name: score(*self.texts[name]) for name in self.both}, variant)

    def _text_mean(self, scored: Mapping[str, float], variant: str) -> Found:
        values: Values = {
            name: scored.get(name, 0.0) if want else None for name, (_, want) in self.texts.items()
        }
        by_group = self.switches.text_mean == "groups"
        return self.mean(values, f"{variant}, mean over {self.switches.text_mean}", by_group=by_group)

    def bleu(self, order: int) -> Found:
        """BLEU of n-grams up to ``order``."""
        unit = self.switches.bleu_unit
        return self.text_score(lambda got, want: texts.bleu(got, want, order, unit), f"nltk, {unit}s")

    def rouge(self) -> Found:
        """ROUGE-L."""
        score = texts.rouge if self.switches.rouge == "rouge" else texts.rouge_score
        return self.text_score(score, self.switches.rouge)

    def meteor(self) -> Found:
        """METEOR, under the name that says whether it had synonyms."""
        folder = self.features.weights.get("wordnet")
        reader = texts.open_wordnet(folder) if folder else None
        variant = f"nltk, wordnet {self.features.hash('wordnet')[:8]}" if folder else "nltk"
        found = self.text_score(lambda got, want: texts.meteor(got, want, reader), variant)
        found.name = "meteor" if folder else "meteor_no_synonyms"
        return found

    def sacrebleu(self) -> Found:
        """BLEU of the corpus, from 0 to 100."""
        names = [name for name, (_, want) in self.texts.items() if want]
        if not names:
            raise Skipped("there is nothing to compare")
        got, want = zip(*(self.texts[name] for name in names))
        score, each, signature = texts.sacre_bleu(got, want)
        return Found(score, signature, len(names), values=dict(zip(names, each)))

    def cider(self) -> Found:
        """CIDEr-D, from 0 to 10; how rare words are is counted among the references."""
        names = [name for name, (_, want) in self.texts.items() if want]
        got, want = ([self.texts[name][side] for name in names] for side in (0, 1))
        scored = dict(zip(names, texts.cider_d(got, want)))
        return self._text_mean(scored, "words without punctuation in the place of PTB's")

    def sbert(self) -> Found:
        """Cosine of sentence embeddings."""
        self.features.require("sbert")
        similar = self.similar_texts(self.features.sentences)
        return self._text_mean(similar, f"sbert {self.features.hash('sbert')[:8]}")

    def similar_texts(self, embed: Callable[[list[str]], np.ndarray]) -> dict[str, float]:
        """Cosines of the samples with both texts."""
        if not self.both:
            return {}
        got, want = (embed([self.texts[name][side] for name in self.both]) for side in (0, 1))
        return dict(zip(self.both, cosines(got, want).tolist()))

    # -- single images --------------------------------------------------------------------------

    @functools.cached_property
    def drawn(self) -> list[Sample]:
        """Samples whose image is wanted and there."""
        return [sample for sample in self.samples if sample.wants_image and sample.image]

    def image_mean(self, scored: Mapping[str, float], variant: str) -> Found:
        """The mean over drawn images; by the switch, those that are missing count 0."""
        values: Values = dict.fromkeys((sample.id for sample in self.samples), None)
        if self.switches.missing_image == "zero":
            values |= {sample.id: 0.0 for sample in self.samples if sample.why}
        return self.mean(values | scored, f"{variant}, missing_image={self.switches.missing_image}")

    def _clip(self, name: str) -> str:
        self.features.require(name)
        if not self.drawn:
            raise Skipped("no image was drawn where one is wanted")
        return f"{name} {self.features.hash(name)[:8]}"

    def clip_i(self) -> Found:
        """Cosine of the drawn image and the true one."""
        variant, target = self._clip("clip_l14"), self.switches.clip_target
        similar = self.similar_images("clip_l14", target)
        return self.image_mean(similar, f"{variant}, target {target}")

    def similar_images(self, network: str, target: str) -> dict[str, float]:
        """Cosines of drawn images with true ones."""
        got = self.features.clip_images(network, [Path(str(s.image)) for s in self.drawn])
        want = self.features.clip_images(network, [Path(str(s.reference.image)) for s in self.drawn], target)
        return dict(zip((s.id for s in self.drawn), cosines(got, want).tolist()))

    def image_text(self, network: str, prefix: str = "", scale: float = 1.0, least: float = -np.inf) -> Found:
        """Cosine of the drawn image and its caption, scaled and bounded."""
        variant, shown = self._clip(network), [s for s in self.drawn if s.reference.caption]
        if not shown:
            raise Skipped("the references have no captions")
        images = self.features.clip_images(network, [Path(str(s.image)) for s in shown])
        captions = self.features.clip_texts(network, [prefix + s.reference.caption for s in shown])
        scores = (scale * cosines(images, captions)).clip(least)
        clean_up = self.switches.clip_tokenizer
        found = self.image_mean(
            dict(zip((s.id for s in shown), scores.tolist())), f"{variant}, clip_tokenizer={clean_up}"
        )
        found.notes = list(dict.fromkeys(self.features.notes.get(network, [])))
        return found

    def clip_score(self) -> Found:
        """CLIPScore of torchmetrics."""
        found = self.image_text("clip_l14", scale=100.0)
        found.value = max(0.0, found.value or 0.0)
        return found

    def _oracle(self, attribute: str) -> Found:
        """Share of drawn images of the small world that are right; one that is missing is wrong."""
        if self._sizes != {(IMAGE_SIZE, IMAGE_SIZE)}:
            side = f"{IMAGE_SIZE} x {IMAGE_SIZE}"
            raise Skipped(f"the oracle reads images of the small world, of {side} pixels")
        values: Values = {sample.id: 0.0 for sample in self.samples if sample.wants_image}
        for sample in self.drawn:
            values[sample.id] = self._read[sample.id][attribute]
        return self.mean(values, "reads pixels; a missing image is wrong")

    @functools.cached_property
    def _sizes(self) -> set[tuple[int, int]]:
        """Sizes of the wanted images and of what was drawn for them."""
        wanted = [sample for sample in self.samples if sample.wants_image]
        return {load_image(path).size for s in wanted for path in (s.reference.image, s.image) if path}

    @functools.cached_property
    def _read(self) -> dict[str, dict[str, float]]:
        """What the oracle says of each drawn image."""
        pixels = lambda path: np.asarray(load_image(path))[None]  # noqa: E731
        return {
            s.id: oracle.score(pixels(s.image), oracle.read(pixels(s.reference.image))) for s in self.drawn
        }

    # -- sets of images -------------------------------------------------------------------------

    @functools.cached_property
    def _made(self) -> list[Path]:
        """Every drawn image of the set: of tasks that draw always, those that are wanted."""
        return [s.image for s in self.samples if s.image and (s.wants_image or self.task not in DRAWN)]

    @functools.cached_property
    def _true(self) -> list[Path]:
        """Every real image of the set, whether an image was drawn for it or not (Q46)."""
        if self.real.images:
            return self.real.paths()
        return [s.reference.image for s in self.samples if s.reference.image]

    def _inception(self, paths: Sequence[Path], resize: str, target: str) -> np.ndarray:
        self.features.require("inception")
        if not paths:
            raise Skipped("no images were drawn")
        return self.features.inception(paths, resize, target)

    def _named(self, found: Found, name: str) -> Found:
        """Scores by another network than FID's are called so."""
        if not self.features.published_inception:
            found.name = f"{name}_other_network"
        return found

    def _variant(self, *more: str) -> str:
        switches = self.switches
        return ", ".join(
            [f"inception {self.features.hash('inception')[:8]}", f"resize {switches.inception_resize}", *more]
        )

    def _pool3(self) -> tuple[np.ndarray, np.ndarray | Moments]:
        """Features of drawn images, and features or moments of real ones."""
        resize, target = self.switches.fid_resize, self.switches.fid_target
        self.features.require("inception")
        n_real = 2 if self.real.stats else len(self._true)
        if min(len(self._made), n_real) < 2:
            raise Skipped(f"needs 2 images on each side at least, here are {len(self._made)} and {n_real}")
        made = self._inception(self._made, resize, "stored")[:, :POOL3]
        if self.real.stats:
            return made, read_moments(self.real.stats)
        return made, self._inception(self._true, resize, target)[:, :POOL3]

    def fid(self) -> Found:
        """FID of all images as one set."""
        made, true = self._pool3()
        halves = np.random.default_rng(0).permutation(len(made))
        spread = None
        if len(made) >= 4 and not isinstance(true, Moments) and len(true) >= 4:
            places = np.random.default_rng(1).permutation(len(true))
            values = [
                distance(made[half], true[other])
                for half, other in zip(np.array_split(halves, 2), np.array_split(places, 2))
            ]
            spread = {
                "mean": float(np.mean(values)),
                "std": float(np.std(values, ddof=1)),
                "n": 2,
                "method": f"disjoint halves of {len(made) // 2} and {len(true) // 2} images",
            }
        switches = self.switches
        variant = self._variant(f"shorter side {switches.fid_resize}", f"target {switches.fid_target}")
        n_real = true.n if isinstance(true, Moments) else len(true)
        found = Found(distance(made, true), variant, len(made), n_real, spread=spread)
        found.notes = [f"FID falls with the number of images: compare only {len(made)} with {n_real}"]
        return self._named(found, "fid")

    def fid_per_story(self) -> Found:
        """Mean over stories of FID between a story's images, of stories with more than one step (Q44)."""
        self.features.require("inception")
        stories: dict[str, list[Sample]] = {}
        for sample in self.drawn:
            stories.setdefault(sample.group, []).append(sample)
        stories = {group: some for group, some in stories.items() if len(some) > 1}
        if not stories:
            raise Skipped("no story has 2 images at least")
        resize, target = self.switches.fid_resize, self.switches.fid_target
        shown = [sample for some in stories.values() for sample in some]
        made = self._inception([Path(str(s.image)) for s in shown], resize, "stored")[:, :POOL3]
        true = self._inception([Path(str(s.reference.image)) for s in shown], resize, target)[:, :POOL3]
        ends = np.cumsum([len(some) for some in stories.values()])[:-1]
        scores = map(frechet_distance_of_few, np.split(made, ends), np.split(true, ends))
        terms = {group: (score, 1.0) for group, score in zip(stories, scores)}
        variant = self._variant(f"shorter side {resize}", f"target {target}", "mean over stories")
        return self._named(self.ratio(terms, variant, len(terms)), "fid_per_story")

    def inception_score(self) -> Found:
        """Inception Score of the drawn images."""
        logits = self._inception(self._made, "none", "stored")[:, POOL3:]
        try:
            spread = inception_score(logits, self.switches.is_chunks)
        except ValueError as error:
            raise Skipped(str(error)) from None
        found = Found(spread.mean, self._variant(f"chunks {self.switches.is_chunks}"), len(logits))
        found.spread = {"mean": spread.mean, "std": spread.std, "n": spread.n, "method": "chunks"}
        return self._named(found, "inception_score")

    def kid(self) -> Found:
        """KID."""
        made, true = self._pool3()
        if isinstance(true, Moments):
            raise Skipped("KID needs real images; --real_stats has their moments only")
        size = int(self.switches.kid_subset)
        try:
            spread = kernel_distance(made, true, size=size)
        except ValueError as error:
            raise Skipped(f"{error} (--switch kid_subset=NUMBER)") from None
        found = Found(spread.mean, self._variant(f"subsets of {size}"), len(made), len(true))
        found.spread = {"mean": spread.mean, "std": spread.std, "n": spread.n, "method": "subsets"}
        return self._named(found, "kid")

    def cmmd(self) -> Found:
        """CMMD."""
        name = "clip_l14_336"
        self.features.require(name)
        if not self._made or not self._true:
            raise Skipped("no images were drawn")
        made, true = (self.features.clip_images(name, paths) for paths in (self._made, self._true))
        return Found(cmmd(made, true), f"{name} {self.features.hash(name)[:8]}", len(made), len(true))

    # -- texts and images -----------------------------------------------------------------------

    def placed(self, ask: str) -> Found:
        """Whether an image comes exactly where one is called for: precision, recall, f1 or exact."""
        counts: dict[str, np.ndarray] = {}
        for s in self.samples:
            want, made = s.wants_image, s.image is not None
            row = {
                "precision": (want and made, made),
                "recall": (want and made, want),
                "f1": (2 * (want and made), want + made),
                "exact": (want == made, 1),
            }[ask]
            counts[s.group] = counts.get(s.group, np.zeros(2)) + np.array(row, float)
        terms = {group: (float(row[0]), float(row[1])) for group, row in counts.items()}
        return self.ratio(terms, "of the references' images", len(self.samples))

    def mm_relevance(self) -> Found:
        """MM-Relevance, of dialogues (``m5``) or of single responses (``official``)."""
        name, form = "clip_b32", self.switches.mmrel
        self.features.require(name)
        variant = f"{form}, {name} {self.features.hash(name)[:8]}"
        if form == "official":
            return self.mean(dict(self._responses(name)), variant)
        similar = self.similar_texts(lambda some: self.features.clip_texts(name, some))
        target = self.switches.clip_target
        alike = self.similar_images(name, target) if self.drawn else {}
        dialogs: dict[str, list[Slot]] = {}
        for s in self.samples:
            got, want = self.texts[s.id]
            slots = dialogs.setdefault(s.group, [])
            slots.append(Slot(bool(want), bool(got), similar.get(s.id)))
            slots.append(Slot(s.wants_image, s.image is not None, alike.get(s.id)))
        terms = {group: (mm_relevance_m5(slots), 1.0) for group, slots in dialogs.items()}
        return self.ratio(terms, f"{variant}, target {target}", len(terms))

    def _responses(self, name: str) -> dict[str, float]:
        """MMDialog's score of each response: its elements from the left, text before image."""
        sides = []
        for place in (0, 1):
            said = {key: pair[place] for key, pair in self.texts.items() if pair[place]}
            shown = {s.id: (s.image, s.reference.image)[place] for s in self.samples}
            shown = {key: path for key, path in shown.items() if path}
            rows: dict[str, list[np.ndarray]] = {s.id: [] for s in self.samples}
            if said:
                for key, row in zip(said, self.features.clip_texts(name, list(said.values()))):
                    rows[key].append(row)
            if shown:
                for key, row in zip(shown, self.features.clip_images(name, list(shown.values()))):
                    rows[key].append(row)
            sides.append(rows)
        found = {}
        for s in self.samples:
            got, want = (np.stack(rows[s.id]) if rows[s.id] else np.zeros((0, 1)) for rows in sides)
            if len(want):
                found[s.id] = mm_relevance_official(got, want) if len(got) else 0.0
        return found


def distance(made: np.ndarray, true: np.ndarray | Moments) -> float:
    """FID in its quicker exact form.

    Raises:
      Skipped: the sets do not compare.
    """
    try:
        if isinstance(true, Moments) or max(len(made), len(true)) > FEW:
            return frechet_distance(moments(made), true if isinstance(true, Moments) else moments(true))
        return frechet_distance_of_few(made, true)
    except ValueError as error:
        raise Skipped(str(error)) from None


COMPUTE: dict[str, Callable[[Scorer], Found]] = {
    "clip_i": Scorer.clip_i,
    "clip_t": lambda scorer: scorer.image_text("clip_l14"),
    "clip_score": Scorer.clip_score,
    "clip_score_captioning": lambda scorer: scorer.image_text("clip_b32", CAPTION_PREFIX, 2.5, 0.0),
    "fid": Scorer.fid,
    "fid_per_story": Scorer.fid_per_story,
    "inception_score": Scorer.inception_score,
    "kid": Scorer.kid,
    "cmmd": Scorer.cmmd,
    "bleu_1": lambda scorer: scorer.bleu(1),
    "bleu_2": lambda scorer: scorer.bleu(2),
    "sacrebleu": Scorer.sacrebleu,
    "cider_d": Scorer.cider,
    "rouge_l": Scorer.rouge,
    "meteor": Scorer.meteor,
    "s_bert": Scorer.sbert,
    "mm_relevance": Scorer.mm_relevance,
    "image_precision": lambda scorer: scorer.placed("precision"),
    "image_recall": lambda scorer: scorer.placed("recall"),
    "image_f1": lambda scorer: scorer.placed("f1"),
    "image_exact": lambda scorer: scorer.placed("exact"),
}
UNITS = {
    "fid": "distance",
    "fid_per_story": "distance",
    "kid": "distance",
    "cmmd": "distance x 1000",
    "inception_score": "exp(nats)",
    "clip_i": "cosine",
    "clip_t": "cosine",
    "s_bert": "cosine",
    "clip_score": "100 x cosine",
    "clip_score_captioning": "2.5 x cosine",
    "sacrebleu": "0 to 100",
    "cider_d": "0 to 10",
}
"""Of a metric's value; the others are shares from 0 to 1."""
LOWER_IS_BETTER = ("fid", "fid_per_story", "kid", "cmmd")
