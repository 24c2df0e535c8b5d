"""Rollouts: a policy run through a step table, step by step, keeping what the update needs.

One step (denoiser, sampler step, writing of the trajectory) reads and writes tensors that stay in place: the step's
number, the seed and the samples' indices are tensors on the device, too. The same step therefore serves every batch. On
a GPU it is captured once as a CUDA graph and replayed, with the weights and the noise of that moment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from pcpo_fast.ops import NoiseKey, sample_noise, sampler_step
from pcpo_fast.policies import Conditioning, Policy
from pcpo_fast.samplers import StepTable

# the stream of the latents that sampling starts from; stream 0 is the sampler steps' own
INITIAL_LATENTS = 1
# steps before a capture: libraries choose their algorithms and kernels are compiled
WARM_UP_STEPS = 2


@dataclasses.dataclass
class Trajectory:
    """N samples over T steps, exactly as the sampler left them.

    Nothing that the loss needs is computed again but the noise, z = (x' - a x - b m)/s, which the loss makes from the
    states.

    Attributes:
        states: float32 (N, T + 1, ...), the latents x before the first step and after every one.
        model_outputs: (N, T, ...) in the policy's dtype, the rounded, guided outputs m.
        prompt: int64 (N,), each sample's row of `conditioning`.
        conditioning: the rows of the distinct prompts.
        table: the sampler that took the steps.
    """

    states: Tensor
    model_outputs: Tensor
    prompt: Tensor
    conditioning: Conditioning
    table: StepTable

    @property
    def latents(self) -> Tensor:
        """float32 (N, ...), where sampling ended."""
        return self.states[:, -1]

    def replace_nonfinite(self) -> Tensor:
        """Overwrites the samples that are not finite with a finite one, if there is one.

        Nothing that is computed from the rows meets a NaN then. A sampler keeps a latent that is not finite to the end,
        so the last latents tell. Waits for the rollout.

        Returns:
            bool (N,) on the CPU: which samples were finite.
        """
        finite = self.latents.isfinite().flatten(1).all(dim=1).cpu()
        if finite.any() and not finite.all():
            good, bad = int(finite.nonzero()[0]), (~finite).nonzero().squeeze(1).to(self.prompt.device)
            for values in (self.states, self.model_outputs, self.prompt):
                values[bad] = values[good].clone()
        return finite


class Interrupted(Exception):
    """The run was asked to stop in the middle of a rollout."""


class RolloutEngine:
    """Samples with a policy, `batch_size` rows at a time, always with that one shape.

    The tensors of a batch in flight are made once per number of steps. On a GPU so is the CUDA graph of a step: a
    replay sees the weights, the table, the conditioning and the noise of its moment, since all of them are read in
    place. Other changes (`policy.capture_key()`: weights in another place, adapters, dtype, resolution, guidance) make
    the engine capture anew; all graphs share one memory pool. On a CPU the step runs as it is written.

    Args:
        policy: the denoiser, with guidance.
        batch_size: rows per call of the denoiser; the last batch of a rollout is filled up.
        graphs: whether to capture the step; None captures it if the policy is on a GPU.

    Raises:
        ValueError: for graphs without a GPU.
    """

    def __init__(self, policy: Policy, batch_size: int, *, graphs: bool | None = None) -> None:
        on_gpu = policy.device.type == "cuda"
        if graphs and not on_gpu:
            raise ValueError(f"graphs=True needs a CUDA device and the policy is on {policy.device}; leave it out")
        self.policy, self.batch_size = policy, batch_size
        self.graphs = on_gpu if graphs is None else graphs
        # all graphs are captured on one stream and share one memory pool
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._steps: dict[Hashable, StaticStep] = {}
        self._capture_key: Hashable = None

    @torch.no_grad()
    def __call__(
        self,
        table: StepTable,
        conditioning: Conditioning,
        prompt: Tensor,
        *,
        seed: int,
        first_index: int,
        record: bool = True,
        stop: Callable[[], bool] = lambda: False,
        after_step: Callable[[], object] = lambda: None,
    ) -> Trajectory:
        """Samples N latents, one per element of `prompt`.

        Noise depends on the seed, the sample's global index, the step and the element only: not on the batch size.

        Args:
            table: the sampler, on the policy's device.
            conditioning: of distinct prompts, from `policy.encode`.
            prompt: int64 (N,), each sample's row of `conditioning`, on the policy's device.
            seed: the run's seed.
            first_index: global index of the first sample; the others follow.
            record: whether to keep the steps; False keeps the last state only, with T = 0.
            stop: asked after every step of every batch; True ends the rollout.
            after_step: called after every step of every batch, for progress. On a GPU the step may still be running.

        Raises:
            Interrupted: if `stop` returned True.
        """
        policy, count, steps = self.policy, len(prompt), len(table) if record else 0
        trajectory = Trajectory(
            states=torch.empty((count, steps + 1, *policy.latent_shape), device=policy.device),
            model_outputs=torch.empty((count, steps, *policy.latent_shape), device=policy.device, dtype=policy.dtype),
            prompt=prompt,
            conditioning=conditioning,
            table=table,
        )
        with record_function("sample"):
            step = self._step(table, conditioning, record)
            for start in range(0, count, self.batch_size):
                # rows past the end only fill up the batch
                rows = torch.arange(start, start + self.batch_size, device=policy.device)
                step.begin(conditioning[prompt[rows.clamp(max=count - 1)]], rows + first_index, seed)
                for _ in range(len(table)):
                    step.run()
                    after_step()
                    if stop():
                        raise Interrupted
                filled = slice(start, min(start + self.batch_size, count))
                step.finish(trajectory.states[filled], trajectory.model_outputs[filled])
        return trajectory

    def _step(self, table: StepTable, conditioning: Conditioning, record: bool) -> StaticStep:
        """The tensors and the graph for this table and conditioning, made now or before, filled with the table."""
        capture_key = self.policy.capture_key()
        if capture_key != self._capture_key:
            self._steps.clear()
            self._capture_key = capture_key
            if self.graphs:
                self._stream = self._stream or torch.cuda.Stream(self.policy.device)
                # a pool ends with the last of its graphs
                self._pool = torch.cuda.graph_pool_handle()
        key = (
            len(table),
            record,
            tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in conditioning.tensors().items()),
        )
        if key not in self._steps:
            step = StaticStep(self.policy, table, conditioning, self.batch_size, record)
            if self._stream is not None:
                step.capture(self._stream, self._pool)
            self._steps[key] = step
        step = self._steps[key]
        step.set_table(table)
        return step


class StaticStep:
    """A sampler step of one batch, in tensors that stay in place, and its CUDA graph if it was captured."""

    def __init__(
        self, policy: Policy, table: StepTable, conditioning: Conditioning, batch_size: int, record: bool
    ) -> None:
        device, shape, steps = policy.device, (batch_size, *policy.latent_shape), len(table)
        self.policy = policy
        # only its rows and its timesteps are read; `set_table` writes those of another table over them
        self.table = dataclasses.replace(table, timesteps=table.timesteps.clone())
        self.conditioning = conditioning[torch.zeros(batch_size, dtype=torch.int64, device=device)]
        self.sample = torch.zeros(shape, device=device)
        self.seed = torch.zeros((), dtype=torch.int64, device=device)
        self.sample_index = torch.arange(batch_size, device=device)
        self.key = NoiseKey(self.seed, self.sample_index)
        # the step's number, one per row as the ops take it
        self.step = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.states = self.model_outputs = None
        if record:
            self.states = torch.empty((batch_size, steps, *shape[1:]), device=device)
            self.model_outputs = torch.empty((batch_size, steps, *shape[1:]), device=device, dtype=policy.dtype)
        self.graph: torch.cuda.CUDAGraph | None = None

    def set_table(self, table: StepTable) -> None:
        self.table.rows.copy_(table.rows)
        self.table.timesteps.copy_(table.timesteps)

    def begin(self, conditioning: Conditioning, sample_index: Tensor, seed: int) -> None:
        """Puts a batch at its first step, its latents drawn."""
        given = conditioning.tensors()
        for name, tensor in self.conditioning.tensors().items():
            tensor.copy_(given[name])
        self.sample_index.copy_(sample_index)
        self.seed.fill_(seed)
        self.step.zero_()
        self.sample.copy_(
            sample_noise(tuple(self.sample.shape), self.table, self.step, self.key, stream=INITIAL_LATENTS)
        )

    def run(self) -> None:
        if self.graph is None:
            self._advance()
        else:
            self.graph.replay()

    def finish(self, states: Tensor, model_outputs: Tensor) -> None:
        """Copies the first rows of the record to (rows, T + 1, ...) and (rows, T, ...), or the last latents to
        (rows, 1, ...)."""
        if self.states is not None and self.model_outputs is not None:
            states[:, :-1].copy_(self.states[: len(states)])
            model_outputs.copy_(self.model_outputs[: len(states)])
        states[:, -1].copy_(self.sample[: len(states)])

    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Records `_advance` as a CUDA graph, after some steps whose results are thrown away."""
        with torch.cuda.device(self.sample.device):
            current = torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_STEPS):
                    self.step.zero_()
                    self._advance()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self._advance()
        self.graph = graph

    def _advance(self) -> None:
        """Takes one step: x becomes x', and the step's number the next one."""
        output = self.policy.predict(self.sample, self.table.timesteps[self.step], self.conditioning)
        stepped = sampler_step(output, self.sample, self.table, self.step, self.key, return_noise=False)
        if self.states is not None and self.model_outputs is not None:
            self.states.index_copy_(1, self.step[:1], self.sample.unsqueeze(1))
            self.model_outputs.index_copy_(1, self.step[:1], stepped.model_output.unsqueeze(1))
        self.sample.copy_(stepped.prev_sample)
        self.step.add_(1)
