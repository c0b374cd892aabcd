"""Infrastructure: ranks, devices, progress, atomic writes, reading of text and YAML files, templates."""
