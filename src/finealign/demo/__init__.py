"""The demo: a small synthetic world of drawn birds, a small model that ships with the package, all methods compared."""
