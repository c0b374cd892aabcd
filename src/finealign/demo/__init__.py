"""The demo: a small world of drawn birds, a small model that ships with the package, and the methods side by side."""
