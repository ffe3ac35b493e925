"""The command ``evaluate`` without its flags: predictions, features, scores, results (docs/evaluation.md)."""
