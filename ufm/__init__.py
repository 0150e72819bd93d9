"""ufm: unconstrained features models of neural collapse, with their theory, a solver that finds the optimum, and its proof."""
