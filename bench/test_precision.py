"""Error of a step's log-ratio against float64: two ways of subtracting log-probabilities, and the difference form.

See docs/precision.md for what is computed and what came out. `pytest bench/test_precision.py --save-results` writes
the figure and the numbers.
"""

import json
from pathlib import Path

import pytest
import torch

from bench import report
from bench.cases import affine_schedule, affine_step, coefficients, default_device, make_table, usual_log_prob
from pcpo_fast import policy_loss, sampler_step

SHAPE = (4, 64, 64)
SEEDS = 16
# steps of 50-step DDIM, from the noisiest to the last
STEPS = (0, 10, 20, 30, 40, 46, 48, 49)
# orders of magnitude of the true log-ratio, half an order apart
TARGETS = tuple(10.0 ** (exponent / 2) for exponent in range(-16, -3))
CLIP_RANGE = 1e-4
# labels in the figure, and their places
METHODS = {
    "bf16": ("subtract log-probs,\nlatents rounded to bf16", 3e-6, 8e3),
    "fp32": ("subtract fp32 log-probs", 1e-8, 5e-3),
    "difference": ("difference form: pcpo_fast.policy_loss", 4e-8, 2e-5),
}
COLOURS = {"bf16": "#D55E00", "fp32": "#E69F00", "difference": "#0072B2"}
FIGURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "precision.png"


def true_log_ratio(new, old, sample, prev_sample, table, step):
    """From stored inputs, all of them taken as they are, in float64."""
    schedule = affine_schedule(table).double()
    new_log_prob, old_log_prob = (
        usual_log_prob(m.double(), sample.double(), prev_sample.double(), affine_step, schedule, step)
        for m in (new, old)
    )
    return new_log_prob - old_log_prob


def true_difference_form(new, old, noise, table, step):
    """The same from the noise: what `policy_loss` is given."""
    weight = table.weight[step]
    e, z = (new.double() - old.double()).flatten(1), noise.double().flatten(1)
    return -(weight * (e * z).mean(1) + weight**2 * e.square().mean(1) / 2)


def changed_output(old, noise, weight, target, generator):
    """A new output in a random direction, as far from the old one as the wanted size of the log-ratio takes."""
    direction = torch.randn(old.shape, generator=generator).to(old.device)
    along = (direction * noise).flatten(1).double().mean(1)
    # towards smaller probability, where every size can be had
    direction *= along.sign().view(-1, 1, 1, 1)
    along, square = along.abs(), direction.flatten(1).double().square().mean(1)
    distance = ((along**2 + 2 * square * target).sqrt() - along) / (square * weight)
    return (old.double() + distance.view(-1, 1, 1, 1) * direction).float()


def study(device):
    """Relative errors of each method: (targets, steps x seeds), and how the noise's own rounding adds to ours."""
    table = make_table(device)
    errors = {name: [] for name in (*METHODS, "difference, from stored states")}
    sizes = []
    for target in TARGETS:
        row_errors = {name: [] for name in errors}
        for index in STEPS:
            generator = torch.Generator().manual_seed(index)
            old, sample, noise = (torch.randn(SEEDS, *SHAPE, generator=generator).to(device) for _ in range(3))
            step = torch.full((SEEDS,), index, device=device)
            weight = table.weight[step]
            new = changed_output(old, noise, weight, target, generator)
            step_errors = {
                "bf16": _bf16_error(new, old, sample, noise, table, step),
                "fp32": _fp32_error(new, old, sample, noise, table, step),
            }
            stored = sampler_step(old, sample, table, step, noise)
            ours = policy_loss(new, old, stored.noise, table, step, torch.ones(SEEDS, device=device)).log_ratio
            truth = true_difference_form(new, old, stored.noise, table, step)
            from_states = true_log_ratio(new, old, sample, stored.prev_sample, table, step)
            sizes.append(truth.abs())
            step_errors["difference"] = relative(ours, truth)
            step_errors["difference, from stored states"] = relative(ours, from_states)
            for name, values in step_errors.items():
                row_errors[name].append(values)
        for name, values in row_errors.items():
            errors[name].append(torch.cat(values))
    return {name: torch.stack(values).cpu() for name, values in errors.items()}, torch.stack(sizes).cpu()


def relative(value, truth):
    return (value.double() - truth).abs() / truth.abs()


