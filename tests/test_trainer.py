import itertools
import json
import math

import pytest
import torch
from pipelines import make_trainer, records, save_stable_diffusion

from pcpo_fast.config import Config
from pcpo_fast.errors import SettingError
from pcpo_fast.prompts import draw_prompts, load_prompts
from pcpo_fast.rollout import Interrupted

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float32).eps


def one_epoch(trainer):
    return trainer.update(trainer.collect())


def schedule(scheduler, steps):
    """(timestep, at, ap) of every step of DDIM with leading spacing, as Python floats."""
    alphas, stride = scheduler.alphas_cumprod.double(), 1000 // steps
    timesteps = [index * stride + 1 for index in reversed(range(steps))]
    previous = [alphas[max(timestep - stride, 0)].item() for timestep in timesteps]
    return [(t, alphas[t].item(), ap) for t, ap in zip(timesteps, previous, strict=True)]


def ddim_mean(x, epsilon, at, ap, std):
    """Song et al., arXiv 2010.02502, equation 12."""
    predicted_x0 = (x - math.sqrt(1 - at) * epsilon) / math.sqrt(at)
    return math.sqrt(ap) * predicted_x0 + math.sqrt(max(1 - ap - std**2, 0)) * epsilon


def credit_of(at, ap, std):
    """w: how far, in standard deviations, the mean falls per unit of epsilon."""
    return -ddim_mean(0.0, 1.0, at, ap, std) / std


def solve(at, ap, native_std, target):
    """The std nearest `native_std` whose credit is `target`, by bisection on both sides of it; None where none is."""
    roots = []
    for far in (1e-6 * native_std, math.sqrt(1 - ap)):
        near = native_std
        if not credit_of(at, ap, near) <= target <= credit_of(at, ap, far):
            continue
        for _ in range(200):
            middle = (near + far) / 2
            near, far = (middle, far) if credit_of(at, ap, middle) < target else (near, middle)
        roots.append(near)
    return min(roots, key=lambda root: abs(root - native_std), default=None)


def published_sampler(scheduler, steps, credit):
    """Of every step: timestep, at, ap, std, and the credit w that the loss uses."""
    rows = schedule(scheduler, steps)
    stds = [math.sqrt((1 - ap) / (1 - at) * (1 - at / ap)) for _, at, ap in rows]
    credits_ = [credit_of(at, ap, std) for (_, at, ap), std in zip(rows, stds, strict=True)]
    if credit == "constant":
        credits_ = [sum(credits_) / steps] * steps
    if credit == "proportionate":
        target = sum(credits_) / steps
        stds = [solve(at, ap, std, target) or std for (_, at, ap), std in zip(rows, stds, strict=True)]
        credits_ = [target] * steps
    return [(*row, std, weight) for row, std, weight in zip(rows, stds, credits_, strict=True)]


