"""Requests and responses of the OpenAI-compatible API; unknown fields of a request are errors."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FinishReason = Literal["stop", "length"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, fields: Any) -> Any:
        """Drop fields that are ``null``: clients send it for what they do not set, and in answers they send back."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class TextPart(_Strict):
    """A text part."""

    type: Literal["text"]
    text: str


class ImageURL(_Strict):
    """The address of an image."""

    url: str = Field(description="data:image/...;base64,..., or an address whose host the server allows")
    detail: Literal["auto", "low", "high"] = Field("auto", description="no effect: a model has one resolution")


class ImagePart(_Strict):
    """An image part."""

    type: Literal["image_url"]
    image_url: ImageURL


Stop = Annotated[str, Field(max_length=256)]
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class _Message(_Strict):
    name: str | None = Field(None, description="no effect")


class SystemMessage(_Message):
    """The first message, in place of the default system message."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]


class UserMessage(_Message):
    """A question; its images come before its text in the prompt."""

    role: Literal["user"]
    content: str | list[Part]


class AssistantMessage(_Message):
    """An earlier answer."""

    role: Literal["assistant"]
    content: str | list[TextPart]


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="no effect")


class ResponseFormat(_Strict):
    """The only format: plain text."""

    type: Literal["text"]


class ChatRequest(_Strict):
    """Body of ``POST /v1/chat/completions``."""

    model: str
    messages: list[Message] = Field(min_length=1)
    # The defaults of the sampling parameters. Source: 01-ai/Yi, VL/openai_api.py.
    temperature: float = Field(0.9, ge=0, le=2, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(40, ge=0, description="0 is all tokens; not in OpenAI's API")
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = Field(None, description="no effect")


class AnswerMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One of ``n`` answers."""

    index: int
    message: AnswerMessage
    logprobs: None = None
    finish_reason: FinishReason


class Usage(BaseModel):
    """Token counts; each image patch counts as a prompt token."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The body of a response without streaming."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ModelCard(BaseModel):
    """The model of the server."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The list of that model."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The body of ``/health``."""

    status: Literal["ok"] = "ok"


class ErrorBody(BaseModel):
    """An error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of an error response."""

    error: ErrorBody