def _fp32_error(new, old, sample, noise, table, step):
    """Both log-probabilities in float32, of the same stored float32 latents."""
    prev_sample = sampler_step(old, sample, table, step, noise).prev_sample
    new_log_prob, old_log_prob = (
        usual_log_prob(m, sample, prev_sample, affine_step, affine_schedule(table), step) for m in (new, old)
    )
    return relative(new_log_prob - old_log_prob, true_log_ratio(new, old, sample, prev_sample, table, step))


def _bf16_error(new, old, sample, noise, table, step):
    """The rollout takes the old log-probability of x', then stores x' in bf16, of which training takes the new one."""
    a, b, s = (column.float() for column in coefficients(table, step, sample))
    sample = sample.bfloat16().float()
    prev_sample = a * sample + b * old + s * noise
    old_log_prob = usual_log_prob(old, sample, prev_sample, affine_step, affine_schedule(table), step)
    stored = prev_sample.bfloat16().float()
    new_log_prob = usual_log_prob(new, sample, stored, affine_step, affine_schedule(table), step)
    # with rounded latents a true log-ratio may be near 0: errors are relative to the one before rounding
    size = true_log_ratio(new, old, sample, prev_sample, table, step).abs()
    error = (new_log_prob - old_log_prob).double() - true_log_ratio(new, old, sample, stored, table, step)
    return error.abs() / size


@pytest.fixture(scope="module")
def errors():
    return study(default_device())


def test_the_true_log_ratios_have_the_wanted_sizes(errors):
    _, sizes = errors
    sizes = sizes.view(len(TARGETS), -1)
    wanted = torch.tensor(TARGETS, dtype=torch.float64)[:, None]
    # the stored noise is not quite the drawn one, and the change is rounded to the output's float32
    assert ((sizes / wanted).log2().abs() < 0.5).all()


def test_the_difference_form_is_right_to_1e3_everywhere(errors, request):
    errors, _ = errors
    if folder := request.config.getoption("--save-results"):
        save(errors, Path(folder))
    assert errors["difference"].max() < 1e-3
    assert errors["difference, from stored states"].max() < 1e-3


def test_subtracting_fails_below_the_clip_range(errors):
    errors, _ = errors
    for size, fp32, bf16 in zip(TARGETS, errors["fp32"], errors["bf16"], strict=True):
        if size <= 1e-6:
            assert fp32.max() > 1e-2
        if size <= CLIP_RANGE:
            assert bf16.max() > 1


def save(errors, folder):
    table = [
        {
            "log_ratio": size,
            **{
                name: {"median": values[i].median().item(), "worst": values[i].max().item()}
                for name, values in errors.items()
            },
        }
        for i, size in enumerate(TARGETS)
    ]
    folder = report.device_folder(folder, default_device())
    (folder / "precision.json").write_text(json.dumps(table, indent=1) + "\n")
    # the figure in the docs is drawn when the repository's own results are written
    figure(errors, FIGURE if folder.parent == report.RESULTS else folder / "precision.png")


def figure(errors, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, (label, place, height) in METHODS.items():
        median, worst = errors[name].median(1).values, errors[name].max(1).values
        axis.loglog(TARGETS, median, color=COLOURS[name], marker="o", markersize=4)
        axis.loglog(TARGETS, worst, color=COLOURS[name], linestyle=(0, (4, 2)), linewidth=1.2)
        axis.text(place, height, label, color=COLOURS[name], fontsize=10)
    axis.axhline(1e-3, color="#555555", linewidth=0.8)
    axis.text(0.8e-8, 1.25e-3, "0.1%", fontsize=9, color="#555555")
    axis.axvline(CLIP_RANGE, color="#555555", linewidth=0.8, linestyle=":")
    axis.text(CLIP_RANGE * 1.1, 3e5, "clip range", fontsize=9, color="#555555", va="bottom")
    axis.plot([], [], color="#555555", marker="o", markersize=4, label="median")
    axis.plot([], [], color="#555555", linestyle=(0, (4, 2)), linewidth=1.2, label="worst")
    axis.legend(loc="upper right", frameon=False, fontsize=9)
    axis.set_ylim(1e-8, 1e7)
    axis.set_xlabel("true log-ratio (absolute value; mean over elements)")
    axis.set_ylabel("relative error against float64")
    axis.set_title("Error of a step's log-ratio, SD 1.5 latents", fontsize=11)
    axis.grid(color="#e5e5e5", linewidth=0.6)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)