def gaussian_log_prob(x, mean, std):
    """Per row, a mean over the elements."""
    log_prob = -((x - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    return log_prob.flatten(1).mean(dim=1)


def published_loss(trainer, batch):
    """The mean over all rows of the published loss, in float64 behind the denoiser; also each row's log-ratio."""
    config, policy = trainer.config.loss, trainer.policy
    trajectory, advantages = batch.trajectory, batch.advantages.double()
    samples, steps = trajectory.model_outputs.shape[:2]
    states = trajectory.states.double()
    losses, log_ratios = [], []
    for step, row in enumerate(published_sampler(policy.pipeline.scheduler, steps, trainer.config.sampler.credit)):
        timestep, at, ap, std, weight = row
        conditioning = trajectory.conditioning[trajectory.prompt]
        inputs = trajectory.states[:, step], torch.full((samples,), timestep), conditioning
        new = policy.predict(*inputs).double()
        old = trajectory.model_outputs[:, step].double()
        x, x_prev = states[:, step], states[:, step + 1]
        old_mean = ddim_mean(x, old, at, ap, std)
        # the mean as far from the old one as the credit says; with the sampler's own, this is ddim_mean(x, new, ...)
        new_mean = old_mean - weight * std * (new - old)
        log_ratio = gaussian_log_prob(x_prev, new_mean, std) - gaussian_log_prob(x_prev, old_mean, std)
        if config.objective == "guard":
            # Wang et al., arXiv 2510.22319: without the mean's shift, and of one scale at all steps
            shift = ((new_mean - old_mean) ** 2 / (2 * std**2)).flatten(1).mean(dim=1)
            log_ratio = std * (log_ratio + shift)
        if config.objective == "pcpo":
            loss = (config.clip_range * advantages.abs() - advantages * log_ratio).clamp(min=0)
        else:
            ratio = log_ratio.exp()
            clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
            loss = torch.maximum(-advantages * ratio, -advantages * clipped)
        if config.objective == "guard":
            # the step's share of the trajectory
            loss = loss * steps
        if config.kl_weight:
            ref_mean = ddim_mean(x, policy.predict_reference(*inputs).double(), at, ap, std)
            own_mean = ddim_mean(x, new, at, ap, std)
            loss = loss + config.kl_weight * ((own_mean - ref_mean) ** 2 / (2 * std**2)).flatten(1).mean(dim=1)
        losses.append(loss)
        log_ratios.append(log_ratio)
    return torch.cat(losses).mean(), torch.cat(log_ratios)


@pytest.mark.parametrize("credit", ["native", "constant", "proportionate"])
@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "ppo"},
        {"objective": "pcpo"},
        {"objective": "guard", "clip_range": 3e-4},
        {"objective": "pcpo", "kl_weight": 5.0},
        {"objective": "ppo", "kl_weight": 5.0, "tuning": "full", "learning_rate": 3e-5},
    ],
    ids=["ppo", "pcpo", "guard", "kl", "kl-full"],
)
def test_gradients_are_those_of_the_published_losses(model, tmp_path, settings, credit):
    """DDPO, PCPO and what lies between: the gradient of an epoch's rows, before the first optimiser step and after.

    Both sides share the denoiser, which runs in float32 on other batches here than there: its outputs differ by some
    roundings, which the gradient of a random network passes on about tenfold. z carries the rounding of x', magnified
    by 1/s, on one side alone.
    """
    trainer = make_trainer(
        model,
        tmp_path,
        credit=credit,
        # nothing but the sum of the micro-batches' gradients reaches the optimiser, twice
        max_grad_norm=1e30,
        num_inference_steps=4,
        gradient_accumulation_steps=4,
        inner_epochs=2,
        **{"clip_range": 2e-3, "learning_rate": 3e-3} | settings,
    )
    batch, found = trainer.collect(), []

    def compare(*_):
        parameters = trainer.policy.trainable_parameters()
        with torch.enable_grad():
            loss, log_ratio = published_loss(trainer, batch)
            expected = torch.autograd.grad(loss, parameters)
        got = torch.cat([parameter.grad.flatten() for parameter in parameters])
        expected = torch.cat([gradient.flatten() for gradient in expected])
        found.append((got, expected, loss.item(), log_ratio.detach()))

    trainer.optimizer.adamw.register_step_pre_hook(compare)
    record = trainer.update(batch)
    assert len(found) == 2
    # z = (x' - a x - b m)/s: four roundings of terms of order 1, magnified by 1/s
    table = batch.trajectory.table
    tolerance = 4 * EPS / table.std.min().item()
    for got, expected, *_ in found:
        assert (got - expected).norm() <= tolerance * expected.norm()
    losses = [loss for *_, loss, _ in found]
    # guard's rows are of order A / h, and nearly cancel
    slack = EPS * len(table) if trainer.config.loss.objective == "guard" else 0.0
    assert record["update/loss"] == pytest.approx(sum(losses) / 2, rel=tolerance, abs=slack)
    on_policy, off_policy = (log_ratio for *_, log_ratio in found)
    assert on_policy.abs().max() == 0
    # the second gradient saw clipped rows, rows that are not, and ratios far enough from 1 to tell the losses apart
    assert 0.2 < (off_policy.abs() > trainer.config.loss.clip_range).double().mean() < 0.8
    assert trainer.metrics.records == []


