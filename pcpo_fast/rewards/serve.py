"""`pcpo serve-reward`: a reward as a server, from an environment of its own. http.py has the protocol."""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import io
import math
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor

from pcpo_fast.errors import RewardError, SettingError
from pcpo_fast.policies import find_device
from pcpo_fast.rewards import RewardSet
from pcpo_fast.terminal import one_line, say, warn

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Images(BaseModel):
    """A request: N prompts, N images as PNG in base64, and N dicts or none."""

    prompt: list[str]
    image: list[str]
    metadata: list[dict[str, Any]] | None = None


class Server:
    """Scores requests one after the other, in one thread.

    Args:
        name: the reward, as `--rewards` takes it.
        device: where its images go.
        queue: requests that wait or are scored at a time; more are answered with status 503.
        max_bytes: size of the largest request.
        max_side: height and width of the largest image.

    Raises:
        SettingError: as `RewardSet`.
    """

    def __init__(self, name: str, device: torch.device, *, queue: int, max_bytes: int, max_side: int) -> None:
        self.rewards = RewardSet([name], setting="reward")
        self.device, self.queue, self.max_bytes, self.max_side = device, queue, max_bytes, max_side
        self.busy = 0
        self._worker = ThreadPoolExecutor(1)

    def warm_up(self) -> None:
        """Scores one grey image, so that a model is loaded before the first request. A reward may refuse the prompt."""
        try:
            self.rewards(torch.full((1, 3, 64, 64), 0.5, device=self.device), ['a sign that says "hello"'])
        except RewardError as error:
            warn(f"a trial with a prompt that may not suit the reward failed: {one_line(error)}")

    def app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        app.get("/health")(self.health)
        app.post("/compute")(self.compute)
        return app

    async def health(self) -> dict[str, Any]:
        return {"status": "ok", "rewards": list(self.rewards.rewards)}

    async def compute(self, request: Request) -> dict[str, list[float | None]]:
        if self.busy >= self.queue:
            raise HTTPException(503, f"{self.busy} requests are waiting; try again later")
        self.busy += 1
        try:
            body = await self._body(request)
            return {"rewards": await asyncio.get_running_loop().run_in_executor(self._worker, self._score, body)}
        except RewardError as error:
            raise HTTPException(500, one_line(error)) from error
        finally:
            self.busy -= 1

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.max_bytes:
                raise HTTPException(413, f"the request is larger than {self.max_bytes} bytes; send fewer images")
        return bytes(body)

    def _score(self, body: bytes) -> list[float | None]:
        try:
            given = Images.model_validate_json(body)
            metadata = given.metadata or [{} for _ in given.prompt]
            if not len(given.prompt) == len(given.image) == len(metadata) or not given.prompt:
                raise ValueError(
                    f"{len(given.prompt)} prompts, {len(given.image)} images and {len(metadata)} dicts of metadata "
                    "were sent; send one of each per image"
                )
            images = torch.stack([self._image(text) for text in given.image])
        except (ValidationError, ValueError, RuntimeError) as error:
            raise HTTPException(400, one_line(error)) from error
        _, scores = self.rewards(images.to(self.device), given.prompt, metadata)
        [numbers] = [score.tolist() for score in scores.values()]
        # JSON has no NaN
        return [number if math.isfinite(number) else None for number in numbers]

    def _image(self, text: str) -> Tensor:
        """float32 (3, H, W) in [0, 1]."""
        try:
            picture = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
            if max(picture.size) > self.max_side:
                raise ValueError(f"an image has {picture.size} pixels; the longest side may have {self.max_side}")
            pixels = np.array(picture.convert("RGB"))
        except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"an image is not a PNG in base64: {error}") from error
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line. Returns 0, or 2 for a reward that cannot be served."""
    parser = argparse.ArgumentParser(
        prog="pcpo serve-reward",
        description="Serve a reward to pcpo train --reward-servers NAME=URL. There is no password: whoever reaches the "
        "port can use it.",
        allow_abbrev=False,
    )
    parser.add_argument("reward", help="a name such as pickscore, or module:function")
    parser.add_argument("--port", type=int, default=8100, help="0 takes a free one; default: 8100")
    parser.add_argument("--host", default=LOOPBACK[0], help="address to listen on; default: this machine alone")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--queue", type=_positive, default=32, help="requests that may wait; default: 32")
    parser.add_argument("--max-megabytes", type=_positive, default=64, help="size of the largest request; default: 64")
    parser.add_argument("--max-side", type=_positive, default=2048, help="pixels of an image's side; default: 2048")
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        limits = {"queue": given.queue, "max_bytes": given.max_megabytes * 10**6, "max_side": given.max_side}
        server = Server(given.reward, find_device(given.device), **limits)
        # before a model is loaded; who connects earlier waits
        listening = _listen(given.host, given.port)
    except SettingError as error:
        say(f"error: {error.name}: {one_line(error.reason)}", error=True)
        return 2
    where = f"{given.host}:{listening.getsockname()[1]}"
    if given.host not in LOOPBACK:
        warn(f"whoever reaches {where} can use this server; it has no password")
    server.warm_up()
    say(f"serving {given.reward} at http://{where}")
    uvicorn.Server(uvicorn.Config(server.app(), log_level="warning")).run(sockets=[listening])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise SettingError("port", f"cannot listen on {host}:{port}: {error}; choose another port or host") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} was given; give a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
