"""Rollouts as CUDA graphs, and updates that wait for nothing: what only a GPU can show of the trainer."""

import pytest
import torch

pytest.importorskip("diffusers")

from pipelines import FAMILIES, make_trainer, records

from pcpo_fast import samplers
from pcpo_fast import trainer as trainer_module
from pcpo_fast.config import SamplerSettings
from pcpo_fast.rollout import RolloutEngine

pytest_plugins = "pipelines"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")

SETTINGS = {"device": "cuda", "resolution": 64, "num_inference_steps": 4, "guidance_scale": 3.0}
DISTINCT = ["cat", "dog", "horse"]


@pytest.fixture(params=["fp32", "bf16"])
def dtype(request):
    return request.param


def run(engine, policy, table, prompt, **settings):
    settings = {"seed": 3, "first_index": 40} | settings
    return engine(table, policy.encode(DISTINCT), torch.tensor(prompt, device="cuda"), **settings)


def make_table(policy, **settings):
    """A sampler of four steps, all of them stochastic or those of a window."""
    return samplers.build(SamplerSettings(num_inference_steps=4), policy.schedule(), **settings).to("cuda")


def assert_same(a, b):
    assert torch.equal(a.states, b.states) and torch.equal(a.model_outputs, b.model_outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_replays_are_the_eager_steps(models, tmp_path, family, dtype):
    """Bit for bit, also after a LoRA weight, the prompts, the seed, the indices and the table have changed in place."""
    policy = make_trainer(models[family], tmp_path, dtype=dtype, **SETTINGS).policy
    graphs, eager = RolloutEngine(policy, 4), RolloutEngine(policy, 4, graphs=False)
    assert graphs.graphs
    table, window = make_table(policy), make_table(policy, window=(1, 2))
    first = run(graphs, policy, table, [0, 1, 2, 0, 1, 2])
    assert_same(first, run(eager, policy, table, [0, 1, 2, 0, 1, 2]))
    weights = dict(policy.denoiser.named_parameters())
    weight = next(weight for name, weight in weights.items() if "lora_B" in name)
    for change in range(1, 4):
        with torch.no_grad():
            weight.add_(0.1 * change)
        settings = {"seed": change, "first_index": 100 * change}
        used = window if change == 2 else table
        replayed, stepped = (run(engine, policy, used, [2, 1, 0, 0, 2], **settings) for engine in (graphs, eager))
        assert_same(replayed, stepped)
        assert not torch.equal(replayed.latents[:4], first.latents[:4])
    # without a record the same latents, from a graph of its own
    bare = run(graphs, policy, table, [0, 1, 2, 0, 1], record=False)
    assert torch.equal(bare.latents, run(eager, policy, table, [0, 1, 2, 0, 1]).latents)


def test_what_a_replay_would_not_see_is_captured_anew(models, tmp_path):
    policy = make_trainer(models["sd35"], tmp_path, **SETTINGS).policy
    table = make_table(policy)
    with torch.no_grad():
        for weight in policy.trainable_parameters():
            weight.normal_()
    graphs, eager = RolloutEngine(policy, 4), RolloutEngine(policy, 4, graphs=False)
    before = run(graphs, policy, table, [0, 1, 2, 0])
    policy.denoiser.disable_adapters()
    after = run(graphs, policy, table, [0, 1, 2, 0])
    assert_same(after, run(eager, policy, table, [0, 1, 2, 0]))
    policy.denoiser.enable_adapters()
    assert not torch.equal(after.latents, before.latents)
    assert_same(run(graphs, policy, table, [0, 1, 2, 0]), before)


def test_memory_is_flat_over_rollouts(models, tmp_path):
    policy = (trainer := make_trainer(models["sd15"], tmp_path, **SETTINGS)).policy
    table = make_table(policy)
    engine, held = RolloutEngine(policy, 4), []
    for seed in range(52):
        run(engine, policy, table, [0, 1, 2, 0, 1], seed=seed)
        run(engine, policy, trainer.eval_table, [0, 1, 2, 0, 1], seed=seed, record=False)
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(held[2:])) == 1


def test_an_update_waits_for_nothing(models, tmp_path, monkeypatch, dtype):
    """From its first micro-batch to where what was measured is read."""
    trainer = make_trainer(models["sd15"], tmp_path, dtype=dtype, ema_decay=0.9, **SETTINGS)
    trainer.update(trainer.collect())

    def in_mode(mode, call):
        def called(*inputs):
            torch.cuda.set_sync_debug_mode(mode)
            return call(*inputs)

        return called

    monkeypatch.setattr(trainer, "loss", in_mode("error", trainer.loss))
    monkeypatch.setattr(trainer_module, "update_summary", in_mode("default", trainer_module.update_summary))
    try:
        record = trainer.update(trainer.collect())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert record["update/grad_norm"] > 0 == record["update/skipped_steps"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extras", [{}, {"gradient_checkpointing": True}, {"tuning": "full"}], ids=str)
def test_every_family_trains_with_a_first_ratio_of_one(models, tmp_path, family, dtype, extras):
    trainer = make_trainer(models[family], tmp_path, dtype=dtype, **SETTINGS, **extras)
    assert trainer.engine.graphs and trainer.train() is None
    updates = [record for record in records(tmp_path) if "update/loss" in record]
    assert [record["update/first_abs_log_ratio"] for record in updates] == [0, 0]
    assert all(record["update/grad_norm"] > 0 for record in updates)


def test_a_gradient_that_is_not_finite_leaves_weights_and_moments(models, tmp_path):
    trainer = make_trainer(models["sd15"], tmp_path, **SETTINGS)
    trainer.update(trainer.collect())
    parameters = trainer.policy.trainable_parameters()
    state = [tensor.clone() for values in trainer.optimizer.adamw.state.values() for tensor in values.values()]
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    assert not trainer.optimizer.step().isfinite()
    after = [tensor for values in trainer.optimizer.adamw.state.values() for tensor in values.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
