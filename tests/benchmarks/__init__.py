"""Benchmarks: ratios inside one run on one machine, each against a bare loop or a remedy that people use."""
