"""Other libraries' errors in the sentences of ours."""


def one_line(text: str) -> str:
    """A text of any length as one sentence of 200 characters at most."""
    line = " ".join(text.split())
    line = line if len(line) <= 200 else f"{line[:197]}..."
    return line if line.endswith(".") else f"{line}."
