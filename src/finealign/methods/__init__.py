"""The methods, one short file each, and nothing else. ``METHOD`` in each file is the method's class."""
