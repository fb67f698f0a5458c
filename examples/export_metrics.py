# SPDX-License-Identifier: Apache-2.0
"""Where kernels come from, on a /metrics page for Prometheus.

The library counts by itself (`flashinfer.events.counters`), so a collector that reads the counters at every scrape is
all it takes. A histogram of compile times by model shows what a callback is for.

    python examples/export_metrics.py [--port 8000] [--once]
"""

from __future__ import annotations

import argparse
import time
import urllib.request
from collections.abc import Iterator

import torch
from prometheus_client import REGISTRY, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily

import flashinfer
from flashinfer import events

COMPILE_SECONDS = Histogram(
    "flashinfer_compile_duration_seconds",
    "Time of a compile",
    ["model", "target"],
    buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)


class KernelCounters:
    def collect(self) -> Iterator[CounterMetricFamily]:
        for name, value in events.counters().items():
            yield CounterMetricFamily(f"flashinfer_{name}", "See flashinfer.events.counters", value=value)


def observe(event: events.Event) -> None:
    if event.kind == "compile":
        COMPILE_SECONDS.labels(event.model, event.target).observe(event.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    parser.add_argument("--once", action="store_true", help="print the page and end")
    args = parser.parse_args()

    REGISTRY.register(KernelCounters())
    events.subscribe(observe)
    server, _ = start_http_server(args.port, addr="127.0.0.1")

    with flashinfer.tag("demo"):  # the model whose kernels these are
        flashinfer.rmsnorm(torch.randn(4, 1000), torch.ones(1000))

    url = f"http://127.0.0.1:{server.server_port}/metrics"
    page = urllib.request.urlopen(url).read().decode()
    print("".join(line for line in page.splitlines(keepends=True) if line.startswith("flashinfer_")))
    print(f"served at {url}")
    while not args.once:
        time.sleep(60)


if __name__ == "__main__":
    main()
