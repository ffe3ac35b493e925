"""The study with people: a page for raters, their answers, and what follows of them (docs/evaluation.md)."""
