"""Figures, one a file, drawn from the rows that a study has stored without computing anything again."""

# name of the file -> the study whose folder it reads, and what it shows
FIGURES = {
    "minority_collapse": ("minority_collapse", "K = 10: regimes at the optimum and classes killed by descent, with theory's lines"),
    "minority_collapse_bias": ("minority_collapse", "K = 10 with a free and a penalised bias: regimes at the optimum"),
    "minority_collapse_sizes": ("minority_collapse", "K = 4 and K = 100: the optimum and where descent ends"),
    "minority_collapse_cuts": ("minority_collapse", "classes killed by descent over initial scale, width and momentum"),
}
