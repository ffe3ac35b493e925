"""What the rows are measured against, in PyTorch; imported by the rows that need them only."""
