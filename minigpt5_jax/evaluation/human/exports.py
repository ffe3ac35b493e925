"""A study for Amazon Mechanical Turk, Prolific and Label Studio.

Mechanical Turk and Label Studio show one item at a time, so a row is a screen of one rater: each is to be
judged once.  Prolific sends people to the page itself.
"""

from __future__ import annotations

import csv
import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minigpt5_jax.data.json_files import write_json
from minigpt5_jax.evaluation.human.questions import CHOICES, LEFT, RIGHT

MTURK, MTURK_ROWS = "mturk.html", "mturk.csv"
PROLIFIC = "prolific.json"
LABEL_STUDIO, LABEL_STUDIO_CONFIG = "label_studio.json", "label_studio.xml"
COLUMNS = ("study", "rater", "place", "scenes", "left", "right")
LOCAL = "/data/local-files/?d="
"""How Label Studio names files of its own disk, below its document root."""
SECONDS = 40
"""What an item may take, for the estimate that Prolific wants."""


def write(
    folder: Path, study: Mapping[str, Any], addresses: Mapping[str, str], base_url: str | None, code: str
) -> None:
    """Writes the exports; those of platforms on the web only with an address.

    Args:
      study: what the page knows.  addresses: image in it -> path in the folder of the page.
      base_url: where that folder will be.  code: that raters get at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    local = {source: LOCAL + path for source, path in addresses.items()}
    tasks = [{"data": row} for row in _rows(study, local)]
    write_json(folder / LABEL_STUDIO, tasks)
    (folder / LABEL_STUDIO_CONFIG).write_text(_label_studio(study["questions"]), "utf-8")
    if base_url is None:
        return
    base = base_url.rstrip("/")
    with (folder / MTURK_ROWS).open("w", newline="", encoding="ascii") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(_rows(study, {source: f"{base}/{path}" for source, path in addresses.items()}))
    (folder / MTURK).write_text(_mturk(study), "utf-8")
    write_json(folder / PROLIFIC, _prolific(study, base, code))


def _rows(study: Mapping[str, Any], addresses: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """A screen a row, texts and images as HTML in ASCII (Mechanical Turk takes no four-byte characters)."""

    def parts(some: list[dict[str, str]], alt: str) -> str:
        shown = [
            f"<p>{html.escape(part['text'])}</p>"
            if "text" in part
            else f'<img src="{html.escape(addresses[part["image"]])}" alt="{alt}" style="max-width:320px">'
            for part in some
        ]
        made = "".join(shown) or "<p>(nothing was made)</p>"
        return made.encode("ascii", "xmlcharrefreplace").decode()

    for rater, screens in study["raters"].items():
        for place, (name, flip) in enumerate(screens):
            item = study["items"][name]
            left, right = item["options"][::-1] if flip else item["options"]
            yield {
                "study": study["sha256"],
                "rater": rater,
                "place": str(place),
                "scenes": "".join(parts(scene, "scene") for scene in item["scenes"]),
                "left": parts(left, CHOICES[LEFT]),
                "right": parts(right, CHOICES[RIGHT]),
            }


def _mturk(study: Mapping[str, Any]) -> str:
    """The layout of a HIT, whose placeholders are the columns of the table."""
    questions = "".join(
        f"<fieldset><legend>{html.escape(text)}</legend>"
        + "".join(
            f'<label><input type="radio" name="{name}" value="{value}" required> {said}</label> '
            for value, said in CHOICES.items()
        )
        + "</fieldset>\n"
        for name, text in study["questions"].items()
    )
    introduction = html.escape(study["introduction"]).replace("\n\n", "</p><p>")
    return (
        '<script src="https://assets.crowd.aws/crowd-html-elements.js"></script>\n<crowd-form>\n'
        f"<p>{introduction}</p>\n<h3>What came before</h3>${{scenes}}\n"
        '<table><tr><th>Output 1</th><th>Output 2</th></tr><tr style="vertical-align:top">'
        "<td>${left}</td><td>${right}</td></tr></table>\n"
        f"{questions}</crowd-form>\n"
    )


def _prolific(study: Mapping[str, Any], base: str, code: str) -> dict[str, Any]:
    """A study of Prolific's API, one link for each rater; its author adds ``reward`` and filters."""
    raters = study["raters"]
    longest = max(map(len, raters.values()))
    return {
        "name": "Comparison of two continuations",
        "description": study["introduction"],
        "prolific_id_option": "not_required",
        "access_details": [
            {"external_url": f"{base}/index.html?rater={rater}", "total_allocation": 1} for rater in raters
        ],
        "total_available_places": len(raters),
        "estimated_completion_time": max(1, round(longest * SECONDS / 60)),
        "completion_codes": [
            {"code": code, "code_type": "COMPLETED", "actions": [{"action": "MANUALLY_REVIEW"}]}
        ],
    }


def _label_studio(questions: Mapping[str, str]) -> str:
    """The labelling configuration."""
    asked = "".join(
        f'  <Header value="{html.escape(text)}"/>\n'
        f'  <Choices name="{name}" toName="scenes" choice="single-radio" showInline="true" required="true">\n'
        + "".join(
            f'    <Choice value="{said}" alias="{value}" hotkey="{3 * number + place}"/>\n'
            if 3 * number + place < 10
            else f'    <Choice value="{said}" alias="{value}"/>\n'
            for place, (value, said) in enumerate(CHOICES.items(), 1)
        )
        + "  </Choices>\n"
        for number, (name, text) in enumerate(questions.items())
    )
    return (
        '<View>\n  <Header value="What came before"/>\n  <HyperText name="scenes" value="$scenes"/>\n'
        '  <View style="display: flex; gap: 1rem">\n'
        '    <View><Header value="Output 1"/><HyperText name="left" value="$left"/></View>\n'
        '    <View><Header value="Output 2"/><HyperText name="right" value="$right"/></View>\n'
        f"  </View>\n{asked}</View>\n"
    )
