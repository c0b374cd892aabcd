"""A fitted model: how it is prepared, how it classifies, how it is saved and described, and predictions as files."""
