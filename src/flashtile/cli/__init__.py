"""The command line: one module for each command, with a `run` that computes and a `show` that prints."""
