"""What raters are asked, as in the paper's Table 3."""

from __future__ import annotations

QUESTIONS = {
    "continuity": "Which text goes on better from the scenes before it?",
    "quality": "Which image is of better quality?",
    "coherence": "Which text and image fit better together, and with the scenes before them?",
}
"""Language continuity, image quality, and multimodal coherence."""
NAMES = {
    "continuity": "language continuity",
    "quality": "image quality",
    "coherence": "multimodal coherence",
}
"""As the paper's table calls them."""
LEFT, RIGHT, TIE = "1", "2", "tie"
CHOICES = {LEFT: "Output 1", RIGHT: "Output 2", TIE: "Tie"}
"""Answers as they are stored -> as raters see them; keys 1, 2 and 3 on the page."""
PAPER = {
    "continuity": (55.22, 9.89, 34.89),
    "quality": (52.43, 9.78, 37.79),
    "coherence": (56.90, 14.22, 28.88),
}
"""Table 3 in percent of judgements: MiniGPT-5, tie, two-stage baseline."""