def test_micro_batches_hold_every_row_once(model, tmp_path):
    batch = make_trainer(model, tmp_path, group_size=4).collect()
    first, second = (list(batch.micro_batches(4)) for _ in range(2))
    for batches in (first, second):
        assert {sample.shape for sample, _ in batches} == {(4,)}
        rows = [(int(s), int(t)) for sample, step in batches for s, t in zip(sample, step, strict=True)]
        assert sorted(rows) == [(sample, step) for sample in range(8) for step in range(3)]
    # across samples and steps, and anew in every pass
    assert any(len(step.unique()) > 1 and len(sample.unique()) > 1 for sample, step in first)
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


def test_a_fraction_of_the_steps_is_drawn_for_every_sample(model, tmp_path):
    batch = make_trainer(model, tmp_path, group_size=16).collect()
    rows = [torch.stack(rows, 1) for rows in batch.micro_batches(4, timestep_fraction=0.6)]
    sample, step = torch.cat(rows).unbind(1)
    # 0.6 of 3 steps is 2, distinct ones
    assert sample.bincount().tolist() == [2] * 32
    assert len(torch.stack([sample, step], 1).unique(dim=0)) == 64
    assert step.bincount(minlength=3).min() > 10


def test_deterministic_steps_are_never_trained(model, tmp_path):
    """With set_alpha_to_one the last step of DDIM draws no noise."""
    folder = save_stable_diffusion(
        tmp_path / "model", set_alpha_to_one=True, timestep_spacing="leading", steps_offset=0
    )
    trainer = make_trainer(folder, tmp_path / "run")
    batch = trainer.collect()
    assert batch.trajectory.table.trainable.tolist() == [True, True, False]
    record = trainer.update(batch)
    assert record["update/clip_fraction_per_step"][2] is None
    assert None not in record["update/clip_fraction_per_step"][:2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 0.0}, "sampler: every step is deterministic, .* raise eta"),
        ({"credit": "proportionate", "target_weight": 1e-3}, "the smallest that some step reaches is"),
        ({"num_inference_steps": 1001}, "num_inference_steps: 1001 must lie between 1 and"),
        ({"rewards": ("nothing",)}, "no reward is named 'nothing'"),
    ],
)
def test_a_run_that_cannot_work_does_not_begin(model, tmp_path, settings, message):
    with pytest.raises(SettingError, match=message):
        make_trainer(model, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def trained_steps(trainer, epochs):
    """Which steps draw noise, by epoch."""
    generator = torch.Generator().manual_seed(0)
    tables = [trainer.windows.table(epoch, generator) for epoch in range(1, epochs + 1)]
    return [table.trainable.nonzero().squeeze(1).tolist() for table in tables]


def test_windows(model, tmp_path):
    steps, folders = 5, itertools.count()

    def windows(epochs, **settings):
        trainer = make_trainer(model, tmp_path / str(next(folders)), num_inference_steps=steps, **settings)
        return trained_steps(trainer, epochs)

    assert windows(2) == [[0, 1, 2, 3, 4]] * 2
    assert windows(2, window_size=2) == [[0, 1]] * 2
    assert windows(2, window_size=2, window_range=(2, 5)) == [[2, 3]] * 2
    assert windows(5, window_size=3, window="sliding") == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 1, 2], [1, 2, 3]]
    assert windows(3, window_size=2, window="sliding", window_range=(1, 4)) == [[1, 2], [2, 3], [1, 2]]
    drawn = windows(60, window_size=2, window="random", window_range=(0, 4))
    assert {tuple(steps) for steps in drawn} == {(0, 1), (1, 2), (2, 3)}
    assert drawn[:3] != drawn[3:6]


