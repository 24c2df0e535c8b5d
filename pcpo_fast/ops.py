"""The fused ops of policy-gradient alignment, for any sampler that is a table of steps x' = a x + b m + s z.

Each public function checks what it is given, chooses an implementation, and calls one registered operator
(`pcpo_fast._operators`). On a GPU that is one kernel launch where `step`, the seed and the sample indices are tensors:
making one of a number costs a small launch.

Conventions: rows are dim 0 and everything behind it is flattened as a row's elements. `step` is one index into the
table for all rows (an int or a 0-d tensor), or one per row, int64 or int32 (rows,). Its values are not checked before
the work begins, since that would wait for a GPU. A step outside the table raises ValueError on the CPU, makes its row
NaN in a Triton kernel, and is a device error of PyTorch's with impl="torch" on a GPU. An advantage or weight that is
not finite raises ValueError on the CPU and makes its row NaN elsewhere.

Arithmetic is float32 for bfloat16, float16 and float32 inputs, mixed or not, and float64 if an input is float64.
The same inputs give the same bits, and a row alone gives the same bits as in a batch. No op waits for the GPU.

Every function raises TypeError for an argument of a wrong type, ValueError for a value, shape, dtype or device that
does not fit, ImportError for impl="triton" without Triton, and RuntimeError for impl="triton" with CPU tensors outside
Triton's interpreter.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import reference  # pyright: ignore[reportAttributeAccessIssue]
from ._arguments import (
    REDUCTIONS,
    ROW_REDUCTIONS,
    Guidance,
    Impl,
    NoiseKey,
    Reduction,
    Reference,
    RowReduction,
    StoredStates,
    check_floating,
    check_int,
    check_like,
    check_per_row,
    check_shape,
    check_step,
    check_tensor,
    check_type,
    detach,
    drawn_arguments,
    guidance_arguments,
    key_arguments,
    kl_arguments,
    noise_arguments,
    resolve_clip_range,
    resolve_impl,
    wants_gradient,
)
from ._operators import call
from .samplers.checks import check_choice, check_flag
from .samplers.table import StepTable, check_table

Objective = Literal["pcpo", "ppo"]

# odd, so that distinct streams have distinct keys, and far from the small numbers that people choose as seeds
STREAM_KEY = 0x9E3779B97F4A7C15


class SamplerStep(NamedTuple):
    """What `sampler_step` returns."""

    prev_sample: Tensor
    model_output: Tensor
    noise: Tensor | None
    log_prob: Tensor
    mean: Tensor | None


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns."""

    loss: Tensor
    log_ratio: Tensor
    clipped: Tensor
    kl: Tensor | None
    old_kl: Tensor


class RatioStats(NamedTuple):
    """What `ratio_stats` returns: 0-d tensors on the device of the log-ratios."""

    approx_kl: Tensor
    clip_fraction_below: Tensor
    clip_fraction_above: Tensor
    ratio_mean: Tensor
    ratio_std: Tensor


