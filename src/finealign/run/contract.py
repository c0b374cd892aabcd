"""The names of the files and folders in a run folder."""

RUN, CONFIG, METRICS = "run.json", "config.yaml", "metrics.jsonl"
PREDICTIONS, SET_ASIDE, MODEL, CHECKPOINTS = "predictions.csv", "set_aside.csv", "model", "checkpoints"
EXAMPLES, EVALUATION, REPORT = "examples", "evaluation.json", "report.html"
REVIEW = "review.json"  # the plan of a review
LEARNED_FROM = "learned_from.csv"  # only where labels were given: those that were learned from
CONTENTS = (
    *(RUN, CONFIG, METRICS, PREDICTIONS, SET_ASIDE, EXAMPLES, MODEL, CHECKPOINTS, EVALUATION, REVIEW, REPORT),
    LEARNED_FROM,
)

# What a person has labelled in a review. It is none of the contents: a run that replaces this one leaves it there.
LABELS = "labels.csv"

EXAMPLES_LIST = "examples.json"  # in the folder EXAMPLES, beside the pictures it lists

# While a process writes the run folder, and never behind it: the process that does, and the one that takes its place.
LOCK = "run.lock"
TAKING_OVER = f"{LOCK}.part"
