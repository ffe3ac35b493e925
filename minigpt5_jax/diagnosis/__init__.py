"""What this machine is, how fast it moves bytes, and what looks wrong."""
