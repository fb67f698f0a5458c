# SPDX-License-Identifier: Apache-2.0
"""An engine of vllm_compare.py: the process that vllm_worker.py runs in, asked and answered by lines of JSON."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).resolve().parent / "vllm_worker.py"


class Clock:
    budget = 3600.0
    begin = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self.begin

    def left(self) -> float:
        return self.budget - self.now()


clock = Clock()


class Failed(Exception):
    pass


@dataclass
class Engine:
    """A process with vLLM in it."""

    name: str
    options: dict[str, Any]  # of vllm.LLM
    environment: dict[str, str]
    logs: Path
    is_ours: bool
    ran: dict[str, Any] = field(default_factory=dict)
    was_asked: bool = False  # to start

    def launch(self) -> Engine:
        """Begin to import vLLM, without waiting for it."""
        read_end, write_end = os.pipe()
        self.log = self.logs / f"{self.name.replace(' ', '-')}.log"
        defaults = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where the model can be reached
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(WORKER), "--worker", str(write_end)],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True, pass_fds=(write_end,),
                env={**defaults, **os.environ, **self.environment}, start_new_session=True,
            )  # fmt: skip
        os.close(write_end)
        self.answers = os.fdopen(read_end)
        self._send({"do": "import"})
        return self

    def _send(self, asked: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()

    def answer(self, limit: float) -> dict[str, Any]:
        """Of what was asked last. Raises Failed."""
        ready, _, _ = select.select([self.answers], [], [], max(limit, 1))
        line = self.answers.readline() if ready else None
        if not line:
            tail = self.log.read_text(errors="replace").strip().splitlines()[-1:] or [""]
            why = f"no answer in {limit:.0f} s" if line is None else f"the process ended: {tail[0][:200]}"
            raise Failed(f"{self.name}: {why}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, do: str, limit: float = 300, **arguments: Any) -> dict[str, Any]:
        self._send({"do": do, **arguments})
        return self.answer(min(limit, clock.left()))

    def start(self) -> float:
        self.was_asked = True
        self.ran = self.ask("start", **self.options)
        return float(self.ran["seconds"])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