def test_an_epoch_trains_its_window_alone(model, tmp_path):
    trainer = make_trainer(model, tmp_path, num_inference_steps=4, window_size=2, window="sliding")
    for expected in ([0, 1], [1, 2], [2, 3]):
        record = one_epoch(trainer)
        fractions = record["update/clip_fraction_per_step"]
        assert [step for step, fraction in enumerate(fractions) if fraction is not None] == expected
        assert record["update/first_abs_log_ratio"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_size": 4}, r"window_size: 4 is more than the 3 steps from 0 to 3 \(excluded\)"),
        ({"window_size": 2, "window_range": (2, 3)}, "window_size: 2 is more than the 1 steps from 2 to 3"),
        ({"window_size": 2, "window_range": (0, 9)}, "window_range: 0 9 was given; it must lie in 0 3, the steps that"),
        ({"window": "random"}, "window: places a window of steps, and window_size is not set; set it too"),
        ({"window_range": (0, 2)}, "window_range: places a window of steps, and window_size is not set; set it too"),
    ],
)
def test_windows_that_do_not_fit_are_refused(model, tmp_path, settings, message):
    with pytest.raises(SettingError, match=message):
        make_trainer(model, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_evaluations_use_the_moving_average(model, tmp_path, monkeypatch, tuning):
    """It follows the weights by (1 + n) / (10 + n) at most in its first steps, and leaves them as they are."""
    trainer = make_trainer(model, tmp_path, tuning=tuning, ema_decay=0.15, learning_rate=1e-3)
    parameters = trainer.policy.trainable_parameters()
    average = [parameter.detach().clone() for parameter in parameters]
    decays, step = itertools.chain([0.0, 2 / 11], itertools.repeat(0.15)), trainer.optimizer.adamw.step

    def follow(*arguments):
        result, decay = step(*arguments), next(decays)
        for mean, parameter in zip(average, parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - min(decay, 0.15))
        return result

    monkeypatch.setattr(trainer.optimizer.adamw, "step", follow)
    for _ in range(2):
        one_epoch(trainer)
    before = [parameter.detach().clone() for parameter in parameters]
    seen, predict = [], trainer.policy.predict

    def watch(*inputs):
        seen.append([parameter.detach().clone() for parameter in parameters])
        return predict(*inputs)

    monkeypatch.setattr(trainer.policy, "predict", watch)
    trainer.evaluate("after")
    for now, mean, weight, parameter in zip(seen[0], average, before, parameters, strict=True):
        torch.testing.assert_close(now, mean, rtol=1e-5, atol=1e-7)
        assert torch.equal(weight, parameter)
    assert any(not torch.equal(now, weight) for now, weight in zip(seen[0], before, strict=True))


def test_a_checkpoint_has_the_average_as_diffusers_reads_it(model, tmp_path):
    trainer = make_trainer(model, tmp_path, ema_decay=0.9, learning_rate=1e-3)
    trainer.train()
    (saved,) = tmp_path.glob("checkpoints/epoch-000002/ema")
    other = make_trainer(model, tmp_path / "other").policy
    other.load(saved)
    for parameter, shadow in zip(other.trainable_parameters(), trainer.optimizer.ema.shadow_params, strict=True):
        assert torch.equal(parameter, shadow)
    weights = trainer.policy.trainable_parameters()
    assert any((a != b).any() for a, b in zip(trainer.optimizer.ema.shadow_params, weights, strict=True))


@pytest.mark.parametrize("known", [True, False], ids=["none", "unknown"])
def test_an_average_may_begin_with_a_resumed_run(model, tmp_path, known):
    """Of a run without one, also by a release that knew of none."""
    make_trainer(model, tmp_path, epochs=1, learning_rate=1e-3).train()
    if not known:
        (path,) = tmp_path.glob("checkpoints/*/state.json")
        state = json.loads(path.read_text())
        del state["ema_steps"], state["manifest"]
        path.write_text(json.dumps(state))
        (path.parent / "manifest.json").unlink()
    resumed = make_trainer(model, tmp_path, learning_rate=1e-3, ema_decay=0.9, resume=True)
    for shadow, parameter in zip(
        resumed.optimizer.ema.shadow_params, resumed.policy.trainable_parameters(), strict=True
    ):
        assert torch.equal(shadow, parameter)
    assert any(shadow.any() for shadow in resumed.optimizer.ema.shadow_params[1::2])
    assert resumed.train() is None and resumed.epoch == 2


FLOW = {"resolution": 64, "num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["sdxl", "sd35", "flux"])
def test_every_family_trains(models, tmp_path, family, dtype):
    """Two epochs of LoRA from a saved folder, with guidance: on-policy at first, and the weights move."""
    trainer = make_trainer(models[family], tmp_path, dtype=dtype, release_text_encoders=True, **FLOW)
    parameters = trainer.policy.trainable_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    assert trainer.train() is None
    epochs = [record for record in trainer.metrics.records if "update/loss" in record]
    assert len(epochs) == 2
    for record in epochs:
        assert record["update/first_abs_log_ratio"] == 0
        assert record["update/grad_norm"] > 0 == record["update/skipped_steps"]
        trained = [fraction is not None for fraction in record["update/clip_fraction_per_step"]]
        assert trained == [True, True, family == "sdxl"]
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert trainer.policy.pipeline.text_encoder is None


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "dance", "objective": "ppo", "credit": "native"},
        {"sampler": "flow", "objective": "ppo", "credit": "native", "kl_weight": 0.04, "ema_decay": 0.9},
        {"sampler": "cps", "objective": "ppo", "normalized_log_prob": False, "window_size": 1, "window": "random"},
        {"sampler": "flow", "objective": "guard", "tuning": "full"},
    ],
    ids=["DanceGRPO", "Flow-GRPO", "FlowCPS", "GRPO-Guard"],
)
def test_published_algorithms_run_by_settings(models, tmp_path, settings):
    trainer = make_trainer(models["sd35"], tmp_path, **FLOW, **settings)
    assert trainer.train() is None
    epochs = [record for record in trainer.metrics.records if "update/loss" in record]
    assert all(record["update/first_abs_log_ratio"] == 0 < record["update/grad_norm"] for record in epochs)


