"""Objectives under growing staleness, on the calculator's chains: `python -m benchmarks.stability_study --help`."""
