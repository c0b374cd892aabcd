"""The text side of the classes: names, prompt templates and descriptions."""