def test_a_scheduler_that_is_not_affine_is_refused(tmp_path):
    folder = save_stable_diffusion(tmp_path / "model", thresholding=True)
    with pytest.raises(ValueError, match=r"DDIMScheduler has thresholding=True.* build it with .*thresholding=False"):
        make_trainer(folder, tmp_path / "run")


def rewards_of(trainer, monkeypatch, values):
    """Every call of the trainer's reward finds these values, in turn."""
    values = itertools.cycle(values)

    def reward(images, prompts):
        return torch.tensor([next(values) for _ in prompts])

    monkeypatch.setitem(trainer.rewards.rewards, "jpeg_compressibility", (reward, 1.0))


def test_rewards_that_are_not_finite_are_counted_and_left_out(model, tmp_path, monkeypatch):
    trainer = make_trainer(model, tmp_path)
    rewards_of(trainer, monkeypatch, [1.0, 2.0, math.nan, math.inf])
    batch = trainer.collect()
    record = trainer.update(batch)
    assert record["reward/not_finite"] == 2
    assert record["reward/mean"] == record["reward/jpeg_compressibility"] == 1.5
    assert record["reward/std"] == 0.5
    assert record["reward/quantiles"] == pytest.approx([1.1, 1.9])
    assert batch.advantages[2:].tolist() == [0, 0]
    assert batch.advantages[0] < 0 < batch.advantages[1]
    assert record["update/skipped_steps"] == 0


def test_an_epoch_without_a_finite_reward_is_an_error(model, tmp_path, monkeypatch):
    trainer = make_trainer(model, tmp_path)
    rewards_of(trainer, monkeypatch, [math.nan, math.inf])
    with pytest.raises(
        ValueError, match=r"every reward of epoch 1 is NaN or infinite \(jpeg_compressibility\).*diverged"
    ):
        trainer.collect()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_is_left_out(model, tmp_path, monkeypatch, bad):
    """Its rows are there for their shape alone; the other samples are trained on as ever."""
    trainer = make_trainer(model, tmp_path)
    predict, calls, shapes = trainer.policy.predict, itertools.count(), []

    def poisoned(sample, timestep, conditioning):
        output = predict(sample, timestep, conditioning)
        shapes.append(output.shape)
        # the rollout calls the denoiser once a step
        if next(calls) == 1:
            output[2, 0, 0, 0] = bad
        return output

    monkeypatch.setattr(trainer.policy, "predict", poisoned)
    parameters = trainer.policy.trainable_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    record = one_epoch(trainer)
    assert record["reward/not_finite"] == 1
    assert record["update/skipped_steps"] == record["update/first_abs_log_ratio"] == 0
    assert math.isfinite(record["update/loss"]) and record["update/grad_norm"] > 0
    assert not all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert all(parameter.isfinite().all() for parameter in parameters)
    assert len(set(shapes)) == 1


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(model, tmp_path, monkeypatch, dtype):
    """The first optimiser step of two meets a NaN: the weights and the optimiser are as if it had not been."""
    trainer = make_trainer(model, tmp_path, dtype=dtype, gradient_accumulation_steps=1, num_inference_steps=2)
    predict, calls = trainer.policy.predict, itertools.count(1)
    # the rollout calls the denoiser twice, once a step
    poisoned = 3
    monkeypatch.setattr(
        trainer.policy, "predict", lambda *inputs: predict(*inputs) * (math.nan if next(calls) == poisoned else 1)
    )
    parameters = trainer.policy.trainable_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    after = []

    def note(*_):
        moments = [tensor.clone() for state in trainer.optimizer.adamw.state.values() for tensor in state.values()]
        after.append(([parameter.detach().clone() for parameter in parameters], moments))

    trainer.optimizer.adamw.register_step_post_hook(note)
    trainer.metrics.write(one_epoch(trainer))
    (weights, moments), (final, _) = after
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    assert moments and not any(tensor.any() for tensor in moments)
    assert all(parameter.isfinite().all() for parameter in final)
    assert not all(torch.equal(a, b) for a, b in zip(before, final, strict=True))
    (record,) = records(tmp_path)
    assert record["update/skipped_steps"] == 1
    assert math.isfinite(record["update/grad_norm"])
    assert record["update/loss"] is None


