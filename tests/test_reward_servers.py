"""Rewards that a server scores: real server processes on loopback, good ones and bad ones."""

import base64
import contextlib
import io
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from pipelines import records

from pcpo_fast import train
from pcpo_fast.__main__ import main
from pcpo_fast.errors import RewardError, SettingError
from pcpo_fast.prompts import Prompts
from pcpo_fast.reward_settings import RewardSettings
from pcpo_fast.rewards import RewardSet
from pcpo_fast.rewards.http import HttpReward, read_scores

IMAGES = torch.rand(32, 3, 16, 24, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"prompt {index}" for index in range(32)]
BRIGHTNESS = (IMAGES * 255).round().mean(dim=(1, 2, 3)) / 255
CPU = torch.device("cpu")

# the module that the server under test serves
SERVED = """
import time

def brightness(images, prompts, metadata):
    assert images.shape[2:] != (5, 5), "five pixels are too few"
    time.sleep(max(row.get("seconds", 0) for row in metadata))
    scores = images.mean(dim=(1, 2, 3)) + sum(row.get("more", 0) for row in metadata)
    return [float("nan") if "no score" in prompt else score for score, prompt in zip(scores, prompts)]
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def started(port, *command, folder=None):
    """A server process that answers, until the end of the block. It may end earlier."""
    # another folder than the test's own, without what the shell had set
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment)
    try:
        # a busy machine starts processes slowly
        for _ in range(1200):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=60)
                break
            assert process.poll() is None
            time.sleep(0.1)
        else:
            pytest.fail("the server did not start")
        yield process
    finally:
        process.kill()
        process.wait()


def bad_server(port):
    return started(port, str(Path(__file__).with_name("bad_server.py")), str(port))


@pytest.fixture(scope="module")
def bad():
    port = free_port()
    with bad_server(port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """`pcpo serve-reward` with limits that a test can reach."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    (folder / "served.py").write_text(SERVED)
    command = ["-m", "pcpo_fast", "serve-reward", "served:brightness", "--port", str(port)]
    command += ["--device", "cpu", "--queue", "2", "--max-megabytes", "1", "--max-side", "64"]
    with started(port, *command, folder=folder):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def impatient(monkeypatch):
    """Waits of milliseconds between attempts, in runs, too."""
    monkeypatch.setitem(HttpReward.__init__.__kwdefaults__, "wait", (0.001, 0.01))


def score(url, **settings):
    reward = HttpReward(url, **{"batch_size": 8, "wait": (0.001, 0.01)} | settings)
    return reward, reward(IMAGES, PROMPTS, [{} for _ in PROMPTS])


@pytest.mark.parametrize(
    ("kind", "not_finite", "failed", "error"),
    [
        ("good", 0, 0, ""),
        ("unavailable", 0, 0, ""),
        ("drops", 0, 0, ""),
        ("hangs", 0, 0, ""),
        ("refuses", 8, 8, "status 400: no such prompt"),
        ("moved", 8, 8, "status 302"),
        ("short", 8, 8, "it gave 7 scores for 8 images"),
        ("text", 8, 8, """its answer is not {"rewards": [number or null, ...]} but '<html>'"""),
        ("strings", 8, 8, """its answer is not {"rewards": [number or null, ...]} but """),
        ("endless", 8, 8, "its answer is longer than 1048576 bytes"),
        ("null", 1, 0, ""),
        ("down", 32, 32, "status 503: no more"),
    ],
)
def test_what_a_server_fails_to_score_is_nan_and_counted(bad, kind, not_finite, failed, error):
    """And whatever it scored is as it was given: nothing becomes 0."""
    # one at a time, so that it is known whose turn the second one is
    reward, scores = score(f"{bad}/{kind}", in_flight=1, timeout=0.4 if kind == "hangs" else 60)
    finite = scores.isfinite()
    assert (int((~finite).sum()), reward.failed) == (not_finite, failed)
    assert reward.last_error.startswith(error) and bool(reward.last_error) == bool(error)
    torch.testing.assert_close(scores[finite], BRIGHTNESS[finite])


