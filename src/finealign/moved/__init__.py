"""Import paths of release 0.1 whose contents have moved; to be removed after release 0.2.

Each module imports the names from their new place and warns with a DeprecationWarning that names it. The package also
searches this folder for its modules, so that ``finealign.ranks`` can still be imported.
"""