def test_a_policy_that_differs_from_the_one_that_sampled_is_reported(model, tmp_path, capfd):
    trainer = make_trainer(model, tmp_path)
    batch = trainer.collect()
    batch.trajectory.model_outputs[:, 1] += 1e-3
    record = trainer.update(batch)
    first = record["update/first_abs_log_ratio_per_step"]
    assert first[0] in (0, None) and first[2] in (0, None) and first[1] > 0
    assert record["update/first_abs_log_ratio"] == first[1]
    timestep = batch.trajectory.table.timesteps[1].item()
    output = "".join(capfd.readouterr())
    assert "warning: before the first update the policy should equal the one that sampled" in output
    assert f"per timestep: {timestep}: {first[1]:.1e}" in output


def test_recomputed_outputs_are_those_of_training(model, tmp_path, monkeypatch, capfd):
    """A policy whose forward pass is another one where gradients are wanted: with them recomputed the ratio is 1."""
    records = {}
    for old_outputs in ("rollout", "recompute"):
        settings = {"timestep_fraction": 0.6, "inner_epochs": 2, "old_outputs": old_outputs}
        trainer = make_trainer(model, tmp_path / old_outputs, **settings)
        guided = trainer.policy._guided

        def shifted(*inputs, guided=guided):
            return guided(*inputs) + (1e-3 if torch.is_grad_enabled() else 0)

        monkeypatch.setattr(trainer.policy, "_guided", shifted)
        records[old_outputs] = one_epoch(trainer)
        assert ("warning: before the first update" in "".join(capfd.readouterr())) == (old_outputs == "rollout")
    assert records["rollout"]["update/first_abs_log_ratio"] > 0 == records["recompute"]["update/first_abs_log_ratio"]
    assert records["recompute"]["update/grad_norm"] > 0


@pytest.mark.parametrize("settings", [{}, {"timestep_fraction": 0.6, "inner_epochs": 2}], ids=str)
def test_recomputing_outputs_that_are_right_changes_nothing(model, tmp_path, settings):
    first, second = (
        one_epoch(make_trainer(model, tmp_path / old_outputs, old_outputs=old_outputs, **settings))
        for old_outputs in ("rollout", "recompute")
    )
    assert {key: value for key, value in first.items() if "time" not in key} == {
        key: value for key, value in second.items() if "time" not in key
    }


def test_compiled_blocks(models, tmp_path):
    """Their forward pass may round otherwise with a gradient than without; recomputed outputs are of the same one."""
    settings = {**FLOW, "num_inference_steps": 2, "guidance_scale": 1.0, "release_text_encoders": True}
    trainer = make_trainer(models["sd35"], tmp_path, compile=True, old_outputs="recompute", **settings)
    blocks = [m for m in trainer.policy.denoiser.modules() if type(m).__name__ == "JointTransformerBlock"]
    assert blocks and all(block._compiled_call_impl is not None for block in blocks)
    torch._dynamo.utils.counters.clear()
    record = one_epoch(trainer)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert record["update/first_abs_log_ratio"] == 0 < record["update/grad_norm"]


