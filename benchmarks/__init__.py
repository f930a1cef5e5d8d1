"""Every benchmark of the project, run from the repository's root: `python -m benchmarks.train`. Nothing installs it."""
