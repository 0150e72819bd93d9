"""Studies: one question a file. `python -m studies` lists them, `python -m studies NAME` answers one."""

# name of the file -> the question it answers
STUDIES = {
    "minority_collapse": "When does minority collapse happen, at the optimum and where descent ends?",
    "deep_basins": "How often does descent end at deep neural collapse, and at which rank otherwise?",
    "deep_relu": "Which (K, L) beat deep neural collapse in deep ReLU chains, and by how much?",
    "dnc_stability": "Is deep neural collapse a local minimum, and what dimension has the set of its solutions?",
    "saddle_passages": "At which saddles does gradient flow linger on its way, and are they the catalogued critical points?",
    "depth_implicit_bias": "Without regularisation, does depth lower the rank of the logits, and does width raise it?",
    "deep_optimum": "Which structure is optimal in deep linear models, and where does it change?",
    "guided_etf": "How much faster do features collapse when the classifier is the nearest simplex ETF?",
    "etf_cost": "What do the nearest simplex ETF and its gradient cost, in closed form, by trust regions, by a declarative node?",
    "etf_ablation": "Which options of the nearest-ETF classifier matter, and how much of the gradient comes through it?",
    "network_imbalance": "Does a trained ReLU network reach the margins, norms, orthogonality and thresholds of free features?",
    "network_guided": "Does a network collapse faster with the nearest ETF as classifier than with a fixed ETF or a trained one?",
    "network_low_rank": "Does a network with a deep linear or ReLU head end at deep neural collapse, or below it at low rank?",
}
