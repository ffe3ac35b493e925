"""The small world: captioned scenes drawn by rule, and an oracle that reads them back from pixels."""