def test_a_slow_server_costs_no_score_and_gets_few_requests_at_a_time(bad):
    """It refuses a third one, and nothing is sent twice here."""
    reward, scores = score(f"{bad}/slow", in_flight=2, batch_size=2, attempts=1)
    assert reward.failed == 0
    torch.testing.assert_close(scores, BRIGHTNESS)


def test_a_server_that_was_killed_and_started_again_costs_no_score():
    port = free_port()
    with bad_server(port) as process:

        def restart():
            process.wait()
            with bad_server(port):
                finished.wait()

        finished, thread = threading.Event(), threading.Thread(target=restart)
        thread.start()
        try:
            reward, scores = score(f"http://127.0.0.1:{port}/dies-at-3", in_flight=2, attempts=10_000, wait=(0.01, 0.1))
        finally:
            finished.set()
            thread.join()
    assert process.returncode == 1 and reward.failed == 0
    torch.testing.assert_close(scores, BRIGHTNESS)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"null",
        b"[1, 2]",
        b'{"rewards": null}',
        b'{"rewards": 3}',
        b'{"rewards": {"a": 1, "b": 2}}',
        b'{"rewards": [true, 1]}',
        b'{"rewards": [[1], 2]}',
        b'{"rewards": [1' + b"0" * 400 + b", 2]}",
        b"[" * 100_000,
        b"\xff",
        pickle.dumps({"rewards": [1, 2]}),
    ],
    ids=range(12),
)
def test_answers_that_are_no_scores_are_refused(answer):
    with pytest.raises(Exception, match="its answer is not") as error:
        read_scores(answer, 2)
    assert not error.value.transient
    assert read_scores(b'{"rewards": [1, 2.5], "time": 3}', 2) == [1, 2.5]
    assert math.isnan(read_scores(b'{"rewards": [null]}', 1)[0])


def test_a_server_scores_as_the_reward_itself(good):
    settings = RewardSettings(reward_servers=(f"far={good}/",), reward_batch_size=5)
    metadata = [{"more": index % 3, "list": ["ä", None]} for index in range(5)] + [{} for _ in PROMPTS[5:]]
    rewards = RewardSet(["far=2"], options=settings)
    rewards.try_out(Prompts(PROMPTS, {}), (16, 16), CPU)
    total, _ = rewards(IMAGES, PROMPTS, metadata)
    expected = BRIGHTNESS.clone()
    # the reward adds the sum over a request
    expected[:5] += 4
    torch.testing.assert_close(total, 2 * expected)
    assert rewards.failed == {"far": 0}


def test_a_score_of_nan_comes_back_as_nan(good):
    """It is the reward's own: no failure of the server."""
    reward = HttpReward(good)
    scores = reward(IMAGES[:3], ["a", "no score", "b"], [{}] * 3)
    assert scores.isfinite().tolist() == [True, False, True] and reward.failed == 0


def test_metadata_that_json_cannot_hold_are_an_error():
    for value in (object(), math.nan, {1, 2}):
        with pytest.raises(RewardError, match=r"^the prompts' metadata cannot be sent as JSON: "):
            HttpReward("http://127.0.0.1:9")(IMAGES[:1], ["a"], [{"key": value}])


def png(width, height, format="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, format=format)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("request_body", "status", "message"),
    [
        ({"prompt": ["a"], "image": [png(8, 8)]}, 200, ""),
        ({"prompt": ["a"], "image": [png(8, 8)], "metadata": None}, 200, ""),
        ({"prompt": ["a", "b"], "image": [png(8, 8)]}, 400, "2 prompts, 1 images and 2 dicts of metadata were sent"),
        ({"prompt": [], "image": []}, 400, "0 prompts"),
        ({"prompt": ["a"], "image": ["!!"]}, 400, "an image is not a PNG in base64"),
        ({"prompt": ["a"], "image": ["AAAA"]}, 400, "an image is not a PNG in base64"),
        ({"prompt": ["a"], "image": [png(8, 8, "JPEG")]}, 400, "an image is not a PNG in base64"),
        ({"prompt": ["a"], "image": [png(65, 8)]}, 400, "the longest side may have 64"),
        ({"prompt": ["a", "b"], "image": [png(8, 8), png(8, 9)]}, 400, "stack expects each tensor to be equal size"),
        ({"prompt": ["a"], "image": [png(5, 5)]}, 500, "AssertionError: five pixels are too few"),
        ({"image": [png(8, 8)]}, 400, "Field required"),
        (b"{", 400, "Invalid JSON"),
        (pickle.dumps({"prompt": ["a"]}), 400, "Invalid JSON"),
        (b" " * (10**6 + 1), 413, "the request is larger than 1000000 bytes"),
    ],
    ids=range(14),
)
def test_requests_that_cannot_be_scored_are_refused_with_a_reason(good, request_body, status, message):
    body = request_body if isinstance(request_body, bytes) else json.dumps(request_body).encode()
    response = httpx.post(f"{good}/compute", content=body, timeout=60)
    assert response.status_code == status, response.text
    assert message in response.json().get("detail", "")


