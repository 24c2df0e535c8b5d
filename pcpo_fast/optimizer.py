"""AdamW with what training a policy needs around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pcpo_fast.config import OptimizerSettings


class Optimizer:
    """AdamW with clipped gradients, loss scaling for fp16, and a moving average of the weights if one is wanted.

    A step whose gradients are not finite is skipped, without waiting for the GPU.

    Args:
        parameters: what is trained.
        settings: with a learning rate.
        dtype: the model's; with float16 the loss is scaled.

    Raises:
        ValueError: for settings without a learning rate.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], settings: OptimizerSettings, dtype: torch.dtype = torch.float32
    ) -> None:
        if settings.learning_rate is None:
            raise ValueError("the learning rate is not set; take the optimizer settings of config.resolved()")
        self.parameters, self.max_grad_norm = list(parameters), settings.max_grad_norm
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            # fused AdamW can skip a step on the device
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=dtype == torch.float16)
        self.ema = None
        if settings.ema_decay:
            from diffusers.training_utils import EMAModel

            self.ema = EMAModel(self.parameters, decay=settings.ema_decay, foreach=True)

    def backward(self, loss: Tensor) -> Tensor:
        """Adds the gradient of `loss` to those gathered since the last step.

        Returns:
            What the gradient was scaled by for fp16, 0-d; 1 in other precisions.
        """
        self.scaler.scale(loss).backward()
        return self.scaler.scale(torch.ones_like(loss))

    def step(self) -> Tensor:
        """One step along the gathered gradients. Returns their norm before clipping, 0-d."""
        self.scaler.unscale_(self.adamw)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        # fused AdamW leaves weights and moments unchanged where this is 1
        self.adamw.found_inf = (~norm.isfinite()).float()  # pyright: ignore[reportAttributeAccessIssue]
        self.adamw.step()
        self.scaler.update()
        self.adamw.zero_grad()
        if self.ema is not None:
            self.ema.step(self.parameters)
        return norm

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the moving average in the place of the weights, where there is one."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)
