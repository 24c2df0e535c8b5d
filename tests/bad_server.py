"""A reward server that misbehaves on request: python bad_server.py PORT

The first part of a URL's path says how. The score of an image is its mean brightness.
"""

import base64
import io
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

# requests to /compute by kind, and whose turn it is
seen, turn = Counter(), threading.Lock()
# requests that are being answered
active = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(200, b"{}")

    def do_POST(self):
        kind = self.path.split("/")[1]
        given = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if kind == "slow":
            active.append(self)
            time.sleep(0.05)
            status = 200 if len(active) <= 2 else 503
            active.remove(self)
            scores = [brightness(image) for image in given["image"]]
            return self.answer(status, json.dumps({"rewards": scores}).encode())
        with turn:
            seen[kind] += 1
            self.misbehave(kind, seen[kind], [brightness(image) for image in given["image"]])

    def misbehave(self, kind, count, scores):
        if kind == "unavailable" and count <= 4:
            return self.answer(503 if count < 4 else 500, b"busy")
        if kind == "down":
            return self.answer(503, b"no\nmore")
        if kind == "drops" and count <= 2:
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if kind == "hangs" and count == 1:
            time.sleep(0.7)
        if kind == "refuses" and count == 2:
            return self.answer(400, b"no such prompt")
        if kind == "moved" and count == 2:
            return self.answer(302, b"", location="/good/compute")
        if kind == "short" and count == 2:
            scores.pop()
        if kind == "null" and count == 2:
            scores[0] = None
        if kind == "strings" and count == 2:
            scores = [str(score) for score in scores]
        if kind == "text" and count == 2:
            return self.answer(200, b"<html>")
        if kind == "endless" and count == 2:
            return self.answer(200, b" " * 2**21)
        if kind.startswith("dies-at-") and count == int(kind.rpartition("-")[2]):
            os._exit(1)
        self.answer(200, json.dumps({"rewards": scores}).encode())

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
            self.wfile.flush()
        except OSError:
            # who asked has gone
            self.close_connection = True

    def log_message(self, *_):
        pass


def brightness(image):
    return float(np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))).mean()) / 255


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
