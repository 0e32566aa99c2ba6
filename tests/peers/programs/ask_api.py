"""Ask the API with one client: python ask_api.py openai|litellm|langchain URL CASES RESULT.

Each case is asked whole and streamed, then followed up: three answers.
"""

import base64
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

KEY, MODEL = "secret", "yi-vl-tiny"
Ask = Callable[[list[dict[str, Any]]], tuple[str, str]]
"""Returns the answer to messages, asked whole and streamed."""


def openai_client(url: str) -> Ask:
    """Return how OpenAI's own client asks."""
    from openai import OpenAI

    create = OpenAI(base_url=url, api_key=KEY).chat.completions.create

    def ask(messages: list[dict[str, Any]]) -> tuple[str, str]:
        request: Any = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 64}
        whole = create(**request).choices[0].message.content
        pieces = [chunk.choices[0].delta.content or "" for chunk in create(**request, stream=True) if chunk.choices]
        return whole, "".join(pieces)

    return ask


def litellm_client(url: str) -> Ask:
    """Return how litellm asks."""
    import litellm

    def ask(messages: list[dict[str, Any]]) -> tuple[str, str]:
        request: Any = {"model": f"openai/{MODEL}", "api_base": url, "api_key": KEY, "messages": messages}
        request |= {"temperature": 0, "max_tokens": 64}
        whole = litellm.completion(**request).choices[0].message.content
        chunks = litellm.completion(**request, stream=True)
        return whole, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    return ask


def langchain_client(url: str) -> Ask:
    """Return how LangChain asks."""
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=MODEL, base_url=url, api_key=KEY, temperature=0, max_tokens=64)

    def ask(messages: list[dict[str, Any]]) -> tuple[str, str]:
        return str(model.invoke(messages).content), "".join(str(chunk.content) for chunk in model.stream(messages))

    return ask


CLIENTS = {
    "openai": (openai_client, "openai"),
    "litellm": (litellm_client, "litellm"),
    "langchain": (langchain_client, "langchain-openai"),
}


def main(name: str, url: str, cases: Path, result: Path) -> None:
    """Write three answers to each case."""
    client, package = CLIENTS[name]
    ask, answers = client(url), []
    for case in json.loads(cases.read_text(encoding="utf-8")):
        data = base64.b64encode(Path(case["image"]).read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": case["question"]}]}]
        whole, streamed = ask(messages)
        messages += [{"role": "assistant", "content": whole}, {"role": "user", "content": case["follow_up"]}]
        answers += [whole, streamed, ask(messages)[0]]
    result.write_text(json.dumps({"version": version(package), "answers": answers}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
