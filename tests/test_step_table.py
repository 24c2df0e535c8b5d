"""The step table itself: what the loss finds in its rows, its methods and its own checks."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from sampler_cases import FLOW_SDES, equal, flow_table, sd_table

from pcpo_fast.columns import COLUMNS
from pcpo_fast.samplers import StepTable

T = 5


def columns(seed=0, **kwargs):
    """a, b, s of five random steps, the last one without noise."""
    random = np.random.default_rng(seed)
    a, b, std = random.uniform(0.5, 1.5, T), -random.uniform(0.1, 0.9, T), random.uniform(0.1, 0.9, T)
    std[-1] = 0
    return {"timesteps": torch.arange(T, 0, -1) * 100, "sample_coef": a, "output_coef": b, "std": std, **kwargs}


def table_of(**kwargs) -> StepTable:
    return StepTable(**columns(**kwargs))


def column(table: StepTable, name: str) -> np.ndarray:
    return table.rows[:, COLUMNS.index(name)].double().numpy()


H = np.array([0.1, 0.15, 0.2, 0.25, 0.3])
# weights that differ from the sampler's own
CREDIT = np.array([0.3, 0.5, 0.7, 0.9, 1.1])


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("credit", ["native", "given"])
def test_the_eight_columns(credit, normalized, guard):
    given = columns()
    b, std = given["output_coef"], given["std"]
    table = table_of(credit="native" if credit == "native" else CREDIT, interval=H, normalized=normalized)
    table = table.guarded() if guard else table
    trained = std > 0
    safe = np.where(trained, std, 1)
    weight = np.where(trained, -b / safe if credit == "native" else CREDIT, 0)
    wanted = {
        "sample_coef": given["sample_coef"],
        "output_coef": b,
        "std": std,
        # log rho = -slope <e, z + curvature e / 2>
        "slope": weight * (1 if normalized else 2 * std**2) * (std if guard else 1),
        "curvature": 0 * weight if guard else weight,
        "loss_scale": 1 / H if guard else np.ones(T),
        # log p = log_prob_offset - log_prob_scale z^2 / 2
        "log_prob_scale": np.ones(T) if normalized else 2 * std**2,
        "log_prob_offset": np.where(trained & normalized, -np.log(safe) - math.log(2 * math.pi) / 2, 0),
    }
    assert tuple(wanted) == COLUMNS and table.rows.shape == (T, 8)
    assert table.rows.dtype == torch.float32 and table.rows.is_contiguous()
    for name, value in wanted.items():
        np.testing.assert_allclose(column(table, name), value, rtol=2e-7, err_msg=name)
    np.testing.assert_allclose(table.weight, weight, rtol=1e-15)
    np.testing.assert_allclose(table.native_weight, np.where(trained, -b / safe, 0), rtol=1e-15)


def test_the_log_ratio_of_the_columns_is_that_of_the_density():
    """With native credit the loss sees the logarithm of a ratio of Gaussians."""
    table = table_of()
    x, old, new, z = np.random.default_rng(1).standard_normal((4, 50))
    for step in range(T - 1):
        a, b, std = (float(getattr(table, name)[step]) for name in ("sample_coef", "output_coef", "std"))
        after = torch.tensor(a * x + b * old + std * z)
        density = [torch.distributions.Normal(torch.tensor(a * x + b * m), std).log_prob(after) for m in (new, old)]
        e, slope, curvature = new - old, column(table, "slope")[step], column(table, "curvature")[step]
        found = -slope * (e * (z + curvature * e / 2)).sum()
        assert found == pytest.approx(float((density[0] - density[1]).sum()), rel=1e-6)


def test_three_columns_are_enough():
    table = table_of()
    assert (table.credit, table.target_weight, table.normalized, table.guard) == ("native", None, True, False)
    assert bool((table.interval == 1 / T).all() and (table.epsilon_scale == 1).all())
    assert table.trainable.tolist() == [True] * 4 + [False] and len(table) == T
    for name in ("sample_coef", "output_coef", "std", "interval", "epsilon_scale", "weight", "log_prob_scale"):
        assert getattr(table, name).dtype == torch.float64 and getattr(table, name).shape == (T,)
    assert torch.equal(table.timesteps, torch.tensor([500, 400, 300, 200, 100]))
    # nothing is rounded to float32 on the way, whatever the numbers came in
    given = columns()
    for kind in (list, tuple, torch.from_numpy, np.asarray):
        same = StepTable(given["timesteps"], *(kind(given[name]) for name in ("sample_coef", "output_coef", "std")))
        assert equal(same, table)


@pytest.mark.parametrize("name", ["sample_coef", "output_coef", "std"])
def test_a_table_holds_no_graph(name):
    given = columns()
    given[name] = torch.tensor(given[name], requires_grad=True)
    assert not StepTable(**given).rows.requires_grad


SCALE = np.array([0.2, 0.5, 0.0, 0.9, 1.0])


def test_the_schemes():
    native = table_of().native_weight.numpy()
    trained = np.array([True] * 4 + [False])
    constant = table_of(credit="constant")
    np.testing.assert_allclose(constant.weight, np.where(trained, native[:4].mean(), 0), rtol=1e-14)
    proportionate = table_of(credit="proportionate", interval=H)
    zeta = native[:4].sum() / H[:4].sum()
    np.testing.assert_allclose(proportionate.weight, np.where(trained, zeta * H, 0), rtol=1e-14)
    assert proportionate.target_weight == pytest.approx(zeta, rel=1e-14)
    np.testing.assert_allclose(table_of(credit=CREDIT).weight, np.where(trained, CREDIT, 0))
    for scheme in ("constant", "proportionate"):
        table = table_of(credit=scheme, target_weight=2.0, interval=H)
        wanted = 2 * (np.ones(T) if scheme == "constant" else H)
        np.testing.assert_allclose(table.weight, np.where(trained, wanted, 0), rtol=1e-14)


def test_constant_credit_is_compared_on_the_epsilon_equivalent_output():
    native = table_of().native_weight.numpy()
    table = table_of(credit="constant", epsilon_scale=SCALE)
    level = (native / np.where(SCALE, SCALE, 1))[[0, 1, 3]].mean()
    # where there is none, a step counts in no mean and keeps its weight
    np.testing.assert_allclose(table.weight, [level * 0.2, level * 0.5, native[2], level * 0.9, 0], rtol=1e-13)
    np.testing.assert_allclose(table.epsilon_weight, [level, level, math.nan, level, 0], rtol=1e-13)
    assert table.target_weight == pytest.approx(level, rel=1e-13)


def test_a_table_without_noise_has_no_credit():
    for credit in ("native", "constant", "proportionate"):
        table = table_of(credit=credit, std=np.zeros(T))
        assert table.target_weight is None and not bool(table.weight.any() or table.trainable.any())
        assert bool(table.rows.isfinite().all())


# methods


def test_length_and_immutability():
    table = sd_table(20)
    assert len(table) == 20
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.std = table.std * 2  # pyright: ignore[reportAttributeAccessIssue]


def test_a_table_does_not_follow_what_it_was_made_of():
    """Else a, b, s and the timesteps would change, and the rows that the ops read would not."""
    given = columns(credit=CREDIT.copy(), interval=H.copy())
    want, table = table_of(credit=CREDIT, interval=H), StepTable(**given)
    for values in given.values():
        values[:] = 7
    assert equal(table, want)
    tensors = {name: torch.as_tensor(values) for name, values in columns().items()}
    table = StepTable(**tensors)
    for values in tensors.values():
        values.fill_(7)
    assert equal(table, table_of())


def test_the_default_device_moves_no_table():
    """As it is with `torch.set_default_device("cuda")`: a table is made on the CPU, and stays where it is."""
    sigmas, alphas = torch.linspace(1, 0, 6), torch.linspace(0.99, 0.01, 1000)
    table = table_of(credit=CREDIT)

    def make():
        yield from (table.guarded(), table.for_means(), table[1:3], StepTable.cat([table, table]))
        for given, settings in ((sigmas, {}), (sigmas.tolist(), {"noise_level": [0.1] * 5, "window": (1, 3)})):
            yield StepTable.flow(given, **settings)
        for given in (alphas, alphas.tolist()):
            yield StepTable.ddim(given, [900, 500, 100], credit="proportionate")

    want = list(make())
    with torch.device("meta"):
        got = list(make())
    assert all(equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize(
    "credit",
    [
        {"credit": "constant", "target_weight": 0.3},
        {"credit": [0.3] * T},
        {"credit": "proportionate", "target_weight": 1.0},
    ],
)
def test_a_weight_that_turns_the_gradient_around_is_refused(credit):
    """A model that puts out x0 - epsilon, say, has b > 0 and negative weights."""
    b = -columns()["output_coef"]
    with pytest.raises(ValueError, match=r"step 0 the weight 0\.\d+ and the sampler -\d.*the sign of -b / s"):
        table_of(output_coef=b, **credit)
    for scheme in ("native", "constant", "proportionate"):
        table = table_of(output_coef=b, credit=scheme)
        assert (table.weight[:-1] < 0).all()
        # the negative level stands in every table made of this one
        assert torch.equal(table.guarded().weight, table.weight)
    table = table_of(output_coef=b, credit="constant", target_weight=0.3, epsilon_scale=[-1.0] * T)
    assert table.weight.tolist() == [-0.3] * (T - 1) + [0.0]


def test_a_table_keeps_its_dtypes():
    """`.to(unet.dtype)` would round a, b and s to half precision in silence."""
    with pytest.raises(TypeError, match=r"keeps its own dtypes and was given torch\.bfloat16; give a device"):
        table_of().to(torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "value"), [("timesteps", "abc"), ("sample_coef", None), ("std", ["a"] * T), ("credit", None)]
)
def test_columns_that_are_no_numbers_are_refused(name, value):
    with pytest.raises(
        ValueError, match=f"{name} is a {type(value).__name__}, not real numbers; give one number per step"
    ):
        table_of(**{name: value})


def test_to_moves_every_tensor():
    for table in (sd_table(20, credit="proportionate"), table_of(credit=CREDIT).guarded()):
        moved = table.to("meta")
        tensors = [f.name for f in dataclasses.fields(table) if isinstance(getattr(table, f.name), torch.Tensor)]
        assert {"rows", "timesteps", "sample_coef", "output_coef", "std", "interval", "epsilon_scale"} <= {*tensors}
        for name in tensors:
            value = getattr(moved, name)
            assert value.device.type == "meta" and value.dtype == getattr(table, name).dtype
        for name in ("target_weight", "normalized", "guard"):
            assert getattr(moved, name) == getattr(table, name)
        assert len(moved) == len(table) and equal(table.to("cpu"), table)


def test_a_changed_table_is_derived_anew():
    table = table_of()
    assert equal(dataclasses.replace(table, credit="constant"), table_of(credit="constant"))
    louder = dataclasses.replace(table, std=2 * table.std)
    np.testing.assert_allclose(louder.native_weight, table.native_weight / 2, rtol=1e-15)
    assert torch.equal(louder.rows[:, COLUMNS.index("std")], louder.std.float())


@pytest.mark.parametrize("credit", ["native", "constant", "proportionate", "given"])
def test_a_part_of_a_table_keeps_its_weights(credit):
    given = {"interval": H, "epsilon_scale": SCALE, "normalized": False}
    table = table_of(credit=CREDIT if credit == "given" else credit, **given).guarded()
    for part, rows in (
        (table[0], slice(0, 1)),
        (table[-1], slice(4, 5)),
        (table[np.int64(2)], slice(2, 3)),
        (table[1:4], slice(1, 4)),
        (table[::2], slice(None, None, 2)),
        (table[:], slice(None)),
    ):
        assert torch.equal(part.rows, table.rows[rows]) and torch.equal(part.weight, table.weight[rows])
        assert torch.equal(part.timesteps, table.timesteps[rows]) and torch.equal(part.interval, table.interval[rows])
        assert part.guard and not part.normalized
        assert part.target_weight == table.target_weight and (credit == "given" or part.credit == credit)
    with pytest.raises(IndexError):
        table[5]
    assert len(list(table)) == 5


def test_tables_one_after_another():
    tables = [flow_table("flow", 4, credit="constant"), flow_table("dance", 3, shift=1.0, credit="proportionate")]
    joined = StepTable.cat(tables)
    assert len(joined) == 7 and torch.equal(joined.rows, torch.cat([table.rows for table in tables]))
    for name in ("timesteps", "weight", "native_weight", "interval"):
        assert torch.equal(getattr(joined, name), torch.cat([getattr(table, name) for table in tables]))
    guarded = StepTable.cat(table.guarded() for table in tables)
    assert guarded.guard and torch.equal(guarded.rows, torch.cat([table.guarded().rows for table in tables]))
    with pytest.raises(ValueError, match="the tables differ in guard"):
        StepTable.cat([tables[0], tables[1].guarded()])
    with pytest.raises(ValueError, match="the tables differ in normalized"):
        StepTable.cat([tables[0], flow_table("flow", 4, normalized=False)])
    with pytest.raises(ValueError, match="no table to concatenate; give at least one"):
        StepTable.cat([])


@pytest.mark.parametrize("credit", ["native", "constant", "given"])
def test_trainers_that_carry_means(credit):
    """On mu = a x + b m the step is mu + s z, and the log-ratio of two means is that of their outputs."""
    table = table_of(credit=CREDIT if credit == "given" else credit, epsilon_scale=[0.5] * T, interval=H)
    means = table.for_means()
    assert bool((means.sample_coef == 0).all() and (means.output_coef == 1).all())
    assert torch.equal(means.std, table.std) and torch.equal(means.interval, table.interval)
    torch.testing.assert_close(means.weight, table.weight / table.output_coef, rtol=1e-15, atol=0)
    np.testing.assert_allclose(means.native_weight[:4], -1 / table.std[:4], rtol=1e-15)
    if credit == "native":
        torch.testing.assert_close(means.weight, means.native_weight, rtol=1e-15, atol=0)
    # a credit of epsilon does not depend on what is carried
    torch.testing.assert_close(means.epsilon_weight[:4], table.epsilon_weight[:4], rtol=1e-14, atol=0)
    e, z = np.random.default_rng(2).standard_normal((2, 30))
    for step in range(T):
        b = float(table.output_coef[step])
        ratio, carried = (
            column(given, "slope")[step] * (change * (z + column(given, "curvature")[step] * change / 2)).sum()
            for given, change in ((table, e), (means, b * e))
        )
        assert carried == pytest.approx(ratio, rel=1e-5)


def test_means_that_do_not_depend_on_the_model_are_refused():
    given = columns()["output_coef"].copy()
    given[1] = 0
    with pytest.raises(ValueError, match="output_coef is 0 at a step with noise"):
        table_of(output_coef=given).for_means()
    given = columns()["output_coef"].copy()
    given[-1] = 0
    assert bool(table_of(output_coef=given).for_means().rows.isfinite().all())


@pytest.mark.parametrize("make", [lambda: sd_table(20), lambda: flow_table("flow", 20)])
def test_timesteps_lead_to_their_steps(make):
    table = make()
    steps = torch.tensor([[3, 0], [19, 7]])
    for given in (table.timesteps[steps], table.timesteps[steps].double()):
        found = table.index(given)
        assert torch.equal(found, steps) and found.dtype == torch.int64
    assert int(table.index(float(table.timesteps[4]))) == 4 and table.index(float(table.timesteps[4])).shape == ()
    assert table.index(table.timesteps[[2, 5]].tolist()).tolist() == [2, 5]
    near = float(table.timesteps[6]) + 0.25
    with pytest.raises(ValueError, match=f"timestep {near:.8g} is not in the table, whose nearest one is"):
        table.index([float(table.timesteps[0]), near])


def test_a_timestep_that_occurs_twice_leads_nowhere():
    table = StepTable.cat([sd_table(20), sd_table(20)])
    with pytest.raises(ValueError, match=r"timestep 951 occurs more than once .*give step indices"):
        table.index([951])


def test_a_printed_table_shows_a_line_per_step():
    table = table_of(credit=CREDIT)
    header, *lines = str(table).splitlines()
    assert header.split() == ["step", "timestep", "std", "native", "weight", "weight"] and len(lines) == T
    for step, line in enumerate(lines):
        index, timestep, std, native, weight = (float(word) for word in line.split())
        assert (index, timestep) == (step, float(table.timesteps[step]))
        assert std == pytest.approx(float(table.std[step]), abs=1e-5)
        assert native == pytest.approx(float(table.native_weight[step]), abs=1e-5)
        assert weight == pytest.approx(float(table.weight[step]), abs=1e-5)
    assert repr(table) == "<StepTable of 5 steps, 4 with noise, credit given>"
    assert repr(sd_table(20, credit="constant")) == "<StepTable of 20 steps, 20 with noise, credit constant>"


def test_guard_is_undone_by_nothing_else():
    table = table_of(interval=H, normalized=False).guarded()
    assert equal(table.guarded(), table) and table.guard
    assert dataclasses.replace(table, credit="constant").guard


@pytest.mark.parametrize("sde", FLOW_SDES)
def test_the_columns_of_the_log_probability(sde):
    """k and the offset of an element's log-probability, offset - k z^2 / 2, against both densities at z = 0.7."""
    z = 0.7
    for normalized in (True, False):
        for table in (flow_table(sde, normalized=normalized), sd_table(20, normalized=normalized)):
            std = table.std[:-1]
            density = torch.distributions.Normal(0.0, std).log_prob(std * z) if normalized else -((std * z) ** 2)
            found = table.log_prob_offset - table.log_prob_scale * z**2 / 2
            torch.testing.assert_close(found[:-1], density, rtol=1e-13, atol=1e-13)
            assert table.to("cpu").normalized == normalized
        last = flow_table(sde, normalized=normalized)[-1]
        assert float(last.log_prob_offset) == 0 and float(last.log_prob_scale) == (1 if normalized else 0)
    full = flow_table(sde)
    assert equal(full, flow_table(sde, normalized=False), leave_out=("log_prob_scale", "log_prob_offset", "slope"))


