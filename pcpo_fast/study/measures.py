"""What algorithms are compared by: the names that a study file, its tables and its figures share."""

# each measure of quality, and whether more of it is better (1), worse (-1) or neither (0)
QUALITY: dict[str, int] = {
    "frechet_distance": -1,
    "inception_score": 1,
    "accuracy": 1,
    "feature_diversity": 1,
    "pixel_diversity": 1,
    "feature_shift": 0,
}
# a run reaches a reward at these costs, each with the column of its evaluations that counts it
COSTS = {"epochs": "epoch", "images": "images", "seconds": "seconds"}
# how much log rho misses of rho - 1
TAYLOR = "taylor_error"
# a claim is about one of them
MEASURES = (*COSTS, *QUALITY, TAYLOR)