def sampler_step(
    model_output: Tensor,
    sample: Tensor,
    table: StepTable,
    step: int | Tensor,
    noise: Tensor | NoiseKey,
    *,
    guidance: Guidance | None = None,
    return_noise: bool = True,
    return_mean: bool = False,
    impl: Impl = "auto",
) -> SamplerStep:
    """One sampler step x' = a x + b m + s z with the log-probability of what is stored. For rollouts: no gradient.

    Rows with s = 0 take the deterministic step and draw nothing; their noise and log-probability are 0.

    Args:
        model_output: (rows, ...) the model's output m; with guidance the conditional one.
        sample: (rows, ...) the current latent x, of the same shape.
        table: the sampler, on the same device.
        step: index into the table: an int, 0-d, or one per row, (rows,).
        noise: z ~ N(0, 1), (rows, ...), or the key that it is drawn from.
        guidance: the unconditional output and the scale.
        return_noise: False saves the noise's memory; a loss can draw it again from the key.
        return_mean: also return a x + b m.
        impl: "torch", "triton", or "auto": Triton for CUDA tensors, PyTorch otherwise. It never falls back silently.

    Returns:
        prev_sample: x' in the dtype of `sample`, rounded once.
        model_output: the m that was used, in the dtype of `model_output`: without guidance that tensor, not a copy.
        noise: float32 (rows, ...) z = (x' - a x - b m)/s of the x' that is stored, or None.
        log_prob: float32 (rows,) log N(x'; a x + b m, s^2), a mean over elements, of the x' that is stored (Black et
            al., arXiv 2305.13301, equation 4 for the policy); of a table that is not `normalized`, -(x' - a x - b m)^2.
        mean: float32 (rows, ...) a x + b m, or None.
    """
    step = check_step(step, table, model_output)
    check_tensor("sample", sample)
    source = drawn_arguments(noise, model_output)
    guided = guidance_arguments(guidance, model_output)
    check_like(model_output, sample=sample, noise=source["noise"], uncond_output=guided["uncond_output"])
    check_flag("return_noise", return_noise)
    check_flag("return_mean", return_mean)
    with torch.no_grad():
        prev_sample, combined, stored_noise, log_prob, mean = call(
            "sampler_step",
            model_output=model_output,
            sample=sample,
            table=table.rows,
            step=step,
            return_noise=return_noise,
            return_mean=return_mean,
            impl=resolve_impl(impl, model_output, sample, source["noise"], guided["uncond_output"]),
            **source,
            **guided,
        )
    return SamplerStep(
        prev_sample,
        model_output.detach() if guidance is None else combined,
        stored_noise if return_noise else None,
        log_prob,
        mean if return_mean else None,
    )


