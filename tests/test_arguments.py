"""Wrong arguments: the type of the error, the argument that it names, and what it says to change, in one line."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pcpo_fast import (
    Guidance,
    NoiseKey,
    Reference,
    StepTable,
    StoredStates,
    policy_loss,
    ratio_stats,
    sample_noise,
    sampler_step,
    shifted_sigmas,
    step_log_prob,
    step_log_ratio,
)

ROWS, SHAPE = 3, (3, 4)
NAN, INF = float("nan"), float("inf")


def tensor(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape or SHAPE, dtype=dtype, device=device)


INDEX = torch.arange(ROWS)
KEY = NoiseKey(0, INDEX)
TABLE = StepTable([3, 2, 1, 0], [0.9] * 4, [-0.3] * 4, [0.5, 0.4, 0.3, 0.0])
STATES = StoredStates(tensor(), tensor())

# everything right, by op
CALLS = {
    sampler_step: {
        "model_output": tensor(),
        "sample": tensor(),
        "table": TABLE,
        "step": 1,
        "noise": tensor(),
    },
    step_log_prob: {
        "model_output": tensor(),
        "sample": tensor(),
        "prev_sample": tensor(),
        "table": TABLE,
        "step": 1,
    },
    step_log_ratio: {
        "model_output": tensor(),
        "old_model_output": tensor(),
        "noise": tensor(),
        "table": TABLE,
        "step": 1,
    },
    policy_loss: {
        "model_output": tensor(),
        "old_model_output": tensor(),
        "noise": tensor(),
        "table": TABLE,
        "step": 1,
        "advantages": tensor(ROWS),
    },
    sample_noise: {"shape": SHAPE, "table": TABLE, "step": 1, "key": KEY},
}
STEPPED = tuple(CALLS)
WITH_OUTPUT = (sampler_step, step_log_prob, step_log_ratio, policy_loss)
WITH_NOISE = (sampler_step, step_log_ratio, policy_loss)
LOSSES = (step_log_ratio, policy_loss)


def key(seed=0, sample_index=INDEX):
    """A key, as the argument of the ops that take one."""
    return lambda op: {"key" if op is sample_noise else "noise": NoiseKey(seed, sample_index)}


KEYED = (*WITH_NOISE, sample_noise)

# ops, what is changed, the type of the error, and the pieces of its message in order
WRONG = [
    # step
    (STEPPED, {"step": 1.5}, TypeError, "step=1.5 is a float", "give an int or a tensor"),
    (STEPPED, {"step": True}, TypeError, "step=True is a bool", "give an int or a tensor"),
    (STEPPED, {"step": None}, TypeError, "step=None", "give an int or a tensor"),
    (STEPPED, {"step": "1"}, TypeError, "step='1' is a str", "give an int or a tensor"),
    (STEPPED, {"step": [0, 1, 2]}, TypeError, "step=[0, 1, 2] is a list", "give an int or a tensor"),
    (STEPPED, {"step": np.arange(3)}, TypeError, "step=", "is a ndarray", "give an int or a tensor"),
    (STEPPED, {"step": list(range(1000))}, TypeError, "step=[0, 1, 2, 3, 4, 5, ...] is a list", "give an int"),
    (STEPPED, {"step": np.arange(1000)}, TypeError, "step=array([", "is a ndarray", "give an int"),
    (STEPPED, {"step": Guidance(tensor(100, 4), 1.0)}, TypeError, "step=Guidance(", "is a Guidance", "give an int"),
    (STEPPED, {"step": 10**5000}, ValueError, "step=a number of thousands of digits is not in the table"),
    (STEPPED, {"step": 4}, ValueError, "step=4 is not in the table", "0, ..., 3"),
    (STEPPED, {"step": -1}, ValueError, "step=-1 is not in the table", "0, ..., 3"),
    (STEPPED, {"step": tensor(ROWS)}, ValueError, "step has dtype torch.float32", ".long()"),
    (STEPPED, {"step": tensor(ROWS, dtype=torch.bool)}, ValueError, "step has dtype torch.bool", ".long()"),
    (STEPPED, {"step": torch.arange(2)}, ValueError, "step has shape (2,)", "(3,)"),
    (STEPPED, {"step": torch.zeros((3, 1), dtype=torch.int64)}, ValueError, "step has shape (3, 1)", "(3,)"),
    (STEPPED, {"step": torch.full((ROWS,), 4)}, ValueError, "step holds 4 ... 4", "from 0 to 3"),
    (STEPPED, {"step": torch.tensor(-1)}, ValueError, "step holds -1 ... -1", "from 0 to 3"),
    (STEPPED, {"step": INDEX.to("meta")}, ValueError, "step is on meta", ".to()"),
    # table
    (STEPPED, {"table": TABLE.rows}, TypeError, "table is a Tensor", "StepTable.from_scheduler"),
    (STEPPED, {"table": SimpleNamespace(rows=TABLE.rows)}, TypeError, "table is a SimpleNamespace", "StepTable"),
    (STEPPED, {"table": None}, TypeError, "table is a NoneType", "StepTable"),
    (WITH_OUTPUT, {"table": TABLE.to("meta")}, ValueError, "table is on meta", "table = table.to('cpu')"),
    # the model's output, and what must be like it
    (WITH_OUTPUT, {"model_output": [1.0]}, TypeError, "model_output is a list", "torch.as_tensor"),
    (WITH_OUTPUT, {"model_output": np.ones(SHAPE)}, TypeError, "model_output is a ndarray", "torch.as_tensor"),
    (WITH_OUTPUT, {"model_output": tensor(0, 4)}, ValueError, "shape (0, 4) has no rows", "give (rows, ...)"),
    (WITH_OUTPUT, {"model_output": torch.tensor(1.0)}, ValueError, "shape () has no rows", "give (rows, ...)"),
    (WITH_OUTPUT, {"model_output": tensor(dtype=torch.int64)}, ValueError, "model_output has dtype torch.int64"),
    ((sampler_step, step_log_prob), {"sample": tensor(3, 5)}, ValueError, "sample has shape (3, 5)", "equal"),
    ((sampler_step, step_log_prob), {"sample": tensor(dtype=torch.int32)}, ValueError, "sample", "torch.int32"),
    ((sampler_step, step_log_prob), {"sample": tensor(device="meta")}, ValueError, "sample is on meta", ".to()"),
    ((sampler_step, step_log_prob), {"sample": None}, TypeError, "sample is a NoneType", "give a tensor"),
    ((step_log_prob,), {"prev_sample": None}, TypeError, "prev_sample is a NoneType", "give a tensor"),
    ((step_log_prob,), {"prev_sample": tensor(2, 4)}, ValueError, "prev_sample has shape (2, 4)", "equal"),
    ((step_log_prob,), {"prev_sample": [1.0]}, TypeError, "prev_sample is a list", "torch.as_tensor"),
    (LOSSES, {"old_model_output": tensor(3, 5)}, ValueError, "old_model_output has shape (3, 5)", "equal"),
    (LOSSES, {"old_model_output": [1.0]}, TypeError, "old_model_output is a list", "torch.as_tensor"),
    (WITH_OUTPUT, {"model_output": tensor().to_sparse()}, ValueError, "model_output has layout torch.sparse_coo"),
    ((sampler_step, step_log_prob), {"sample": tensor().to_sparse()}, ValueError, "sample has layout", ".to_dense()"),
    ((sampler_step,), {"return_noise": 1}, TypeError, "return_noise=1 is a int", "give True or False"),
    ((sampler_step,), {"return_mean": "no"}, TypeError, "return_mean='no' is a str", "give True or False"),
    # noise
    (WITH_NOISE, {"noise": None}, TypeError, "noise is a NoneType", "NoiseKey(seed, sample_index)"),
    (WITH_NOISE, {"noise": 3}, TypeError, "noise is a int", "NoiseKey(seed, sample_index)"),
    (WITH_NOISE, {"noise": (0, INDEX)}, TypeError, "noise is a tuple", "NoiseKey(seed, sample_index)"),
    (WITH_NOISE, {"noise": np.ones(SHAPE)}, TypeError, "noise is a ndarray", "give a tensor"),
    (WITH_NOISE, {"noise": tensor(3, 5)}, ValueError, "noise has shape (3, 5)", "equal"),
    (WITH_NOISE, {"noise": tensor(device="meta")}, ValueError, "noise is on meta", ".to()"),
    ((sampler_step,), {"noise": STATES}, TypeError, "noise is a StoredStates", "NoiseKey(seed, sample_index)"),
    ((sample_noise,), {"key": 3}, TypeError, "key is a int", "NoiseKey(seed, sample_index)"),
    ((sample_noise,), {"key": (0, INDEX)}, TypeError, "key is a tuple", "NoiseKey(seed, sample_index)"),
    # its key
    (KEYED, key(sample_index=None), TypeError, "NoiseKey.sample_index is a NoneType", "int64 (rows,)"),
    (KEYED, key(sample_index=[0, 1, 2]), TypeError, "NoiseKey.sample_index is a list", "int64 (rows,)"),
    (KEYED, key(sample_index=np.arange(3)), TypeError, "NoiseKey.sample_index is a ndarray", "int64 (rows,)"),
    (KEYED, key(sample_index=tensor(ROWS)), ValueError, "NoiseKey.sample_index has dtype torch.float32", ".long()"),
    (KEYED, key(sample_index=torch.arange(2)), ValueError, "NoiseKey.sample_index has shape (2,)", "(3,)"),
    (KEYED, key(sample_index=torch.tensor(0)), ValueError, "NoiseKey.sample_index has shape ()", "(3,)"),
    (KEYED, key(sample_index=INDEX.to("meta")), ValueError, "NoiseKey.sample_index is on meta", ".to()"),
    (KEYED, key(1.5), TypeError, "NoiseKey.seed=1.5 is a float", "give an int"),
    (KEYED, key(True), TypeError, "NoiseKey.seed=True is a bool", "give an int"),
    (KEYED, key(None), TypeError, "NoiseKey.seed=None", "give an int"),
    (KEYED, key(-1), ValueError, "NoiseKey.seed=-1", "0 <= seed < 2**63"),
    (KEYED, key(2**63), ValueError, "NoiseKey.seed=9223372036854775808", "0 <= seed < 2**63"),
    (KEYED, key(torch.tensor(1.0)), ValueError, "NoiseKey.seed is a torch.float32 tensor", "0-d int64"),
    (KEYED, key(torch.tensor([1])), ValueError, "NoiseKey.seed is a torch.int64 tensor of shape (1,)", "0-d int64"),
    # stored states
    (LOSSES, {"noise": STATES, "old_model_output": None}, ValueError, "neither of old_model_output", "exactly one"),
    (LOSSES, {"noise": STATES._replace(noise=tensor())}, ValueError, "both of old_model_output", "exactly one"),
    (LOSSES, {"noise": STATES._replace(noise=KEY)}, ValueError, "both of old_model_output", "exactly one"),
    (LOSSES, {"old_model_output": None}, ValueError, "old_model_output is None", "StoredStates(sample, prev_sample"),
    (LOSSES, {"old_model_output": None, "noise": KEY}, ValueError, "old_model_output is None", "StoredStates("),
    (LOSSES, {"noise": STATES._replace(sample=None)}, TypeError, "StoredStates.sample is a NoneType", "give"),
    (LOSSES, {"noise": STATES._replace(prev_sample=[1])}, TypeError, "StoredStates.prev_sample is a list", "give"),
    (LOSSES, {"noise": STATES._replace(sample=tensor(3, 5))}, ValueError, "sample has shape (3, 5)", "equal"),
    (LOSSES, {"noise": STATES._replace(noise=3), "old_model_output": None}, TypeError, "noise is a int", "NoiseKey"),
    # advantages and the rows' weights
    ((policy_loss,), {"advantages": [1.0, 2.0, 3.0]}, TypeError, "advantages is a list", "torch.as_tensor(advantages)"),
    ((policy_loss,), {"advantages": np.ones(3)}, TypeError, "advantages is a ndarray", "torch.as_tensor(advantages)"),
    ((policy_loss,), {"advantages": 1.0}, TypeError, "advantages is a float", "give a tensor"),
    ((policy_loss,), {"advantages": None}, TypeError, "advantages is a NoneType", "give a tensor"),
    ((policy_loss,), {"advantages": tensor(4)}, ValueError, "advantages has shape (4,)", "one per row, (3,)"),
    ((policy_loss,), {"advantages": tensor(3, 1)}, ValueError, "advantages has shape (3, 1)", "one per row, (3,)"),
    ((policy_loss,), {"advantages": INDEX}, ValueError, "advantages has dtype torch.int64", "floating"),
    ((policy_loss,), {"advantages": tensor(3, device="meta")}, ValueError, "advantages is on meta", ".to()"),
    ((policy_loss,), {"advantages": torch.tensor([1.0, NAN, 1.0])}, ValueError, "advantages holds nan in row 1"),
    ((policy_loss,), {"advantages": torch.tensor([1.0, 1.0, -INF])}, ValueError, "advantages holds -inf in row 2"),
    ((policy_loss,), {"advantages": tensor(3).to_sparse()}, ValueError, "advantages has layout", ".to_dense()"),
    ((policy_loss,), {"row_weights": [1.0, 1.0, 0.0]}, TypeError, "row_weights is a list", "torch.as_tensor"),
    ((policy_loss,), {"row_weights": 1.0}, TypeError, "row_weights is a float", "give a tensor"),
    ((policy_loss,), {"row_weights": tensor(2)}, ValueError, "row_weights has shape (2,)", "one per row, (3,)"),
    ((policy_loss,), {"row_weights": INDEX > 0}, ValueError, "row_weights has dtype torch.bool", "floating"),
    ((policy_loss,), {"row_weights": torch.tensor([NAN, 1.0, 1.0])}, ValueError, "row_weights holds nan in row 0"),
    # guidance
    ((sampler_step, policy_loss), {"guidance": (tensor(), 5.0)}, TypeError, "guidance is a tuple", "give Guidance("),
    ((sampler_step, policy_loss), {"guidance": 5.0}, TypeError, "guidance is a float", "give Guidance("),
    (
        (sampler_step, policy_loss),
        {"guidance": Guidance(None, 5.0)},
        TypeError,
        "Guidance.uncond_output is a NoneType",
        "unconditional output",
    ),
    ((sampler_step, policy_loss), {"guidance": Guidance(tensor(), NAN)}, ValueError, "Guidance.scale=nan", "finite"),
    ((sampler_step, policy_loss), {"guidance": Guidance(tensor(), INF)}, ValueError, "Guidance.scale=inf", "finite"),
    (
        (sampler_step, policy_loss),
        {"guidance": Guidance(tensor(), 1e300)},
        ValueError,
        "Guidance.scale=1e+300",
        "finite",
    ),
    ((sampler_step, policy_loss), {"guidance": Guidance(tensor(), "5")}, TypeError, "Guidance.scale='5'", "number"),
    ((sampler_step, policy_loss), {"guidance": Guidance(tensor(), True)}, TypeError, "Guidance.scale=True", "number"),
    ((sampler_step, policy_loss), {"guidance": Guidance(tensor(3, 5), 2.0)}, ValueError, "uncond_output has shape"),
    (
        (sampler_step, policy_loss),
        {"guidance": Guidance(tensor(dtype=torch.float16), 2.0)},
        ValueError,
        "uncond_output has dtype torch.float16",
        "equal",
    ),
    # the KL term
    ((policy_loss,), {"kl": (tensor(), 0.1)}, TypeError, "kl is a tuple", "give Reference(model_output, weight)"),
    ((policy_loss,), {"kl": 0.1}, TypeError, "kl is a float", "give Reference(model_output, weight)"),
    ((policy_loss,), {"kl": Reference(None, 0.1)}, TypeError, "Reference.model_output is a NoneType", "reference"),
    ((policy_loss,), {"kl": Reference(tensor(3, 5), 0.1)}, ValueError, "ref_model_output has shape (3, 5)", "equal"),
    ((policy_loss,), {"kl": Reference(tensor(), NAN)}, ValueError, "Reference.weight=nan", "finite"),
    ((policy_loss,), {"kl": Reference(tensor(), INF)}, ValueError, "Reference.weight=inf", "finite"),
    ((policy_loss,), {"kl": Reference(tensor(), -0.1)}, ValueError, "Reference.weight=-0.1", ">= 0"),
    ((policy_loss,), {"kl": Reference(tensor(), "0.1")}, TypeError, "Reference.weight='0.1' is a str", "number"),
    ((policy_loss,), {"kl": Reference(tensor(), None)}, TypeError, "Reference.weight=None", "number"),
    ((policy_loss,), {"kl": Reference(tensor(), True)}, TypeError, "Reference.weight=True is a bool", "number"),
    ((policy_loss,), {"kl": Reference(tensor(), tensor(2))}, ValueError, "Reference.weight has shape (2,)", "(3,)"),
    ((policy_loss,), {"kl": Reference(tensor(), INDEX)}, ValueError, "Reference.weight has dtype", "floating"),
    (
        (policy_loss,),
        {"kl": Reference(tensor(), torch.tensor([0.1, 0.1, NAN]))},
        ValueError,
        "Reference.weight holds nan in row 2",
    ),
    # settings
    ((policy_loss,), {"objective": "dpo"}, ValueError, "objective='dpo' is not known", "pcpo, ppo"),
    ((policy_loss,), {"objective": "guard"}, ValueError, "objective='guard' is not known", "pcpo, ppo"),
    ((policy_loss,), {"objective": None}, ValueError, "objective=None is not known", "pcpo, ppo"),
    ((step_log_prob, *LOSSES), {"reduction": "max"}, ValueError, "reduction='max' is not known", "mean, sum"),
    ((step_log_prob, *LOSSES), {"reduction": "none"}, ValueError, "reduction='none' is not known", "mean, sum"),
    ((policy_loss,), {"row_reduction": None}, ValueError, "row_reduction=None", "mean, sum, none"),
    ((policy_loss,), {"row_reduction": "max"}, ValueError, "row_reduction='max'", "mean, sum, none"),
    (STEPPED, {"impl": "cuda"}, ValueError, "impl='cuda' is not known", "auto, torch, triton"),
    ((policy_loss,), {"clip_range": 0.0}, ValueError, "clip_range=0.0", "positive"),
    ((policy_loss,), {"clip_range": -1e-4}, ValueError, "clip_range=-0.0001", "positive"),
    ((policy_loss,), {"clip_range": (1e-4, 0.0)}, ValueError, "clip_range=(0.0001, 0.0)", "positive"),
    ((policy_loss,), {"clip_range": NAN}, ValueError, "clip_range=nan", "finite"),
    ((policy_loss,), {"clip_range": (NAN, 0.1)}, ValueError, "clip_range=nan", "finite"),
    ((policy_loss,), {"clip_range": (0.1, 0.1, 0.1)}, ValueError, "clip_range=(0.1, 0.1, 0.1) has 3 numbers", "pair"),
    ((policy_loss,), {"clip_range": 10**400}, ValueError, "clip_range=1000000000", "finite"),
    ((policy_loss,), {"clip_range": tuple(range(1000))}, ValueError, "clip_range=(0, 1, 2, 3, 4, 5, ...) has 1000"),
    ((policy_loss,), {"objective": tensor(100, 4)}, ValueError, "objective=tensor([[", "is not known", "pcpo, ppo"),
    ((policy_loss,), {"clip_range": [0.1, 0.2]}, TypeError, "clip_range=[0.1, 0.2] is a list", "number"),
    ((policy_loss,), {"clip_range": "0.1"}, TypeError, "clip_range='0.1' is a str", "number"),
    ((policy_loss,), {"clip_range": None}, TypeError, "clip_range=None", "number"),
    # the shape of noise
    ((sample_noise,), {"shape": 3}, TypeError, "shape=3", "(rows, ...)"),
    ((sample_noise,), {"shape": (0, 4)}, ValueError, "shape (0, 4) has no rows", "(rows, ...)"),
    ((sample_noise,), {"shape": (3.0, 4)}, TypeError, "shape=(3.0, 4)", "(rows, ...)"),
    ((sample_noise,), {"shape": (3, -1)}, ValueError, "shape (3, -1) has no rows", "(rows, ...)"),
    ((sample_noise,), {"shape": ()}, ValueError, "shape () has no rows", "(rows, ...)"),
    ((sample_noise,), {"stream": 1.5}, TypeError, "stream=1.5 is a float", "give an int"),
    ((sample_noise,), {"stream": True}, TypeError, "stream=True is a bool", "give an int"),
]
ONE_BY_ONE = [(op, *case) for ops, *case in WRONG for op in ops]


def names(op, change, error, *pieces):
    return f"{op.__name__}: {pieces[0]}"


def refusal(op, change, error) -> str:
    arguments = CALLS[op] | (change(op) if callable(change) else change)
    with pytest.raises(error) as raised:
        op(**arguments)
    return str(raised.value)


@pytest.mark.parametrize("case", ONE_BY_ONE, ids=[names(*case) for case in ONE_BY_ONE])
def test_says_what_to_change(case):
    op, change, error, *pieces = case
    message = refusal(op, change, error)
    assert "\n" not in message and len(message) < 300
    assert re.search(".*".join(map(re.escape, pieces)), message), message


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_what_is_changed_is_right_otherwise(op):
    op(**CALLS[op])


def test_a_key_has_both_parts():
    with pytest.raises(TypeError, match="sample_index"):
        NoiseKey(0)


@pytest.mark.parametrize("op", (sampler_step, policy_loss), ids=lambda op: op.__name__)
def test_options_are_given_by_name(op):
    with pytest.raises(TypeError, match="positional"):
        op(*CALLS[op].values(), None)


def test_nothing_is_done_before_the_check():
    """An argument of the last group is refused before a tensor is touched."""
    arguments = CALLS[policy_loss] | {"model_output": tensor(device="meta"), "old_model_output": tensor(device="meta")}
    arguments |= {"noise": tensor(device="meta"), "advantages": tensor(ROWS, device="meta")}
    arguments |= {"table": TABLE.to("meta"), "step": INDEX.to("meta")}
    with pytest.raises(ValueError, match="clip_range"):
        policy_loss(**arguments, clip_range=0.0)


@pytest.mark.parametrize(
    ("log_ratio", "error", "message"),
    [
        ([0.1], TypeError, "log_ratio is a list; give a tensor"),
        (np.ones(3), TypeError, "log_ratio is a ndarray; give a tensor"),
        (0.1, TypeError, "log_ratio is a float; give a tensor"),
        (torch.arange(3), ValueError, "log_ratio has dtype torch.int64; convert it to a floating type"),
        (torch.ones(0), ValueError, "log_ratio has shape (0,) and no element"),
    ],
)
def test_ratio_stats(log_ratio, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ratio_stats(log_ratio, 0.1)
    with pytest.raises(ValueError, match=r"clip_range=0 .* positive"):
        ratio_stats(torch.ones(3), 0)


FLOW, COLUMN = [1.0, 0.6, 0.3, 0.0], [0.9, 0.9, 0.9]
ALPHAS = torch.linspace(0.99, 0.01, 100, dtype=torch.float64)


def columns(**changed):
    return StepTable(
        **{"timesteps": [3, 2, 1], **dict.fromkeys(("sample_coef", "output_coef", "std"), COLUMN)} | changed
    )


# a maker of tables, its argument, a wrong value, and the error
WRONG_TABLES = [
    (StepTable.ddim, "eta", True, ValueError, "eta=True is not a noise level; give a finite number"),
    (StepTable.ddim, "eta", "1", ValueError, "eta='1' is not a noise level"),
    (StepTable.ddim, "eta", 10**400, ValueError, "eta=1000000000.*is not a noise level"),
    (StepTable.ddim, "target_weight", [1.0], ValueError, "target_weight=.1.0. is not a credit; give a finite number"),
    (StepTable.ddim, "target_weight", True, ValueError, "target_weight=True is not a credit"),
    (StepTable.ddim, "normalized", 1, TypeError, "normalized=1 is a int; give True or False"),
    (StepTable.ddim, "final_alpha_cumprod", "1", ValueError, "final_alpha_cumprod is a str, not real numbers"),
    (StepTable.ddim, "final_alpha_cumprod", [1.0, 1.0], ValueError, r"final_alpha_cumprod has shape \(2,\); give one"),
    (StepTable.ddim, "timesteps", [True, False], ValueError, "timesteps is a list, not real numbers"),
    (StepTable.ddim, "steps", torch.tensor(1), ValueError, r"steps=tensor\(1\) is not a list of step indices"),
    (StepTable.ddim, "steps", [1000] * 1000, ValueError, "steps has 1000, which is no step"),
    (StepTable.ddim, "window", list(range(1000)), ValueError, r"window=\[0, 1, 2, 3, 4, 5, ...\] is not a pair"),
    (StepTable.ddim, "credit", ["x"] * 1000, ValueError, "credit=.*... is not known; choose one of native"),
    (StepTable.flow, "num_train_timesteps", True, ValueError, "num_train_timesteps=True must be positive"),
    (StepTable.flow, "num_train_timesteps", "1000", ValueError, "num_train_timesteps='1000' must be positive"),
    (StepTable.flow, "noise_level", True, ValueError, "noise_level is a bool, not real numbers"),
    (StepTable.flow, "noise_level", torch.ones(3) > 0, ValueError, "noise_level is a Tensor of torch.bool, not real"),
    (StepTable.flow, "noise_level", 1e300, ValueError, r"noise_level=1e\+300 is not a noise level"),
    (StepTable.flow, "sigmas", [1.0 + 0j, 0.5, 0.0], ValueError, "sigmas is a list, not real numbers"),
    (StepTable.flow, "sigmas", torch.ones(3).to_sparse(), ValueError, "sigmas is a Tensor of torch.float32, not real"),
    (shifted_sigmas, "shift", True, ValueError, "shift=True is not a shift; give a finite number"),
    (shifted_sigmas, "shift", None, ValueError, "shift=None is not a shift"),
    (shifted_sigmas, "num_inference_steps", True, ValueError, "num_inference_steps=True must be a whole number"),
    (shifted_sigmas, "num_inference_steps", 10**9, ValueError, "num_inference_steps=1000000000 must be .* at most"),
    (columns, "timesteps", [3, NAN, 1], ValueError, "timesteps has an entry that is not finite"),
    (
        columns,
        "timesteps",
        torch.ones(3, device="meta"),
        ValueError,
        "timesteps is a Tensor of torch.float32, not real",
    ),
    (columns, "std", [1.0, None, 1.0], ValueError, "std is a list, not real numbers; give one number per step"),
    (columns, "guard", "yes", TypeError, "guard='yes' is a str; give True or False"),
    (columns, "normalized", None, TypeError, "normalized=None is a NoneType; give True or False"),
    (StepTable.cat, "tables", None, TypeError, "tables is a NoneType; give a list of StepTable"),
    (StepTable.cat, "tables", [TABLE, TABLE.rows], TypeError, "tables is a Tensor; give a StepTable"),
    (TABLE.with_noise_only, "deterministic", TABLE.rows, TypeError, "deterministic is a Tensor; give a StepTable"),
    (TABLE.with_noise_only, "deterministic", TABLE[:2], ValueError, "deterministic has 2 steps and the table 4; make"),
    (TABLE.to, "device", tensor(), TypeError, "device=tensor.* is a Tensor; give one such as 'cuda'"),
    (TABLE.to, "device", "gpu", ValueError, "device='gpu' does not exist; give one such as 'cuda' or 'cpu'"),
    (TABLE.index, "timesteps", "3", ValueError, "timesteps is a str, not real numbers"),
    (TABLE.__getitem__, "steps", 4, IndexError, "step 4 is not in the table; it has 4 steps"),
    (TABLE.__getitem__, "steps", 1.0, TypeError, "1.0 is no step of a table; give a whole number, or a slice"),
    (TABLE.__getitem__, "steps", True, TypeError, "True is no step of a table"),
]
RIGHT_TABLES = {
    StepTable.ddim: {"alphas_cumprod": ALPHAS, "timesteps": [90, 50, 10]},
    StepTable.flow: {"sigmas": FLOW},
    shifted_sigmas: {"num_inference_steps": 3},
    TABLE.with_noise_only: {"steps": [0], "deterministic": TABLE},
}


@pytest.mark.parametrize(("make", "name", "given", "error", "message"), WRONG_TABLES)
def test_what_makes_no_table_says_what_to_change(make, name, given, error, message):
    with pytest.raises(error, match=f"^{message}") as raised:
        make(**RIGHT_TABLES.get(make, {}) | {name: given})
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_numbers_of_numpy_are_numbers():
    table = StepTable.ddim(ALPHAS, np.array([90, 50, 10]), eta=np.float32(0.5), target_weight=np.float64(0.1))
    assert torch.equal(table.rows, StepTable.ddim(ALPHAS, [90, 50, 10], eta=0.5, target_weight=0.1).rows)
    assert len(shifted_sigmas(np.int64(3), np.int32(2))) == 4 and str(table[np.int64(1)]) == str(table[torch.tensor(1)])


def test_a_scheduler_is_no_table():
    diffusers = pytest.importorskip("diffusers")
    for op in STEPPED:
        message = refusal(op, {"table": diffusers.DDIMScheduler()}, TypeError)
        assert message.startswith("table is a DDIMScheduler") and "StepTable.from_scheduler" in message
