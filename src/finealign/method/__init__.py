"""What is needed to write a method: the tensor functions, the base classes and the registry of methods.

``alignment``, ``pseudo_labels`` and ``losses`` are pure functions of tensors; ``base`` has the classes to build on;
``registry`` finds methods by name.
"""

__all__ = ["alignment", "base", "losses", "pseudo_labels", "registry"]
