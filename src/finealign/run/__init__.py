"""One adaptation run: writing its folder, judging its result without labels, and its HTML report."""
