"""One file for a side of a benchmark: what runs in a process of its own. Started by `benchmarks/harness.py`."""
