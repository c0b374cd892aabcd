"""Measuring with few labels: which images a person is asked about, and what the answers say of accuracy."""
