"""Figures, one a file, drawn from the rows that a study has stored without computing anything again."""

# name of the file -> the study whose folder it reads, and what it shows
FIGURES = {
    "minority_collapse": ("minority_collapse", "K = 10: regimes at the optimum and classes killed by descent, with theory's lines"),
    "minority_collapse_bias": ("minority_collapse", "K = 10 with a free and a penalised bias: regimes at the optimum"),
    "minority_collapse_sizes": ("minority_collapse", "K = 4 and K = 100: the optimum and where descent ends"),
    "minority_collapse_cuts": ("minority_collapse", "classes killed by descent over initial scale, width and momentum"),
    "deep_basins": ("deep_basins", "how often gradient flow ends at deep neural collapse, over width and lambda"),
    "deep_basins_ranks": ("deep_basins", "ranks at which gradient flow ends, over width, lambda, scale and depth"),
    "deep_basins_map": ("deep_basins", "the share at deep neural collapse over width and scale; other optimisers on the same seeds"),
    "deep_relu": ("deep_relu", "deep ReLU chains: what lies below deep neural collapse, graph solutions, where descent ends"),
    "dnc_stability": ("dnc_stability", "index of deep neural collapse over classes, depth and penalty, with the exact stability line"),
    "dnc_stability_orbit": ("dnc_stability", "zero eigenvalues at DNC and at pairs over the width, against two counts"),
    "saddle_passages": ("saddle_passages", "the staircase of the loss: critical points passed, singular values, heat maps of the logits"),
    "depth_implicit_bias": ("depth_implicit_bias", "effective rank over depth, width and scale without penalty, margins, singular values"),
    "deep_optimum": ("deep_optimum", "best structures of deep linear models over classes, depth and penalty, with the crossovers"),
    "deep_optimum_crossovers": ("deep_optimum", "where the best structure changes with the penalty, over classes, a panel a depth"),
    "deep_optimum_excess": ("deep_optimum", "how far deep neural collapse is above the best structure"),
    "deep_optimum_limit": ("deep_optimum", "codes of least Schatten norm as the penalty vanishes; where zero takes over"),
    "guided_etf": ("guided_etf", "descent with the nearest simplex ETF as classifier against others, UFM-10 to UFM-1000, a file each"),
    "etf_cost": ("etf_cost", "time and peak memory of the nearest simplex ETF and its gradient over classes and width, three routes"),
    "etf_ablation": ("etf_ablation", "nearest-ETF options: averaging, proximal point, guard, class weights; the gradient through it"),
    "network_imbalance": (
        "network_imbalance",
        "trained ReLU networks over theory's map of minority collapse; margins, norms, objectives, epochs",
    ),
    "network_guided": ("network_guided", "networks with the nearest ETF as classifier and with others, balanced and long-tailed"),
    "network_low_rank": ("network_low_rank", "networks with deep heads: loss against collapse, mean logits, spectra"),
    "network_low_rank_ends": ("network_low_rank", "where networks with deep heads end, and their unconstrained model: values, ranks"),
}
