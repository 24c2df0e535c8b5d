"""An epoch from end to end: this package's loop and the baseline's, on the same model.

On a CPU with the embedded models, on a GPU with the structure of Stable Diffusion 1.5, XL and 3.5 medium and random
weights. The loops take turns, and a speed-up is the median over rounds of the ratio within one. See
docs/performance.md for what came out. `pytest bench/test_training.py --save-results` writes the numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.profiler import record_function

from bench import report
from bench.baseline import BaselineLoop
from bench.cases import default_device
from bench.measure import PeakMemory

ROUNDS = {"cpu": 3, "cuda": 2}
# images per call in sampling and in training, as published: DDPO's settings for a large machine, and DanceGRPO's
DDPO, DANCE = "baseline, 8 and 4 images a call", "baseline, an image a call"
BASELINES = {DDPO: (8, 4), DANCE: (1, 1)}
SAME_BATCH = "baseline, our batches"
OURS = "ours"
# the parts of an epoch, as both loops name them for profilers
SPANS = ("sample", "decode", "reward", "forward", "backward", "optimizer")
# over the baseline with DDPO's batches, in images per second
LEAST_SPEEDUP = {"digits": 1.5, "digits-flow": 1.5, "sd15": 1.5}
LEAST_AT_THE_SAME_BATCH = 0.9
# a rollout's step, as a multiple of a bare replay of the denoiser
MOST_OVERHEAD, LEAST_OVER_EAGER = 1.03, 1.3


class Clock:
    """Seconds of the `torch.profiler.record_function` spans of a loop; on a GPU by events, read when asked.

    A profile would have the same spans and slow the loop down by what it records of every operator.
    """

    def __init__(self, device):
        self.device, self.times = device, defaultdict(list)

    @contextlib.contextmanager
    def running(self):
        """Times every span that begins and ends inside."""
        clock, began = self, {}

        def enter(span):
            began[span] = clock.now()
            return span

        def leave(span, *error):
            clock.times[span.name].append((began.pop(span), clock.now()))

        with (
            mock.patch.object(record_function, "__enter__", enter),
            mock.patch.object(record_function, "__exit__", leave),
        ):
            yield

    def now(self):
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return {name: sum(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in self.times.items()}
        return {name: sum(b - a for a, b in pairs) for name, pairs in self.times.items()}


class OurLoop:
    def __init__(self, trainer, graphs):
        from pcpo_fast.rollout import RolloutEngine

        self.trainer = trainer
        self.engine = RolloutEngine(trainer.policy, trainer.config.run.micro_batch_size, graphs=graphs)

    def epoch(self):
        self.trainer.engine = self.engine
        self.trainer.update(self.trainer.collect())


class TheirLoop:
    def __init__(self, trainer, sample_batch, train_batch):
        self.trainer, self.loop = trainer, BaselineLoop(trainer, sample_batch, train_batch)

    def epoch(self):
        prompts = first_prompts(self.trainer)
        samples = self.loop.sample(prompts)
        self.loop.update(samples, self.loop.score(samples, prompts))


def first_prompts(trainer):
    from pcpo_fast.prompts import draw_prompts

    run = trainer.config.run
    return draw_prompts(trainer.prompts, run.prompts_per_epoch, run.group_size, torch.Generator().manual_seed(0))


@dataclasses.dataclass(frozen=True)
class Study:
    """A model, and the loops that are compared on it."""

    model: str
    images: int
    micro_batch: int
    steps: int
    loops: tuple[str, ...]
    resolution: int | None = None

    @property
    def trained(self):
        """Steps that draw noise: for flow models all but the last."""
        return self.steps - (self.model in ("digits-flow", "sd35"))

    @property
    def rows(self):
        return self.images * self.trained

    @property
    def compiled(self):
        return self.loops == COMPILED_LOOPS

    @property
    def label(self):
        return self.model + (" compiled" if self.compiled else "")


CPU_LOOPS = (OURS, SAME_BATCH, DDPO, DANCE)
GPU_LOOPS = (OURS, "ours, graphs off", DDPO)
COMPILED_LOOPS = ("ours, compiled", "ours, compiled, graphs off", DDPO)
STUDIES = {
    "cpu": (Study("digits", 32, 32, 10, CPU_LOOPS), Study("digits-flow", 32, 32, 10, CPU_LOOPS)),
    "cuda": (
        Study("sd15", 8, 4, 5, (*GPU_LOOPS, SAME_BATCH)),
        Study("sd35", 8, 8, 4, GPU_LOOPS, resolution=512),
        Study("sdxl", 4, 4, 2, GPU_LOOPS),
        # compiling takes minutes
        Study("sd15", 8, 4, 5, COMPILED_LOOPS),
    ),
}


def make_trainer(study, device, folder, **settings):
    """With DDPO's or Flow-GRPO's objective, which all loops have; two prompts, one optimiser step an epoch."""
    from pcpo_fast.policies import EMBEDDED, find_family, load_policy
    from pcpo_fast.presets import PRESETS
    from pcpo_fast.trainer import Trainer

    config = PRESETS[study.model].replace(
        device=device.type,
        objective="ppo",
        credit="native",
        num_inference_steps=study.steps,
        prompts_per_epoch=2,
        group_size=study.images // 2,
        micro_batch_size=study.micro_batch,
        # the baseline encodes its prompts again and again
        release_text_encoders=False,
        gradient_accumulation_steps=study.rows // study.micro_batch,
        resolution=study.resolution,
        compile=study.compiled,
        **{"old_outputs": "recompute" if study.compiled else "rollout"} | settings,
    )
    torch.manual_seed(0)
    arguments = {"decode_batch": study.micro_batch, "keep_reference": False}
    if study.model in EMBEDDED:
        policy = load_policy(config.model, **arguments)
    else:
        from bench.models import make_pipeline

        pipeline = make_pipeline(study.model, device, reduced_text=True)
        policy = find_family(type(pipeline).__name__)(pipeline, config.model, **arguments)
    return Trainer(config, policy, folder)


def make_loop(study, name, trainer):
    if name.startswith(OURS):
        return OurLoop(trainer, graphs=False if name.endswith("graphs off") else None)
    return TheirLoop(trainer, *BASELINES.get(name, (study.micro_batch,) * 2))


def assert_same_gradient(study, device, folder):
    """Given the same samples and rewards: nothing is compared before it is the same work."""
    from pcpo_fast.batch import Batch
    from pcpo_fast.rollout import Trajectory

    # no row is clipped for a rounding
    trainer = make_trainer(study, device, folder, clip_range=0.5, old_outputs="recompute")
    loop = BaselineLoop(trainer, study.micro_batch, study.micro_batch)
    prompts = first_prompts(trainer)
    samples = loop.sample(prompts)
    advantages = loop.score(samples, prompts)
    parameters = trainer.policy.trainable_parameters()

    def gradient(optimizer, update):
        found = []
        hook = optimizer.register_step_pre_hook(lambda *_: found.append([p.grad.clone() for p in parameters]))
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        update()
        hook.remove()
        (gradient,) = found
        return torch.cat([tensor.flatten() for tensor in gradient]).double()

    theirs = gradient(loop.optimizer, lambda: loop.update(samples, advantages))
    distinct = list(dict.fromkeys(prompts))
    trajectory = Trajectory(
        states=samples.states,
        # computed again before the update
        model_outputs=torch.empty_like(samples.states[:, 1:], dtype=trainer.policy.dtype),
        prompt=torch.tensor([distinct.index(name) for name in prompts], device=device),
        conditioning=trainer.policy.encode(distinct),
        table=trainer.windows.tables[0],
    )
    sampled = {"time/rollout": 0.0, "time/reward": 0.0}
    batch = Batch(trajectory, advantages, torch.Generator().manual_seed(0), sampled)
    ours = gradient(trainer.optimizer.adamw, lambda: trainer.update(batch))
    # theirs takes the ratio of exponentials of float32 log-probabilities; on a GPU both add in bfloat16
    assert (ours - theirs).norm() <= (1e-3 if device.type == "cpu" else 3e-2) * theirs.norm()


def measure(study, device, folder):
    """Seconds per epoch by loop and round, peak memory, and the time split. The loops train one model in turn."""
    assert_same_gradient(study, device, folder / "gradient")
    found, trainer = {}, make_trainer(study, device, folder)
    loops = {name: make_loop(study, name, trainer) for name in study.loops}
    for name, loop in loops.items():
        # compiles, captures, whose memory a replay does not show, and settles the allocator
        with PeakMemory(device) as memory:
            loop.epoch()
        found[name] = {"seconds": [], "peak_extra_bytes": memory.peak}
    for _ in range(ROUNDS[device.type]):
        for name, loop in loops.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            loop.epoch()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found[name]["seconds"].append(time.perf_counter() - start)
    for name, loop in loops.items():
        clock = Clock(device)
        with clock.running(), record_function("epoch"):
            loop.epoch()
        seconds = clock.seconds()
        found[name]["split"] = {span: seconds.get(span, 0.0) for span in (*SPANS, "epoch")}
    return found


def speedup(found, name, over):
    return statistics.median(b / a for a, b in zip(found[name]["seconds"], found[over]["seconds"], strict=True))


class Results:
    """Measures a model's study on demand, and reports on all."""

    def __init__(self, device, folder):
        self.device, self.folder = device, folder
        self.studies, self.rollouts = {}, {}

    def of(self, study):
        if study.label not in self.studies:
            found = measure(study, self.device, self.folder / study.label.replace(" ", "-"))
            self.studies[study.label] = dataclasses.asdict(study) | {"loops": found}
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return self.studies[study.label]["loops"]

    def as_json(self):
        return {
            "device": report.device_name(self.device),
            "torch": torch.__version__,
            "commit": report.commit(),
            "studies": list(self.studies.values()),
            "rollouts": self.rollouts,
        }

    def markdown(self):
        lines = [
            "## An epoch from end to end",
            "",
            f"{report.device_name(self.device)}, torch {torch.__version__}"
            + (", one thread." if self.device.type == "cpu" else ", bfloat16, LoRA, random weights."),
        ]
        for study in (s for s in STUDIES[self.device.type] if s.label in self.studies):
            found, table = self.studies[study.label]["loops"], []
            for name in study.loops:
                seconds = statistics.median(found[name]["seconds"])
                table.append(
                    [
                        name,
                        f"{study.images / seconds:.2f}",
                        f"{study.rows / seconds:.1f}",
                        f"{speedup(found, name, DDPO):.2f}",
                        f"{found[name]['peak_extra_bytes'] / 2**20:.0f}",
                    ]
                )
            title = f"{study.label}: {study.images} images, {study.steps} steps, micro-batches of {study.micro_batch}"
            headings = ["loop", "images/s", "rows/s", f"vs {DDPO}", "peak extra MiB"]
            lines += ["", title, "", *report.table(headings, table)]
            cells = []
            for name in study.loops:
                split = found[name]["split"]
                shares = (f"{split[span] / split['epoch']:.1%}" for span in SPANS)
                cells.append([name, *shares, f"{split['epoch']:.2f}"])
            lines += ["", *report.table(["loop", *SPANS, "seconds"], cells)]
        for model, numbers in self.rollouts.items():
            lines += [
                "",
                f"`{model}`, a step of a rollout, batch {numbers['batch']}: {numbers['step_s'] * 1e3:.2f} ms, eager "
                f"{numbers['eager_s'] * 1e3:.2f} ms, a bare replay of the denoiser {numbers['bare_s'] * 1e3:.2f} ms",
            ]
        return "\n".join(lines)

    def picture(self, path):
        """A bar per loop, split by part."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        studies = [study for study in STUDIES[self.device.type] if study.label in self.studies]
        figure, axes = plt.subplots(
            1, len(studies), figsize=(6.4 * len(studies), 3.6), layout="constrained", squeeze=False
        )
        colours = ("#0072B2", "#56B4E9", "#999999", "#D55E00", "#E69F00", "#009E73", "#E4E4E4")
        for axis, study in zip(axes[0], studies, strict=True):
            found = self.studies[study.label]["loops"]
            names = study.loops
            left = [0.0] * len(names)
            for part, colour in zip((*SPANS, "the rest"), colours, strict=True):
                widths = [_share(found[name]["split"], part) / study.images * 1e3 for name in names]
                axis.barh(names, widths, left=left, color=colour, label=part, height=0.62)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            for name, end in zip(names, left, strict=True):
                axis.text(end + 0.01 * max(left), name, f"{end:.0f} ms", va="center", fontsize=9)
            axis.set_xlim(0, 1.14 * max(left))
            axis.set_title(f"{study.label}: milliseconds per image", fontsize=11)
            axis.invert_yaxis()
            axis.tick_params(axis="y", length=0)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
        for axis in axes[0][1:]:
            axis.set_yticklabels([])
        threads = ", one thread" if self.device.type == "cpu" else ""
        figure.suptitle(f"An epoch, {report.device_name(self.device)}{threads}, torch {torch.__version__}", fontsize=11)
        figure.legend(
            *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9
        )
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _share(split, part):
    return split["epoch"] - sum(split[name] for name in SPANS) if part == "the rest" else split[part]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory, summary):
    for package in ("diffusers", "transformers", "peft"):
        pytest.importorskip(package)
    device, threads = default_device(), torch.get_num_threads()
    torch.set_num_threads(1)
    results = Results(device, tmp_path_factory.mktemp("training"))
    yield results
    torch.set_num_threads(threads)
    if results.studies:
        summary.append(results.markdown())
    folder = request.config.getoption("--save-results")
    if folder and results.studies:
        folder = report.device_folder(Path(folder), device)
        (folder / "training.json").write_text(json.dumps(results.as_json(), indent=1) + "\n")
        results.picture(folder / "training.png")


@pytest.mark.parametrize("study", STUDIES[default_device().type], ids=lambda study: study.label)
def test_an_epoch_is_faster_than_the_baseline(study, results):
    found = results.of(study)
    if study.model in LEAST_SPEEDUP:
        assert speedup(found, study.loops[0], DDPO) >= LEAST_SPEEDUP[study.model]
    if SAME_BATCH in found:
        # at one size of batch the denoiser is nearly all there is to it
        assert speedup(found, OURS, SAME_BATCH) >= LEAST_AT_THE_SAME_BATCH


@pytest.mark.skipif(default_device().type == "cpu", reason="needs a GPU that PyTorch can use")
def test_a_rollout_costs_little_more_than_bare_replays_of_the_denoiser(results, tmp_path):
    """Stable Diffusion 1.5, batch 4."""
    from pcpo_fast.rollout import RolloutEngine

    device, study = default_device(), Study("sd15", 8, 4, 50, ())
    trainer = make_trainer(study, device, tmp_path)
    policy, table = trainer.policy, trainer.windows.tables[0]
    conditioning = policy.encode(["cat"])
    prompt = torch.zeros(study.micro_batch, dtype=torch.int64, device=device)

    def seconds(call):
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / study.steps)
        return statistics.median(times[1:])

    def rollout(graphs):
        engine = RolloutEngine(policy, study.micro_batch, graphs=graphs)
        return lambda: engine(table, conditioning, prompt, seed=0, first_index=0)

    sample = torch.randn((study.micro_batch, *policy.latent_shape), device=device)
    inputs = sample, table.timesteps[:1].expand(study.micro_batch).clone(), conditioning[prompt]
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            policy.predict(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            policy.predict(*inputs)
    numbers = {
        "batch": study.micro_batch,
        "bare_s": seconds(lambda: [graph.replay() for _ in range(study.steps)]),
        "step_s": seconds(rollout(True)),
        "eager_s": seconds(rollout(False)),
    }
    results.rollouts[study.model] = numbers
    assert numbers["step_s"] <= MOST_OVERHEAD * numbers["bare_s"]
    assert numbers["eager_s"] >= LEAST_OVER_EAGER * numbers["step_s"]


def test_the_split_adds_up():
    """Spans lie in the epoch, and no time is counted twice."""
    clock = Clock(torch.device("cpu"))
    with clock.running(), record_function("epoch"):
        for name in SPANS:
            with record_function(name):
                time.sleep(1e-3)
    seconds = clock.seconds()
    assert math.isclose(sum(seconds[name] for name in SPANS), seconds["epoch"], rel_tol=0.2)