def test_prompts_are_distinct_while_there_are_enough(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("cat\n\n  dog \nhorse\n")
    prompts = draw_prompts(load_prompts(str(path)), 8, 2, torch.Generator().manual_seed(0))
    drawn = prompts[::2]
    assert prompts == [prompt for prompt in drawn for _ in range(2)]
    assert set(drawn[:3]) == set(drawn[3:6]) == {"cat", "dog", "horse"}
    assert len(set(drawn[6:])) == 2


def test_evaluation_repeats_itself_and_does_not_train_on_its_noise(model, tmp_path, monkeypatch):
    """The same images whenever it is called, with the sampler's native noise whatever the credit."""
    trainer = make_trainer(model, tmp_path, credit="proportionate")
    tables, indices, engine = [], [], trainer.engine

    def watched(table, *arguments, first_index, **settings):
        tables.append(table)
        indices.append(first_index)
        return engine(table, *arguments, first_index=first_index, **settings)

    monkeypatch.setattr(trainer, "engine", watched)
    first, second = trainer.evaluate("before"), trainer.evaluate("after")
    assert first.keys() == second.keys()
    assert all(first[key] == second[key] for key in first if not key.startswith("time/"))
    assert (tmp_path / "samples_before.png").read_bytes() == (tmp_path / "samples_after.png").read_bytes()
    one_epoch(trainer)
    # proportionate credit changes the variance of DDIM
    assert torch.equal(tables[0].std, tables[1].std) and not torch.equal(tables[1].std, tables[2].std)
    assert torch.equal(tables[0].weight, tables[0].native_weight)
    assert indices[0] == indices[1] != indices[2]
    assert first["eval/jpeg_incompressibility"] == -first["eval/reward"] > 0


def test_a_reward_may_be_a_python_function(model, tmp_path):
    def brightness(images, prompts):
        assert len(images) == len(prompts)
        return images.mean(dim=(1, 2, 3))

    trainer = make_trainer(model, tmp_path, functions={"bright": brightness})
    assert trainer.train() is None
    before, first, *_ = trainer.metrics.records
    assert 0 < first["reward/bright"] == first["reward/mean"] < 1
    assert before["eval/bright"] == before["eval/reward"]
    assert first["update/grad_norm"] > 0


def test_collecting_changes_nothing(model, tmp_path):
    """So that an error, or a request to stop, loses nothing: the same epoch can be collected again."""
    trainer = make_trainer(
        model, tmp_path, tuning="full", advantage="prompt", prompt_buffer_size=4, prompt_buffer_min=3
    )
    before = [parameter.detach().clone() for parameter in trainer.policy.trainable_parameters()]
    first, steps = trainer.collect(), itertools.count()
    with pytest.raises(Interrupted):
        trainer.collect(stop=lambda: next(steps) == 1)
    again = trainer.collect()
    assert torch.equal(first.trajectory.states, again.trajectory.states)
    assert torch.equal(first.advantages, again.advantages)
    assert (trainer.epoch, trainer.next_sample, trainer.advantages.state_dict()) == (0, 0, {})
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.trainable_parameters(), strict=True))
    trainer.update(again)
    assert (trainer.epoch, trainer.next_sample) == (1, 4)
    assert [len(rewards) for rewards in trainer.advantages.state_dict().values()] == [2, 2]
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.policy.trainable_parameters(), strict=True))


def test_a_trainer_resolves_and_checks_its_settings(model, tmp_path):
    trainer = make_trainer(model, tmp_path / "run")
    for tuning, learning_rate in (("lora", 3e-4), ("full", 1e-5)):
        assert Config().replace(tuning=tuning).resolved().optimizer.learning_rate == learning_rate
    with pytest.raises(SettingError, match="micro_batch_size: 3 does not divide the 4 images"):
        type(trainer)(trainer.config.replace(micro_batch_size=3), trainer.policy, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_profiles_show_the_parts_of_an_epoch(model, tmp_path):
    trainer = make_trainer(model, tmp_path)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one_epoch(trainer)
    calls = {event.key: event.count for event in profile.key_averages()}
    # 4 images over 3 steps are 3 micro-batches of 4 rows, in 2 optimizer steps
    assert [calls[name] for name in ("reward", "forward", "backward", "optimizer")] == [1, 3, 3, 2]
