"""Methods side by side on many data sets: the catalogue, the grid of runs, the table.

Beside ``evaluate`` this is where ground truth is read, to measure with; the images a method learns from come as bare
paths.
"""
