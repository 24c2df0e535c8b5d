"""Policies of one's own: a class that is no diffusers pipeline, with embeddings and a mask and no pooled vector; and
the family of models that docs/policies.md adds."""

import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from pipelines import autoencoder, make_trainer, records, t5
from safetensors.torch import load_file, save_file

from pcpo_fast import samplers
from pcpo_fast.config import SamplerSettings
from pcpo_fast.policies import FAMILIES, Conditioning
from pcpo_fast.rollout import RolloutEngine

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, WIDTH, CHANNELS, SIDE = 12, 16, 4, 8


class Denoiser(torch.nn.Module):
    """A velocity for every cell of the latent, which attends to the prompt's tokens where the mask is True."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = torch.nn.Linear(CHANNELS + 2, WIDTH), torch.nn.Linear(WIDTH, CHANNELS)
        self.key_value = torch.nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, sample, timestep, embeddings, mask):
        angle = (timestep / 1000 * math.pi / 2).view(-1, 1, 1).expand(-1, SIDE**2, 1)
        query = self.query(torch.cat([sample.flatten(2).mT, angle.sin(), angle.cos()], dim=2))
        key, value = self.key_value(embeddings).chunk(2, dim=2)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None])
        return self.out(attended).mT.unflatten(2, (SIDE, SIDE))


class MaskedPolicy:
    """Written from the text of `pcpo_fast.policies.Policy` alone."""

    def __init__(self) -> None:
        self.latent_shape, self.dtype, self.device = (CHANNELS, SIDE, SIDE), torch.float32, torch.device("cpu")
        torch.manual_seed(0)
        self.denoiser, self.letters = Denoiser(), torch.randn(128, WIDTH)
        self.frozen = Denoiser().requires_grad_(False)
        self.frozen.load_state_dict(self.denoiser.state_dict())

    def encode(self, prompts):
        embeddings, mask = torch.zeros(len(prompts), TOKENS, WIDTH), torch.zeros(len(prompts), TOKENS, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            letters = [ord(letter) % 128 for letter in prompt[:TOKENS]]
            embeddings[row, : len(letters)], mask[row, : len(letters)] = self.letters[letters], True
        return Conditioning(embeddings=embeddings, mask=mask)

    def predict(self, sample, timestep, conditioning):
        return self.denoiser(sample, timestep, conditioning.embeddings, conditioning.mask)

    @torch.no_grad()
    def predict_reference(self, sample, timestep, conditioning):
        return self.frozen(sample, timestep, conditioning.embeddings, conditioning.mask)

    def decode(self, latents):
        return F.interpolate(latents[:, :3], scale_factor=4).sigmoid()

    def schedule(self):
        return samplers.Schedule(FlowMatchEulerDiscreteScheduler(shift=3.0))

    def capture_key(self):
        return None

    def trainable_parameters(self):
        return list(self.denoiser.parameters())

    def save(self, folder):
        folder.mkdir(parents=True)
        save_file(self.denoiser.state_dict(), folder / "denoiser.safetensors")

    def load(self, folder):
        self.denoiser.load_state_dict(load_file(folder / "denoiser.safetensors"))

    def release_text_encoders(self, prompts):
        self.encode(prompts)


def weights(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.trainable_parameters()])


def test_a_rollout_gives_every_row_its_own_tensors():
    """Where the mask is False, nothing that the embeddings hold matters, and what is True does."""
    policy = MaskedPolicy()
    table = samplers.build(SamplerSettings(num_inference_steps=3), policy.schedule())

    def latents(conditioning):
        engine = RolloutEngine(policy, 2)
        return engine(table, conditioning, torch.tensor([1, 0, 1]), seed=0, first_index=0).latents

    conditioning = policy.encode(["cat", "a horse"])
    whole, hidden, masked = latents(conditioning), policy.encode(["cat", "a horse"]), policy.encode(["cat", "a horse"])
    hidden.embeddings[0, 3:] = 100.0
    assert torch.equal(latents(hidden), whole)
    masked.mask[0, 2:] = False
    assert (latents(masked) - whole).abs().flatten(1).amax(dim=1).gt(0).tolist() == [False, True, False]


def test_it_trains(tmp_path):
    """Two epochs, with the KL term and a moving average; and goes on from its checkpoint bit for bit."""
    settings = {"kl_weight": 0.01, "ema_decay": 0.9, "release_text_encoders": True, "learning_rate": 1e-3}
    policy = MaskedPolicy()
    before = weights(policy)
    assert make_trainer("digits", tmp_path / "whole", policy, **settings).train() is None
    updates = [record for record in records(tmp_path / "whole") if "update/loss" in record]
    assert [record["update/first_abs_log_ratio"] for record in updates] == [0, 0]
    assert all(record["update/grad_norm"] > 0 for record in updates)
    assert not torch.equal(weights(policy), before)

    cut, resumed = MaskedPolicy(), MaskedPolicy()
    make_trainer("digits", tmp_path / "cut", cut, **settings | {"epochs": 1}).train()
    make_trainer("digits", tmp_path / "cut", resumed, **settings, resume=True).train()
    assert torch.equal(weights(resumed), weights(policy))


@pytest.fixture
def aura_flow(tmp_path, monkeypatch):
    """The folder of a small AuraFlow pipeline, whose policy is the code in docs/policies.md."""
    text = (Path(__file__).parent.parent / "docs" / "policies.md").read_text()
    code = next(block for block in text.split("```python\n")[1:] if "class AuraFlowPolicy" in block).split("```")[0]
    module = ModuleType("pcpo_fast.policies.aura_flow")
    exec(code, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(FAMILIES, "AuraFlowPipeline", f"{module.__name__}:AuraFlowPolicy")
    torch.manual_seed(0)
    text_encoder, tokenizer = t5()
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    AuraFlowPipeline(tokenizer, text_encoder, autoencoder(), transformer, scheduler).save_pretrained(tmp_path / "aura")
    return tmp_path / "aura"


def test_the_family_of_the_documentation_samples_as_its_pipeline_and_trains(aura_flow, tmp_path):
    settings = {"guidance_scale": 3.0, "max_sequence_length": 8, "credit": "native"}
    trainer = make_trainer(aura_flow, tmp_path / "run", **settings)
    policy, table = trainer.policy, trainer.eval_table
    prompts = ["cat", "dog", "horse"]
    ours = trainer.engine(table, policy.encode(prompts), torch.arange(3), seed=0, first_index=0)
    theirs = policy.pipeline(
        prompts,
        num_inference_steps=len(table),
        height=64,
        width=64,
        guidance_scale=3.0,
        latents=ours.states[:, 0].clone(),
        max_sequence_length=8,
        output_type="pt",
    ).images
    torch.testing.assert_close(policy.decode(ours.latents), theirs, rtol=0, atol=1e-4)
    assert trainer.train() is None
    updates = [record for record in records(tmp_path / "run") if "update/loss" in record]
    assert [record["update/first_abs_log_ratio"] for record in updates] == [0, 0]
