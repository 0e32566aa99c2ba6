"""Prometheus metrics of the API, and its log: JSON lines without anything that clients wrote."""

import json
import logging
import time
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from yivl.inference.chat import GenerationState
from yivl.serve.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Metrics:
    """The metrics of one server."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        counter, histogram = partial(Counter, registry=self.registry), partial(Histogram, registry=self.registry)
        self.responses = counter("yivl_responses", "HTTP responses", ["path", "status"])
        self.prompt_tokens = counter("yivl_prompt_tokens", "Prompt tokens, image patches included")
        self.completion_tokens = counter("yivl_completion_tokens", "Generated tokens")
        self.first_token = histogram("yivl_first_token_seconds", "Time to first token")
        self.seconds = histogram("yivl_answer_seconds", "Time to the end of the answer")
        for name, about, value in (
            ("yivl_waiting", "Requests in the queue", lambda: scheduler.num_waiting),
            ("yivl_running", "Requests in the batch", lambda: scheduler.num_running),
        ):
            Gauge(name, about, registry=self.registry).set_function(value)

    def count(self, state: GenerationState) -> None:
        """Add a finished answer."""
        now = time.perf_counter()
        self.prompt_tokens.inc(len(state.keys))
        self.completion_tokens.inc(len(state.new_ids))
        self.first_token.observe((state.first_token_at or now) - state.start)
        self.seconds.observe(now - state.start)


def log(event: str, **fields: Any) -> None:
    """Log an event as one line of JSON."""
    logger.info("%s", json.dumps({"time": round(time.time(), 3), "event": event, **fields}))
