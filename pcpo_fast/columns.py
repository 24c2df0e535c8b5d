"""The columns of a step table's rows, in order: the one layout that tables, kernels, reference and tests read."""

COLUMNS = (
    # x' = a x + b m + s z
    "sample_coef",
    "output_coef",
    "std",
    # log rho = -slope <e, z + curvature e / 2>, with e the change of the model output
    "slope",
    "curvature",
    # a factor of the row's loss and gradient
    "loss_scale",
    # log p = log_prob_offset - log_prob_scale z^2 / 2 per element
    "log_prob_scale",
    "log_prob_offset",
)
