"""A study that was never run: random curves with known effects, in the format of study.json."""

import math

import numpy as np

ALGORITHMS = {
    "ddpo": {"title": "DDPO", "objective": "ppo", "credit": "native"},
    "hinge": {"title": "log-hinge alone", "credit": "native"},
    "constant": {"title": "constant credit", "credit": "constant"},
    "slow": {"title": "paper's credit", "credit": "proportionate"},
    "listed": {"title": "a weight per step", "credit": [1.0] * 9 + [0.0]},
}
GRID = {f"map {p} {q}": {"title": f"map {p} {q}", "credit_powers": [p, q]} for p in (0, 1) for q in (-1, 1)} | {
    "map 1 0": {"title": "map 1 0", "credit_powers": [1, 0]}
}
CLAIMS = [
    {"claim": "fewer epochs", "stated": "25%", "algorithm": "constant", "measure": "epochs", "rates": "best"},
    {"claim": "at any rate", "algorithm": "slow", "measure": "epochs", "rates": "equal"},
    {"claim": "fewer seconds", "algorithm": "constant", "measure": "seconds", "rates": "best"},
    {"claim": "better images", "algorithm": "constant", "measure": "frechet_distance", "rates": "best"},
    {"claim": "than the paper's", "algorithm": "constant", "against": "slow", "measure": "images", "rates": "best"},
    {"claim": "no worse diversity", "algorithm": "hinge", "measure": "feature_diversity", "rates": "best"},
    {"claim": "rho - 1 serves", "algorithm": "ddpo", "measure": "taylor_error", "rates": "best"},
]
# how many times as fast as the baseline
SPEED = {"ddpo": 1.0, "hinge": 1.0, "constant": 1.5, "slow": 0.8}
# added to the Frechet distance at equal reward
FRECHET = {"ddpo": 0.0, "hinge": 0.0, "constant": -0.01, "slow": 0.0}
RATES = (5e-5, 1e-4, 2e-4, 4e-4)
NATIVE, VARIANCE = [1.0, *[2.0] * 8, 3.0], [1e-2, *[2e-2] * 8, 1e-2]
TIMESTEPS = [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]


def evaluations(rng, speed, frechet, seed_effect, epochs=20, every=2, bounded=True):
    """Rewards that approach 0 exponentially (or 1, where not `bounded`), quality that follows the reward."""
    start, pace = -0.55 + 0.04 * seed_effect, 0.13 * math.exp(0.08 * seed_effect + 0.05 * rng.normal())
    level = 0.003 * rng.normal()
    rows = []
    for epoch in range(0, epochs + 1, every):
        clean = start * math.exp(-pace * speed * epoch)
        trained = min(epoch / every, 1.0)
        rows.append(
            {
                "epoch": epoch,
                "images": 256 * epoch,
                "seconds": 4.0 * epoch * (1 + 0.02 * rng.random()),
                "reward": (clean if bounded else 1 + clean) + 0.004 * rng.normal() * -clean,
                "accuracy": 0.99 + 0.3 * clean + 0.003 * rng.normal(),
                "frechet_distance": 0.06 + 0.04 * clean + trained * frechet + level + 0.002 * rng.normal(),
                "inception_score": 8 + 2 * clean + 0.02 * rng.normal(),
                "feature_diversity": 5.5 - 4 * clean + 0.1 * rng.normal(),
                "pixel_diversity": 0.2 - 0.1 * clean + 0.004 * rng.normal(),
                "feature_shift": 0.0 if epoch == 0 else 1 + clean + 0.02 * rng.random(),
                "pixel_shift": 0.0 if epoch == 0 else 0.1 + 0.1 * clean,
            }
        )
    return rows


