"""Rewards that a server scores, in JSON over HTTP.

    GET  /health   -> 200
    POST /compute  {"prompt": [...], "image": [PNG in base64, ...], "metadata": [{...}, ...]}
                   -> {"rewards": [number or null, ...]}

An image that the server fails to score gets NaN, and is never given a number. `pcpo serve-reward` is such a server, and
so are those of Flow-Factory.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import math
import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pcpo_fast.errors import RewardError
from pcpo_fast.rewards.pixels import to_pictures
from pcpo_fast.rewards.weights import need
from pcpo_fast.terminal import one_line

# a prompt, its image and its metadata
Input = tuple[str, Image.Image, Any]
# answers that may be another one a little later
TRANSIENT = {408, 425, 429, *range(500, 600)}
# bytes of the longest answer
LONGEST_ANSWER = 2**20


class ServerError(Exception):
    """The server did not give scores. Trying again may help if it is transient."""

    def __init__(self, message: str, *, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


class HttpReward:
    """Scores of a server, NaN where it gives none.

    Transient failures (lost connections, time-outs, status 408, 425, 429 and 5xx) are tried again. Everything else that
    is no list of one number or null per image is not.

    Args:
        url: where /health and /compute are.
        batch_size: images in a request.
        in_flight: requests at a time; the others wait here.
        timeout: seconds that a request may take.
        attempts: how often a request is sent at most.
        wait: shortest and longest time between two attempts in seconds; it is drawn at random below a limit that
            doubles with each.

    Attributes:
        failed: how many images of the last call have no score because the server failed, which null is not.
        last_error: the last failure.

    Raises:
        RewardError: if packages are missing.
    """

    def __init__(
        self,
        url: str,
        batch_size: int = 8,
        *,
        in_flight: int = 8,
        timeout: float = 120.0,
        attempts: int = 5,
        wait: tuple[float, float] = (0.5, 30.0),
    ) -> None:
        need("http", "httpx", "tenacity")
        self.url, self.batch_size, self.in_flight, self.timeout = url, batch_size, in_flight, timeout
        self.attempts, self.wait = attempts, wait
        self.failed, self.last_error = 0, ""
        # the global generator belongs to the run
        self._random = random.Random()

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Scores, float32 (N,), of float images (N, 3, H, W) in [0, 1], N prompts and N dicts.

        Raises:
            RewardError: for metadata that JSON cannot hold.
        """
        scores = self.submit(images, prompts, metadata)
        try:
            return torch.tensor(scores.result(), dtype=torch.float32)
        finally:
            # where the time is over or Ctrl-C was pressed
            scores.cancel()

    def submit(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Future[list[float]]:
        """As a call, which does not wait: the future of N scores."""
        try:
            # a copy as the server sees it, so that an error shows here
            rows = json.loads(json.dumps(list(metadata), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise RewardError(f"the prompts' metadata cannot be sent as JSON: {error}") from error
        inputs = list(zip(prompts, to_pictures(images), rows, strict=True))
        return asyncio.run_coroutine_threadsafe(self._score(inputs), _loop())

    def check_health(self) -> None:
        """Asks the server whether it is there.

        Raises:
            RewardError: if it is not, after all attempts.
        """
        try:
            asyncio.run_coroutine_threadsafe(self._check_health(), _loop()).result()
        except ServerError as error:
            raise RewardError(f"the server {self.url} cannot be used: {error}; start it, or give its URL") from error

    async def _check_health(self) -> None:
        async with self._client() as client:
            await self._request(client, "GET", "/health", None)

    async def _score(self, inputs: list[Input]) -> list[float]:
        self.failed, self.last_error = 0, ""
        gate, size = asyncio.Semaphore(self.in_flight), self.batch_size
        async with self._client() as client:
            starts = range(0, len(inputs), size)
            batches = [self._batch(client, gate, inputs[start : start + size]) for start in starts]
            return [score for scores in await asyncio.gather(*batches) for score in scores]

    async def _batch(self, client: Any, gate: asyncio.Semaphore, inputs: list[Input]) -> list[float]:
        prompts, pictures, metadata = zip(*inputs, strict=True)
        async with gate:
            images = await asyncio.to_thread(lambda: [encode(picture) for picture in pictures])
            body = json.dumps({"prompt": prompts, "image": images, "metadata": metadata}).encode()
            try:
                return read_scores(await self._request(client, "POST", "/compute", body), len(prompts))
            except ServerError as error:
                self.failed, self.last_error = self.failed + len(prompts), str(error)
                return [math.nan] * len(prompts)

    async def _request(self, client: Any, method: str, path: str, body: bytes | None) -> bytes:
        import tenacity

        shortest, longest = self.wait

        def pause(state: tenacity.RetryCallState) -> float:
            return self._random.uniform(shortest, min(longest, shortest * 2**state.attempt_number))

        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, ServerError) and error.transient),
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=pause,
            reraise=True,
        )
        return await attempts(self._attempt, client, method, path, body)

    async def _attempt(self, client: Any, method: str, path: str, body: bytes | None) -> bytes:
        import httpx

        try:
            return await asyncio.wait_for(self._send(client, method, path, body), self.timeout)
        except asyncio.TimeoutError as error:
            raise ServerError(f"no answer in {self.timeout} seconds", transient=True) from error
        except httpx.TransportError as error:
            raise ServerError(f"{type(error).__name__}: {error}".rstrip(": "), transient=True) from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ServerError(f"{type(error).__name__}: {error}", transient=False) from error

    async def _send(self, client: Any, method: str, path: str, body: bytes | None) -> bytes:
        """The body of an answer of status 200."""
        answer, headers = b"", {"content-type": "application/json", "accept-encoding": "identity"}
        async with client.stream(method, self.url + path, content=body, headers=headers) as response:
            async for part in response.aiter_raw():
                answer += part
                if len(answer) > LONGEST_ANSWER:
                    raise ServerError(f"its answer is longer than {LONGEST_ANSWER} bytes", transient=False)
        if response.status_code != 200:
            text = one_line(answer[:300].decode(errors="replace"))
            raise ServerError(
                f"status {response.status_code}: {text}".rstrip(": "), transient=response.status_code in TRANSIENT
            )
        return answer

    def _client(self) -> Any:
        import httpx

        # a proxy of the environment would see the images; _attempt keeps the time
        return httpx.AsyncClient(timeout=None, follow_redirects=False, trust_env=False)


def encode(picture: Image.Image) -> str:
    """A picture as a PNG in base64."""
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def read_scores(answer: bytes, count: int) -> list[float]:
    """`count` numbers of an answer, NaN for null.

    Raises:
        ServerError: for anything else.
    """
    shown = one_line(answer[:80].decode(errors="replace"))
    try:
        scores = json.loads(answer)["rewards"]
        numbers = [math.nan if score is None else _number(score) for score in scores]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise ServerError(
            f'its answer is not {{"rewards": [number or null, ...]}} but {shown!r}', transient=False
        ) from error
    if len(numbers) != count:
        raise ServerError(f"it gave {len(numbers)} scores for {count} images", transient=False)
    return numbers


def _number(score: Any) -> float:
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise TypeError
    return float(score)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all servers, which runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward servers", daemon=True).start()
    return loop