def step_log_prob(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: StepTable,
    step: int | Tensor,
    *,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """log N(x'; a x + b m, s^2) of each row, differentiable (once) in `model_output` and in nothing else.

    For a table that is not `normalized` it is -(x' - a x - b m)^2, without 1/(2 s^2) and constants.
    It serves trainers that keep states. Subtracting two of these loses almost all digits of a log-ratio; `policy_loss`
    and `step_log_ratio` lose none.

    Args:
        model_output: (rows, ...) m.
        sample, prev_sample: (rows, ...) the stored x and x'.
        table, step, impl: as in `sampler_step`.
        reduction: "mean" or "sum" over the row's elements.

    Returns:
        float32 (rows,); 0, with gradient 0, where s = 0.
    """
    step = check_step(step, table, model_output)
    check_tensor("sample", sample)
    check_tensor("prev_sample", prev_sample)
    check_like(model_output, sample=sample, prev_sample=prev_sample)
    check_choice("reduction", reduction, REDUCTIONS)
    log_prob, _, _ = call(
        "step_log_prob",
        model_output=model_output,
        sample=detach(sample),
        prev_sample=detach(prev_sample),
        table=table.rows,
        step=step,
        reduction=reduction,
        with_gradient=wants_gradient(model_output),
        impl=resolve_impl(impl, model_output, sample, prev_sample),
    )
    return log_prob


def step_log_ratio(
    model_output: Tensor,
    old_model_output: Tensor | None,
    noise: Tensor | NoiseKey | StoredStates,
    table: StepTable,
    step: int | Tensor,
    *,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """log rho of each row, the difference of two outputs' log-probabilities of one step, for objectives of your own.

    log rho = -(w <e, z> + w^2 <e, e>/2) with e = m_new - m_old: exactly 0 where they are equal, and right to float32
    where subtracting two log-probabilities loses all digits. Differentiable (once) in `model_output` alone.

    Args:
        model_output, old_model_output, noise, table, step, reduction, impl: as in `policy_loss`. The table's `weight`
            is used; with credit "native" that is the sampler's own.

    Returns:
        float32 (rows,); 0, with gradient 0, where w = 0.
    """
    step = check_step(step, table, model_output)
    source = noise_arguments(noise, old_model_output, model_output)
    tensors = {
        "old_model_output": old_model_output,
        "noise": source["noise"],
        "sample": source["sample"],
        "prev_sample": source["prev_sample"],
    }
    check_like(model_output, **tensors)
    check_choice("reduction", reduction, REDUCTIONS)
    log_ratio, _, _ = call(
        "step_log_ratio",
        model_output=model_output,
        old_model_output=detach(old_model_output),
        table=table.rows,
        step=step,
        reduction=reduction,
        with_gradient=wants_gradient(model_output),
        impl=resolve_impl(impl, model_output, *tensors.values()),
        **source,
    )
    return log_ratio


def policy_loss(
    model_output: Tensor,
    old_model_output: Tensor | None,
    noise: Tensor | NoiseKey | StoredStates,
    table: StepTable,
    step: int | Tensor,
    advantages: Tensor,
    *,
    objective: Objective = "pcpo",
    clip_range: float | tuple[float, float] = 1e-4,
    reduction: Reduction = "mean",
    row_reduction: RowReduction = "mean",
    row_weights: Tensor | None = None,
    guidance: Guidance | None = None,
    kl: Reference | None = None,
    impl: Impl = "auto",
) -> PolicyLoss:
    """Clipped policy-gradient loss of one sampler step per row, with its gradient made in the same pass.

    With e = m_new - m_old, the step's weight w and the log-ratio log rho = -(w <e, z> + w^2 <e, e>/2), which is exactly
    0 where m_new = m_old:

    - "pcpo": max(0, xi |A| - A log rho), the log-hinge of PCPO (Lee and Ye, arXiv 2509.25774).
    - "ppo": max(-A rho, -A clip(rho, 1 - xi, 1 + xi)) (Schulman et al., arXiv 1707.06347, equation 7), which is
      DDPO's (Black et al., arXiv 2305.13301) and GRPO's.

    A table that is not `normalized` has 2 s^2 times these log-ratios; one that is `guarded()` has those of GRPO-Guard.

    Args:
        model_output: (rows, ...) m_new; it and the unconditional output get a gradient (once: no double backward).
        old_model_output: (rows, ...) m_old, as the rollout stored it. None where `noise` is StoredStates with a noise:
            it is then made from them, and the log-ratio of an unchanged model is about 1e-7 instead of exactly 0. That
            is a mean over the row's elements; with reduction="sum" it is as many times larger.
        noise: z of the stored x': (rows, ...), as `sampler_step` returns it; or the key that it was drawn from, for
            latents stored in float32; or the states, from which z = (x' - a x - b m_old)/s is made.
        table, step, impl: as in `sampler_step`. Rows with weight 0 have log-ratio 0 and gradient 0.
        advantages: (rows,) A.
        objective: "pcpo" or "ppo".
        clip_range: xi, or a pair of distances from 1 (for "pcpo" from 0): below and above. "pcpo" uses the second for
            A > 0 and the first for A < 0.
        reduction: "mean" or "sum" of <., .> over the row's elements.
        row_reduction: "mean" (the sum divided by the number of rows, whatever their weights), "sum", or "none".
        row_weights: (rows,) factors of the rows' losses, KL term included; 0 masks a row, whose numbers must be finite.
        guidance: the unconditional output of the new policy and the scale.
        kl: adds weight times KL(new || ref) = w^2 <m_new - m_ref, m_new - m_ref>/2 to a row's loss, with the
            sampler's own w = -b/s, whatever the credit.

    Returns:
        loss: float32 scalar, or (rows,) with row_reduction="none". What follows is without gradient.
        log_ratio: float32 (rows,) log rho as the objective has it.
        clipped: bool (rows,): the rows whose objective is clipped and has no gradient.
        kl: float32 (rows,) KL(new || ref), not weighted; None without `kl`.
        old_kl: float32 (rows,) KL(new || old) = w^2 <e, e>/2, with the sampler's own w.
    """
    step = check_step(step, table, model_output)
    source = noise_arguments(noise, old_model_output, model_output)
    guided = guidance_arguments(guidance, model_output)
    divergence = kl_arguments(kl, model_output)
    tensors = {
        "old_model_output": old_model_output,
        "noise": source["noise"],
        "sample": source["sample"],
        "prev_sample": source["prev_sample"],
        "uncond_output": guided["uncond_output"],
        "ref_model_output": divergence["ref_model_output"],
    }
    check_like(model_output, **tensors)
    check_per_row("advantages", advantages, model_output)
    if row_weights is not None:
        check_per_row("row_weights", row_weights, model_output)
    check_choice("objective", objective, list(reference.OBJECTIVES), "; GRPO-Guard is table.guarded() with 'ppo'")
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("row_reduction", row_reduction, ROW_REDUCTIONS)
    below, above = resolve_clip_range(clip_range)
    loss, log_ratio, clipped, kl_per_row, old_kl, _, _ = call(
        "policy_loss",
        model_output=model_output,
        old_model_output=detach(old_model_output),
        table=table.rows,
        step=step,
        advantages=detach(advantages),
        row_weights=detach(row_weights),
        objective=objective,
        clip_below=below,
        clip_above=above,
        reduction=reduction,
        row_reduction=row_reduction,
        with_gradient=wants_gradient(model_output, guided["uncond_output"]),
        impl=resolve_impl(impl, model_output, *tensors.values()),
        **source,
        **guided,
        **divergence,
    )
    return PolicyLoss(loss, log_ratio, clipped, None if kl is None else kl_per_row, old_kl)


def sample_noise(
    shape: tuple[int, ...],
    table: StepTable,
    step: int | Tensor,
    key: NoiseKey,
    *,
    stream: int = 0,
    impl: Impl = "auto",
) -> Tensor:
    """The N(0, 1) noise that `sampler_step` draws from a key, so that it need not be stored.

    Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) with the seed as key and the
    counter (sample_index T + step) ceil(numel/4) + element // 4: the noise does not depend on the batch size, the rank
    or the chunking.

    Args:
        shape: (rows, ...).
        table: the sampler; the noise is made on its device.
        step, impl: as in `sampler_step`.
        key: the seed and the samples' indices.
        stream: 0 is the noise of the sampler steps. Another number gives independent noise, for initial latents say:
            the key is the seed XOR (stream * 0x9E3779B97F4A7C15 mod 2^64).

    Returns:
        float32 of the given shape.
    """
    check_table("table", table)
    check_shape(shape)
    check_int("stream", stream)
    like = table.rows.new_empty((1,)).expand(shape)
    step = check_step(step, table, like)
    # as a signed 64-bit number
    stream_key = (stream * STREAM_KEY + 2**63) % 2**64 - 2**63
    check_type("key", key, NoiseKey, "give NoiseKey(seed, sample_index)")
    source = key_arguments(key, like)
    noise = call(
        "sample_noise",
        seed=source["seed"] ^ stream_key,
        sample_index=source["sample_index"],
        step=step,
        num_steps=len(table.rows),
        numel=like[0].numel(),
        impl=resolve_impl(impl, like),
    )
    return noise.view(shape)


def ratio_stats(log_ratio: Tensor, clip_range: float | tuple[float, float]) -> RatioStats:
    """How far a policy has moved, from the log-ratios of some rows. Waits for no GPU.

    Args:
        log_ratio: (rows,) log rho.
        clip_range: xi, or a pair: below and above; of rho.

    Returns:
        approx_kl: mean of (rho - 1) - log rho, an estimate of KL(old || new) that is never negative.
        clip_fraction_below, clip_fraction_above: shares of rows with rho < 1 - below and rho > 1 + above.
        ratio_mean, ratio_std: of rho; the deviation is the biased one.
    """
    check_floating("log_ratio", log_ratio)
    below, above = resolve_clip_range(clip_range)
    log_ratio = log_ratio.detach().double()
    change = log_ratio.expm1()
    return RatioStats(
        approx_kl=(change - log_ratio).mean().float(),
        clip_fraction_below=(change < -below).float().mean(),
        clip_fraction_above=(change > above).float().mean(),
        ratio_mean=(change.mean() + 1).float(),
        ratio_std=change.std(correction=0).float(),
    )
