"""Comparing methods on many data sets: the catalogue of sets, the grid of runs, the table of results.

This package uses ``evaluate`` to read true labels, for measuring only; a method gets its images as paths without
labels.
"""