def run(part, task, algorithm, rate, seed, speed, frechet, **options):
    rng = np.random.default_rng([seed, int(rate * 1e6), *f"{task}{algorithm}".encode()])
    found = evaluations(rng, speed, frechet, np.random.default_rng(seed).normal(), **options)
    last, count = found[-1]["epoch"], len(TIMESTEPS)
    peak = 8.3 if algorithm in ("ddpo", "hinge") else 1.8
    norm = np.where(np.arange(count) == count - 2, peak, np.linspace(1, 1.4, count)) * (1 + 0.1 * rng.random(count))
    clip = np.minimum(0.02 * norm**1.5, 0.45)
    return {
        "part": part,
        "task": task,
        "algorithm": algorithm,
        "learning_rate": rate,
        "seed": seed,
        "settings": {"learning_rate": rate},
        "finished": True,
        "evaluations": found,
        "training": {
            "reward": [row["reward"] for row in found],
            "seconds": [row["seconds"] for row in found],
            "taylor_error": [0.04, *(0.001 * (row["epoch"] + 1) / last for row in found)],
        },
        "steps": [
            {
                "epoch": epoch,
                "timesteps": TIMESTEPS,
                "clip_fraction": [None, *(clip[1:] * (1 + epoch / last)).tolist()],
                "gradient_norm_mean": (1e-3 * norm / (1 + epoch / last)).tolist(),
                "gradient_norm_variance": (1e-7 * norm).tolist(),
                "log_ratio_quantiles": [-0.1, -0.05, -0.01, 0.0, 0.01, 0.05, 0.1],
            }
            for epoch in (1, last // 2, last)
        ],
        "gradients": [
            {
                "epoch": epoch,
                "native_weight": NATIVE,
                "signal": (1e-4 * norm / (1 + epoch)).tolist(),
                "variance": VARIANCE,
                # the steps' gradients are orthogonal, and the noise hides the last one
                "gram": np.diag([*([4e-8] * 9), -1e-9]).tolist(),
            }
            for epoch in (0, last)
        ],
        "environment": {"pcpo_fast": "0", "torch": "0", "machine": "none"},
    }


def study(seeds=10, tasks=("digits", "flow"), sweep_seeds=2):
    """A complete study: the best rate is 2e-4 for every algorithm, and `SPEED` and `FRECHET` are the effects."""
    names = {"digits": "digits, 10 DDIM steps, digit alignment", "flow": "digits-flow, 10 Flow-SDE steps, brightness"}
    details = {
        "digits": {"preset": "digits", "targets": [-0.1, -0.3, -0.2]},
        "flow": {"preset": "digits-flow", "targets": [0.7, 0.8, 0.9]},
    }
    parts = {
        "sweep": {"learning_rates": list(RATES), "seeds": list(range(100, 100 + sweep_seeds))},
        "best": {"learning_rates": "best", "seeds": list(range(seeds))},
        "equal": {"learning_rates": [1e-4], "seeds": list(range(seeds))},
        "map": {"learning_rates": [1e-4], "seeds": list(range(min(seeds, 3)))},
    }
    for name, part in parts.items():
        part |= {"tasks": list(tasks), "algorithms": list(GRID if name == "map" else ALGORITHMS)}
    # the curve of reward against rate: worse images above the best rate, less reward below
    factor = {5e-5: 0.5, 1e-4: 0.75, 2e-4: 1.0, 4e-4: 0.9}
    runs = []
    for task in tasks:
        options = {"bounded": task == "digits"}
        for name, part in parts.items():
            for algorithm in part["algorithms"]:
                for rate in [2e-4] if part["learning_rates"] == "best" else part["learning_rates"]:
                    for seed in part["seeds"]:
                        speed = SPEED.get(algorithm, 1.2) * factor[rate]
                        frechet = FRECHET.get(algorithm, 0.0)
                        runs.append(run(name, task, algorithm, rate, seed, speed, frechet, **options))
    file = {
        "settings": {},
        "tasks": {
            task: {"title": names[task], "settings": {}, "baseline": "ddpo", "frechet_limit": 0.08, **details[task]}
            for task in tasks
        },
        "algorithms": ALGORITHMS | GRID,
        "parts": parts,
        "claims": [claim | {"tasks": list(tasks)} for claim in CLAIMS],
    }
    return {"study": "synthetic", "file": file, "runs": runs}
