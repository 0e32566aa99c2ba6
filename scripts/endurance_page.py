"""Endurance of the web page: forged events, long questions, and visitors with long answers at the same time.

``endurance_requests.py`` runs it. The events are sent as a browser does, without gradio's client.
"""

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import httpx

TIMEOUT: Final = 120.0
"""Seconds after which an event counts as hung."""
SETTINGS: Final = [0, 0.7, 200, -1, "English"]
"""Temperature, top-p, tokens, seed and language of an answer; 200 tokens are a long answer of the golden checkpoint."""
QUESTIONS: Final = ("Tell me a story", "图片里有什么", "What is this?", "hello")

PAGE_ANSWERS: Final = "visitors of the page with long answers at the same time get their own"
PAGE_REFUSES: Final = "a forged event of the page is refused, without a 5xx"

Report = Callable[[str, bool, object], None]
"""Takes a promise, whether it held, and an example for the case that it did not."""


class Visitor:
    """A browser that has the page open.

    Args:
        url: Address of the page.
        number: Makes the session differ from those of other visitors.
    """

    def __init__(self, url: str, number: int) -> None:
        self._http = httpx.Client(base_url=f"{url}/gradio_api", timeout=TIMEOUT)
        self._session = f"visitor{number}"
        config = httpx.get(f"{url}/config", timeout=TIMEOUT).json()
        self.events = {str(event["api_name"]): int(event["id"]) for event in config["dependencies"]}

    def event(self, index: int, data: list[Any], event_data: Any = None) -> tuple[int, dict[str, Any]]:
        """Send an event; return the status of the response and the output.

        The stream is read to its end, as browsers do: gradio removes the events of a session that leaves it, and the
        next event may be one of them.
        """
        output: dict[str, Any] = {}
        body = {"fn_index": index, "session_hash": self._session, "data": data, "event_data": event_data}
        response = self._http.post("/queue/join", json=body)
        if response.is_error:
            return response.status_code, {}
        with self._http.stream("GET", "/queue/data", params={"session_hash": self._session}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: ") and '"process_completed"' in line:
                    output = json.loads(line.removeprefix("data: "))["output"]
        return 200, output

    def ask(self, question: str) -> str:
        """Ask a question without an image; return the conversation after the answer."""
        self.event(self.events["send"], [question, None, [], "English"])
        _, output = self.event(self.events["answer"], [None, *SETTINGS])
        return json.dumps(output.get("data", [output])[0], ensure_ascii=False)


def visit(url: str, num_rounds: int, end: float, report: Report) -> None:
    """Send forged events and long conversations to a page; no round begins after ``end`` but the first."""
    expected = {question: Visitor(url, number).ask(question) for number, question in enumerate(QUESTIONS)}
    chance = random.Random(0)
    for round_number in range(num_rounds):
        if round_number and time.monotonic() > end:
            break
        visitors = [Visitor(url, 100 * (round_number + 1) + number) for number in range(4)]
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(visitor.ask, QUESTIONS[index]) for index, visitor in enumerate(visitors[:3])]
            _forge(visitors[3], chance, report)
            for index, answer in enumerate(asked):
                answered = answer.result() == expected[QUESTIONS[index]] and "assistant" in answer.result()
                report(PAGE_ANSWERS, answered, answer.result()[-200:])


def _forge(visitor: Visitor, chance: random.Random, report: Report) -> None:
    """Send events that no page sends."""
    names = visitor.events
    for name, index, data in (
        ("an event that does not exist", chance.choice((999, -1)), []),
        ("an answer without a question", names["answer"], [None, *SETTINGS]),
        ("too few values", names["answer"], []),
        ("values of wrong types", names["answer"], [None, "x", None, [], {}, None]),
        ("a question that is a number", names["send"], [5, None, [], "English"]),
        ("a file that is a number", names["send"], ["hi", {"path": 5}, [], "English"]),
        ("a language of its own", names["send"], ["hi", None, [], "x"]),
        ("an edit of nothing", names["edit"], [[], "English"]),
        ("a question of 10 MB", names["send"], ["x" * 10_000_000, None, [], "English"]),
    ):
        status, output = visitor.event(index, data)
        is_refused = status in (400, 422) or "error" in output or output.get("data", [None])[0] == []
        report(
            PAGE_REFUSES, is_refused and output.get("error", "") is not None, f"{name}: {status} {str(output)[:200]}"
        )
