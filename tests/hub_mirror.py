"""A small stand-in for the Hugging Face Hub on 127.0.0.1, and a program that asks it for models.

Run as a program (``python hub_mirror.py MODEL_DIR SCENARIO``) it prints what ``llmtune.models.locate`` makes of each
answer, as JSON. It is a program of its own because ``huggingface_hub`` reads its environment once, at import.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What the Hub answers for a repository that is not served: status and error code.
REFUSALS = {
    "acme/gated": (401, "GatedRepo"),
    "acme/missing": (401, "RepoNotFound"),
    "acme/broken": (500, None),
    "acme/busy": (503, None),
    "acme/badtoken": (401, None),
    "acme/empty": (404, "EntryNotFound"),
}


class Mirror(BaseHTTPRequestHandler):
    """Serves one model directory as ``acme/tiny``, with the headers of the Hub."""

    model_dir: Path
    requests: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        self.requests.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        repo = "/".join(parts[:2])
        if repo in REFUSALS:
            self._refuse(*REFUSALS[repo])
        elif repo == "acme/notahub":
            self._send(200, {}, b"<html>please log in</html>", with_body)
        elif repo == "acme/moved" and parts[2] == "resolve":
            self._send(307, {"Location": "/" + "/".join(["acme", "tiny", *parts[2:]])}, b"", with_body)
        elif parts[:4] == ["api", "models", "acme", "tiny"]:  # listings; of folders that the repository does not have
            self._refuse(404, "EntryNotFound")
        elif repo == "acme/tiny" and parts[2] == "resolve":
            self._file(parts[3], "/".join(parts[4:]), with_body)
        else:
            self._refuse(404, "RepoNotFound")

    def _file(self, revision: str, name: str, with_body: bool) -> None:
        if revision not in ("main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif not (self.model_dir / name).is_file():
            self._refuse(404, "EntryNotFound")
        else:
            body = (self.model_dir / name).read_bytes()
            self._send(200, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body, with_body)

    def _refuse(self, status: int, code: str | None) -> None:
        headers = {"X-Error-Code": code} if code else {}
        if self.path.startswith("/acme/badtoken"):
            headers["X-Error-Message"] = "Invalid credentials in Authorization header"
        if code in ("EntryNotFound", "RevisionNotFound"):
            headers["X-Repo-Commit"] = COMMIT
        self._send(status, headers, b"", True)

    def _send(self, status: int, headers: dict[str, str], body: bytes, with_body: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.command == "GET":
            self.wfile.write(body)


def ask(model_id: str, *, load: bool = False, **settings: Any) -> dict[str, Any]:
    """What became of ``locate``, and of loading tokenizer and weights after it."""
    from llmtune.config import ModelConfig
    from llmtune.errors import ModelError
    from llmtune.models import load_for_training, load_tokenizer, locate

    Mirror.requests.clear()
    started = time.monotonic()
    try:
        location = locate(ModelConfig(id=model_id, **settings))
    except ModelError as error:
        return {"error": str(error), "seconds": time.monotonic() - started, "requests": list(Mirror.requests)}
    found = {"revision": location.revision, "offline": location.offline}
    if load:
        tokenizer = load_tokenizer(location)
        plan = {"precision": "fp32", "method": "lora", "quantization": None, "rank": 2, "alpha": 4, "dropout": 0.0}
        model = load_for_training(location, **plan, targets=("all-linear",), device="cpu")
        found |= {"eos": tokenizer.eos_token_id, "parameters": sum(p.numel() for p in model.parameters())}
    return found | {"seconds": time.monotonic() - started, "requests": list(Mirror.requests)}


def main(model_dir: str, scenario: str) -> None:
    if scenario == "offline":
        answers = {"cached": ask("acme/tiny", load=True), "not cached": ask("acme/other")}
        sys.stdout.write(json.dumps(answers))
        return
    Mirror.model_dir = Path(model_dir)
    server = ThreadingHTTPServer(("127.0.0.1", int(os.environ["HF_ENDPOINT"].rsplit(":", 1)[1])), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    answers = {"tiny": ask("acme/tiny", load=True), "again": ask("acme/tiny", load=True)}
    answers |= {name.split("/")[1]: ask(name) for name in [*REFUSALS, "acme/notahub", "acme/moved"]}
    answers["gated with token"] = ask("acme/gated", token="hf_secret")
    answers["tag"] = ask("acme/tiny", revision="v1")
    answers["no revision"] = ask("acme/tiny", revision="v9")
    answers["no id"] = ask("acme/ti ny")
    REFUSALS["acme/tiny"] = (503, None)
    answers["busy but cached"] = ask("acme/tiny", load=True)
    REFUSALS["acme/tiny"] = (401, "GatedRepo")
    answers["gated but cached"] = ask("acme/tiny")
    server.shutdown()
    server.server_close()
    answers["unreachable"] = ask("acme/other")
    answers["unreachable but cached"] = ask("acme/tiny", load=True)
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
