"""Figures, one a file, drawn from stored rows without computing anything again."""

# name of the file -> what it shows
FIGURES = {
    "minority_collapse": "regimes over imbalance ratio and lambda, with theory's boundaries",
}
