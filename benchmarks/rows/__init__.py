"""The rows of the scoreboard: each module has ``lines(options)``, which yields the finished lines."""
