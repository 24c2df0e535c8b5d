"""pcpo-fast: the fast, exact core for aligning image diffusion and flow models with policy gradients."""