def test_a_server_with_a_full_queue_says_so_and_costs_no_score(good):
    body = {"prompt": ["a"], "image": [png(8, 8)], "metadata": [{"seconds": 1}]}
    answers = []

    def send():
        answers.append(httpx.post(f"{good}/compute", json=body, timeout=60).status_code)

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) == {200, 503}
    reward = HttpReward(good, batch_size=4, wait=(0.01, 0.2), attempts=1000)
    torch.testing.assert_close(reward(IMAGES, PROMPTS, [{}] * 32), BRIGHTNESS)
    assert reward.failed == 0


def test_a_time_limit_and_ctrl_c_end_the_waiting(bad, good):
    waits = HttpReward(good)
    # a process that was started in the background ignores it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def slow(images, prompts):
        return waits(images, prompts, [{"seconds": 2}] * len(prompts))

    with pytest.raises(RewardError, match=r"took more than the 0\.2 seconds of reward_timeout"):
        RewardSet({"slow": slow}, timeout=0.2)(IMAGES[:1], PROMPTS[:1])
    # the loop goes on
    torch.testing.assert_close(score(f"{bad}/good")[1], BRIGHTNESS)
    alarm = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    alarm.start()
    with pytest.raises(KeyboardInterrupt):
        slow(IMAGES[:1], PROMPTS[:1])
    alarm.join()
    signal.signal(signal.SIGINT, before)


def test_a_command_line_that_cannot_be_served_is_one_line(capsys):
    from pcpo_fast.rewards import serve

    assert serve.main(["no_such_reward"]) == 2
    assert "error: reward: no reward is named 'no_such_reward'; choose one of" in capsys.readouterr().err
    assert serve.main(["jpeg_compressibility", "--device", "cuda:99"]) == 2
    assert "error: device: cuda:99 is not there" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve.main(["jpeg_compressibility", "--port", str(port)]) == 2
    assert f"error: port: cannot listen on 127.0.0.1:{port}: " in capsys.readouterr().err
    for arguments in (["--queue", "0"], ["--max-side", "-1"]):
        with pytest.raises(SystemExit):
            serve.main(["jpeg_compressibility", *arguments])
        assert "give a whole number of at least 1" in capsys.readouterr().err


def test_a_server_without_its_packages_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "pcpo_fast.rewards.serve", raising=False)
    assert main(["serve-reward", "jpeg_compressibility"]) == 2
    assert capsys.readouterr().err == "error: a reward server needs fastapi; pip install 'pcpo-fast[serve]'\n"


@pytest.mark.parametrize(
    ("servers", "message"),
    [
        (["hps"], r"'hps' was given; write name=URL, such as hps=http://127.0.0.1:8100"),
        (["=http://x:1"], "write name=URL"),
        (["a b=http://x:1"], "write name=URL"),
        (["hps=ftp://x:1"], "write name=URL"),
        (["hps=http://x:port"], "write name=URL"),
        (["hps=http://"], "write name=URL"),
        (["hps=http://x:1", "hps=http://x:2"], "'hps' is given twice; give each server its own name"),
        (["other=http://x:1"], "the server 'other' scores nothing; name it in rewards or eval_rewards, too"),
    ],
)
def test_servers_that_cannot_be_used_are_refused(servers, message):
    with pytest.raises(SettingError, match=f"^reward_servers: .*{message}"):
        RewardSettings(rewards=("hps=2",), reward_servers=tuple(servers)).check()


