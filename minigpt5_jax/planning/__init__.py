"""A run's real step compiled for devices that are not here: what it takes, before anything is paid for."""
