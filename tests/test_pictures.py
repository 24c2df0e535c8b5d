"""The figure of a run: what it says about the run, and what it draws."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from matplotlib.figure import Figure
from PIL import Image

from pcpo_fast.config import Config
from pcpo_fast.metrics import Metrics
from pcpo_fast.pictures import save_curves
from pcpo_fast.rewards import RewardSet
from pcpo_fast.samplers import Schedule, build_for_evaluation, describe
from pcpo_fast.summary import reward_summary
from pcpo_fast.windows import WindowSchedule

DIFFUSION = Schedule(DDIMScheduler(steps_offset=1, clip_sample=False))
FLOW = Schedule(FlowMatchEulerDiscreteScheduler(shift=3.0))
STEPS = 4


def own_sampler(settings, schedule):
    return build_for_evaluation(Config().sampler, DIFFUSION)


def training_records(rewards, steps=STEPS):
    """A record per epoch: its rewards' summary, and lists whose first step is not trained."""
    for epoch, row in enumerate(rewards, start=1):
        lists = {
            "update/clip_fraction_per_step": [None, *(0.1 * step for step in range(1, steps))],
            "update/output_grad_norm_per_step": [None, *(epoch + step for step in range(1, steps))],
        }
        yield {"epoch": epoch, **reward_summary(torch.tensor(row), {}, {}, {}), **lists}


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws the curves of a run with these records and settings; any warning is an error."""
    figures, folders = [], itertools.count()
    save = Figure.savefig

    def savefig(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)

    def drawn(records, schedule=DIFFUSION, rewards=("digit_alignment",), **settings):
        config = Config().replace(**({"num_inference_steps": STEPS} | settings)).resolved()
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        metrics = Metrics(folder)
        for record in records:
            metrics.write(record)
        table = build_for_evaluation(config.sampler, schedule)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_curves(metrics, config, schedule, table, RewardSet(rewards), RewardSet(config.data.eval_rewards))
        metrics.close()
        with Image.open(folder / "curves.png") as image:
            assert image.width == 1328
        return figures[-1]

    return drawn


def scores_below_zero(epochs=6, images=64):
    """Rewards that approach 0 as log-probabilities do; mean + std is above 0."""
    generator = np.random.default_rng(0)
    return -(generator.exponential(size=(epochs, images)) ** 2) * 0.5 ** np.arange(epochs)[:, None]


def band_of(axes):
    """The drawn outline of the band, rewards where the axis is linear and distances to 0 where it is logarithmic."""
    (band,) = axes.collections
    return np.concatenate([path.vertices[:, 1] for path in band.get_paths()])


def test_the_title_says_what_decides_the_run(draw):
    figure = draw(
        [],
        model=r"a/$\mine$",
        objective="ppo",
        credit="native",
        learning_rate=2e-4,
        clip_range=3e-3,
        prompts_per_epoch=5,
        group_size=6,
        micro_batch_size=30,
        seed=7,
        kl_weight=0.04,
        ema_decay=0.9,
        eval_samples=11,
        rewards=("digit_alignment=0.5", "digit_accuracy"),
    )
    # a line that is too long goes on in the next one
    title = " ".join(figure.get_suptitle().split())
    for words in (
        *(r"model a/$\mine$", "tuning lora", "rewards digit_alignment=0.5 digit_accuracy", "objective ppo"),
        *("credit native", "learning_rate 0.0002", "clip_range 0.003", "seed 7", "kl_weight 0.04", "ema_decay 0.9"),
        *("30 samples per epoch (prompts_per_epoch 5 x group_size 6)", "eval_samples 11"),
    ):
        assert words in title
    assert "kl_weight" not in draw([]).get_suptitle() and "ema_decay" not in draw([]).get_suptitle()


def test_the_title_fits_on_the_figure(draw):
    figure = draw([], model="/folder" * 40, credit=(0.25,) * STEPS)
    assert "credit [0.25, 0.25, 0.25, 0.25]" in figure.get_suptitle()
    box = figure._suptitle.get_window_extent(dpi=160)
    assert box.x0 >= 0 and box.x1 <= 1328


SAMPLERS = [
    (DIFFUSION, {}, "sampler ddim, num_inference_steps 4, eta 1", None),
    (DIFFUSION, {"eta": 0.5, "credit": "native"}, "sampler ddim, num_inference_steps 4, eta 0.5", None),
    (DIFFUSION, {"credit": (1.0, 2.0, 3.0, 4.0)}, "sampler ddim, num_inference_steps 4, eta 1", None),
    (
        DIFFUSION,
        {"credit": "proportionate"},
        "sampler ddim, num_inference_steps 4, eta 1, its std re-solved for credit proportionate",
        "sampler ddim, num_inference_steps 4, eta 1",
    ),
    (
        DIFFUSION,
        {"credit": "published"},
        "sampler ddim, num_inference_steps 4, eta 1, its std re-solved for credit published",
        "sampler ddim, num_inference_steps 4, eta 1",
    ),
    (
        DIFFUSION,
        {"window_size": 2, "window": "random"},
        "sampler ddim, num_inference_steps 4, eta 1, window_size 2, window random",
        "sampler ddim, num_inference_steps 4, eta 1",
    ),
    (
        FLOW,
        {},
        "sampler flow, num_inference_steps 4, noise_level 0.7",
        "sampler flow, num_inference_steps 4, noise_level 0",
    ),
    (
        FLOW,
        {"sampler": "cps", "noise_level": 0.6},
        "sampler cps, num_inference_steps 4, noise_level 0.6",
        "sampler cps, num_inference_steps 4, noise_level 0",
    ),
    (
        DIFFUSION,
        {"sampler": "test_pictures:own_sampler", "eta": 0.2, "num_inference_steps": 20},
        "sampler test_pictures:own_sampler, num_inference_steps 20, eta 0.2",
        None,
    ),
]


@pytest.mark.parametrize(("schedule", "settings", "training", "evaluation"), SAMPLERS)
def test_samplers_are_described_as_their_tables_are(schedule, settings, training, evaluation):
    """Two descriptions where training and evaluation take other steps, and else one."""
    config = Config().replace(**({"num_inference_steps": STEPS} | settings))
    tables = WindowSchedule(config, schedule).tables
    evaluated = build_for_evaluation(config.sampler, schedule)
    same = all(
        torch.equal(getattr(table, column), getattr(evaluated, column))
        for table in tables
        for column in ("sample_coef", "output_coef", "std")
    )
    assert same == (evaluation is None)
    assert describe(config.sampler, schedule) == (training, evaluation or training)


def test_both_samplers_are_named_where_they_differ(draw):
    title = draw([], schedule=FLOW, sampler="dance").get_suptitle()
    assert "\ntraining: sampler dance, num_inference_steps 4, noise_level 0.3\n" in title
    assert title.endswith("\nevaluation: sampler dance, num_inference_steps 4, noise_level 0")
    title = draw([]).get_suptitle()
    assert title.endswith("\ntraining and evaluation: sampler ddim, num_inference_steps 4, eta 1")
    assert title.count("sampler ") == 1


def test_rewards_below_zero_have_a_logarithmic_axis_and_a_band_below_zero(draw):
    rewards = scores_below_zero()
    assert (rewards.mean(axis=1) + rewards.std(axis=1) > 0).all()
    evaluations = [{"epoch": 0, "eval/reward": -2.0}, {"epoch": 6, "eval/reward": -0.01}]
    axes = draw([*training_records(rewards), *evaluations]).axes[0]
    assert axes.get_yscale() == "log" and axes.yaxis_inverted()
    outline = band_of(axes)
    assert outline.min() > 0 and outline.max() <= -rewards.min()
    # the ends of the band are those of the images
    low, high = np.quantile(rewards, (0.1, 0.9), axis=1)
    np.testing.assert_allclose([outline.max(), outline.min()], [-low.min(), -high.max()], rtol=1e-5)
    training, evaluation = axes.lines
    np.testing.assert_allclose(training.get_ydata(), -rewards.mean(axis=1), rtol=1e-5)
    assert evaluation.get_xydata().tolist() == [[0, 2.0], [6, 0.01]]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        *("training: mean", "training: 10% to 90% of the images", "evaluation: mean")
    }


def test_other_rewards_have_a_linear_axis(draw):
    rewards = 1 + scores_below_zero()
    axes = draw(training_records(rewards)).axes[0]
    assert axes.get_yscale() == "linear" and not axes.yaxis_inverted()
    assert rewards.min() <= band_of(axes).min() and band_of(axes).max() <= 1
    np.testing.assert_allclose(axes.lines[0].get_ydata(), rewards.mean(axis=1), rtol=1e-5)


def test_scores_not_trained_on_have_the_axis_that_shows_their_gain(draw):
    evaluations = [{"epoch": epoch, "eval/digit_alignment": -(0.5**epoch)} for epoch in range(6)]
    axes = draw(evaluations, eval_rewards=("digit_alignment",)).axes[1]
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["evaluation: mean digit_alignment"]
    axes = draw([], eval_rewards=()).axes[1]
    assert axes.get_legend() is None and [text.get_text() for text in axes.texts] == ["no eval_rewards"]


def test_clipping_and_gradient_leave_untrained_steps_white(draw):
    figure = draw(training_records(scores_below_zero()))
    clipped, gradient = (axes.images[0].get_array() for axes in figure.axes[2:4])
    assert clipped.shape == gradient.shape == (STEPS, 6)
    for image in (clipped, gradient):
        mask = np.ma.getmaskarray(image)
        assert mask[0].all() and not mask[1:].any()
    np.testing.assert_allclose(clipped[1:], np.repeat([[0.1], [0.2], [0.3]], 6, axis=1))
    assert gradient[1:].tolist() == [[epoch + step for epoch in range(1, 7)] for step in range(1, STEPS)]
    for axes in figure.axes[2:4]:
        image = axes.images[0]
        assert image.cmap(np.ma.masked)[3] == 0
        assert image.get_extent() == [0.5, 6.5, STEPS - 0.5, -0.5]
        assert image.norm.vmin == 0
        # the first of the steps, at the top, is the one of most noise
        assert [label.get_text() for label in axes.get_yticklabels()] == ["751", "501", "251", "1"]
        assert axes.get_title().endswith(" (white: no value)")
    clip_bar, gradient_bar = figure.axes[4:]
    assert clip_bar.get_ylabel() == "fraction of the step's rows"
    assert "gradient of a row's loss at the model output" in gradient_bar.get_ylabel()


def test_many_timesteps_have_ten_labels_at_most(draw):
    figure = draw(training_records(scores_below_zero(), steps=19), num_inference_steps=19)
    for axes in figure.axes[2:4]:
        assert len(axes.get_yticks()) == 10


def test_epochs_with_another_number_of_steps_are_white(draw):
    records = list(training_records(scores_below_zero(3), steps=7)) + list(training_records(scores_below_zero()))[3:]
    figure = draw(records)
    for axes in figure.axes[2:4]:
        mask = np.ma.getmaskarray(axes.images[0].get_array())
        assert mask[:, :3].all() and not mask[1:, 3:].any()


NEW_KEYS = ("reward/quantiles", "update/output_grad_norm_per_step")


def test_metrics_of_an_older_run_are_drawn(draw):
    """All of them, and those of a run that goes on with this version."""
    records = list(training_records(scores_below_zero()))
    older = [{key: value for key, value in record.items() if key not in NEW_KEYS} for record in records]
    figure = draw(older)
    rewards, _, clipped, gradient, *bars = figure.axes
    assert not np.isnan(rewards.lines[0].get_ydata()).any() and rewards.get_yscale() == "log"
    assert not rewards.collections[0].get_paths()
    assert clipped.images and not gradient.images and len(bars) == 1
    figure = draw(older[:3] + records[3:])
    assert len(figure.axes[0].lines[0].get_ydata()) == 6
    (band,) = figure.axes[0].collections
    assert band.get_paths()[0].vertices[:, 0].min() == 4
    mask = np.ma.getmaskarray(figure.axes[3].images[0].get_array())
    assert mask[:, :3].all() and not mask[1:, 3:].any()


def test_values_that_are_not_finite_leave_gaps(draw):
    records = list(training_records(scores_below_zero()))
    records[0] |= {"reward/mean": float("nan")}
    records[2] |= {"reward/mean": float("nan"), "reward/quantiles": [None, None]}
    records[4] |= {"reward/mean": float("inf")}
    evaluations = [{"epoch": 0, "eval/reward": -1.0}, {"epoch": 3, "eval/reward": None}]
    axes = draw(records + evaluations).axes[0]
    training, evaluation = axes.lines
    assert np.isnan(training.get_ydata()).tolist() == [True, False, True, False, True, False]
    assert np.isnan(evaluation.get_ydata()).tolist() == [False, True]
    (band,) = axes.collections
    ends = [(path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in band.get_paths()]
    assert ends == [(1, 2), (4, 6)]
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize("records", [[], [{"epoch": 0, "eval/reward": -1.0}], list(training_records([[0.0, 0.0]]))])
def test_the_start_of_a_run_is_drawn(draw, records):
    figure = draw(records)
    assert len(figure.axes) >= 4
    # there is no half of an epoch
    for axes in figure.axes[:4]:
        if axes.lines or axes.images:
            assert all(tick == int(tick) for tick in axes.get_xticks())
