"""The paper's ablations in the small world: rows trained, judged and written one by one, and their page."""