# its own checks


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"timesteps": []}, r"timesteps has shape \(0,\); give one number per step, \(T,\) with T >= 1"),
        ({"timesteps": 3}, r"timesteps has shape \(\)"),
        ({"std": [0.1] * 4}, r"std has shape \(4,\) and timesteps \(5,\); give one number per step"),
        ({"sample_coef": 1.0}, r"sample_coef has shape \(\) and timesteps \(5,\)"),
        ({"interval": [[0.2] * 5]}, r"interval has shape \(1, 5\)"),
        ({"credit": [0.1]}, r"credit has shape \(1,\)"),
        ({"std": [0.1, 0.2, -0.3, 0.1, 0]}, "std has the negative entry -0.3; give s >= 0, 0 for no noise"),
        ({"interval": [0.2, 0.2, 0, 0.2, 0.4]}, "interval has the entry 0; give h > 0 for every step"),
        ({"output_coef": [0.1, math.nan, 0, 0, 0]}, "output_coef has an entry that is not finite; give finite"),
        ({"epsilon_scale": [math.inf] * 5}, "epsilon_scale has an entry that is not finite"),
        ({"credit": [math.nan] * 5}, "credit has an entry that is not finite"),
        (
            {"credit": "published"},
            "credit=.published. is not known; choose one of native, .*, or a tensor",
        ),
        ({"credit": "native", "target_weight": 1.0}, "target_weight=1.0 has no meaning with credit='native'"),
        ({"credit": "constant", "target_weight": 0.0}, "target_weight=0.0 is not a credit; give a finite number > 0"),
        ({"credit": "proportionate", "target_weight": math.nan}, "target_weight=nan is not a credit"),
        ({"credit": [1.0] * 5, "target_weight": 1.0}, "target_weight=1.0 has no meaning beside a tensor of weights"),
        ({"std": [1e-40, 0.1, 0.1, 0.1, 0]}, r"does not fit into float32 at step 0 \(std 1e-40, weight"),
        ({"output_coef": [-1e-9] * 5, "std": [0.1, 1e-47, 0.1, 0.1, 0]}, "does not fit into float32 at step 1"),
        ({"credit": "constant", "target_weight": 1e300}, "target_weight=1e.300 is not a credit; give a finite"),
    ],
    ids=str,
)
def test_what_is_no_table_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        table_of(**kwargs)


@pytest.mark.parametrize(
    "settings",
    [
        {"noise_level": 1e-40},
        {"noise_level": 1e25},
    ],
    ids=str,
)
def test_samplers_beyond_float32_are_refused(settings):
    with pytest.raises(ValueError, match=r"does not fit into float32 at step \d+"):
        flow_table("flow", 10, **settings)