def test_a_server_cannot_take_the_name_of_a_reward():
    options = RewardSettings(reward_servers=("ocr=http://x:1",))
    with pytest.raises(SettingError, match=r"^reward_servers: a reward 'ocr' is built in; give the server another"):
        RewardSet(["ocr"], options=options)


def test_a_server_that_a_file_names_is_not_asked(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"rewards": ["far"], "reward_servers": ["far=http://127.0.0.1:9"]}')
    with pytest.raises(SettingError, match=r"reward_servers: .* comes from a file, and it is sent all prompts and"):
        train.parse(["--config", str(config)])
    train.parse(["--config", str(config), "--trust-rewards"])
    train.parse(["--config", str(config), "--reward-servers", "far=http://127.0.0.1:9"])
    with pytest.raises(SettingError, match="comes from a file"):
        train.parse(["--config", str(config), "--rewards", "far"])


def test_a_server_that_is_not_there_or_fails_at_the_start_is_one_line(tmp_path, capsys, bad, impatient):
    """Before the model is loaded."""
    for url, message in [
        (f"http://127.0.0.1:{free_port()}", "cannot be used: ConnectError: "),
        (f"{bad}/down", "failed: status 503: no more. This was a trial before the run"),
    ]:
        assert run(tmp_path, url) == 2
        error = capsys.readouterr().err
        assert error.count("error:") == 1 and error.startswith("error: --rewards: ") and message in error
        assert url in error and not list(tmp_path.rglob("*.safetensors"))


def run(folder, url, *more):
    """A run of three epochs of 8 images, whose rewards are four requests; one comes from the trial, one from the first
    evaluation."""
    settings = "--rewards far --eval-rewards --reward-batch-size 2 --eval-samples 2 --eval-every 0 --epochs 3"
    settings += " --prompts-per-epoch 2 --group-size 4 --micro-batch-size 4 --num-inference-steps 2"
    arguments = ["digits", "--output-dir", str(folder), "--reward-servers", f"far={url}", *settings.split(), *more]
    return train.main(arguments)


def test_a_run_goes_on_without_what_a_dying_server_left_out_and_then_ends_saved(tmp_path, capsys, impatient):
    """It dies in the second of the four requests of epoch 2, and for good. The epoch after has no score at all."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/dies-at-8"
    with bad_server(port):
        assert run(tmp_path, url, "--reward-failures", "1") == 2
    output = capsys.readouterr()
    failure = "the server of the reward 'far' failed to score"
    assert f"warning: {failure} 6 of 8 images (ConnectError: " in output.err
    assert "every reward of epoch 3 is NaN or infinite (far)" in output.err
    assert "Stopped after epoch 2; continue with" in output.out
    first, second = (record for record in records(tmp_path) if "reward/mean" in record)
    assert (first["reward/failed/far"], first["reward/not_finite"]) == (0, 0)
    assert (second["reward/failed/far"], second["reward/not_finite/far"], second["reward/not_finite"]) == (6, 6, 6)
    # the pictures are alike; zeros would pull the mean down
    assert second["reward/far"] > 0.75 * first["reward/far"] > 0
    # after the trial and the four requests of epoch 3 it dies again, in the last evaluation
    with bad_server(port):
        assert run(tmp_path, f"http://127.0.0.1:{port}/dies-at-6", "--resume") == 0
    assert f"warning: {failure} 2 of 2 images (ConnectError: " in capsys.readouterr().err
    third, evaluation = records(tmp_path)[-2:]
    assert (third["epoch"], third["reward/failed/far"], evaluation["eval/far"]) == (3, 0, None)


def test_too_many_failures_end_a_run_saved(tmp_path, capsys, impatient):
    port = free_port()
    with bad_server(port):
        assert run(tmp_path, f"http://127.0.0.1:{port}/dies-at-8") == 2
    output = capsys.readouterr()
    assert "failed to score 6 of 8 images (ConnectError: " in output.err
    assert "in epoch 2, more than the 0.1 of reward_failures; look at the server, then --resume" in output.err
    assert "Stopped after epoch 1; continue with" in output.out
    assert list((tmp_path / "checkpoints").iterdir())
