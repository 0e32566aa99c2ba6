"""Requests and responses of the OpenAI-style API, as far as it goes; whatever else a request holds is an error."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from yivl.inference.chat import FinishReason

# OpenAI has no word for an answer that was cut off because nobody waits for it.
FINISH_REASONS: dict[FinishReason, Literal["stop", "length"]] = {
    "stop": "stop",
    "length": "length",
    "cancelled": "length",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageURL(_Strict):
    """Where a picture is."""

    url: str = Field(description="data:image/...;base64,..., or an address where the server allows its host")
    detail: Literal["auto", "low", "high"] = Field("auto", description="without effect: Yi-VL has one resolution")


class ImagePart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL


Stop = Annotated[str, Field(max_length=256)]
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class SystemMessage(_Strict):
    """Replaces the system message of the release; only the first message can be one."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = Field(None, description="without effect")


class UserMessage(_Strict):
    """A question; its pictures are shown before its text, in their order."""

    role: Literal["user"]
    content: str | list[Part]
    name: str | None = Field(None, description="without effect")


class AssistantMessage(_Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, description="without effect")
    refusal: None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    """What a stream holds beside the answer."""

    include_usage: bool = False


class ResponseFormat(_Strict):
    """Only plain text."""

    type: Literal["text"]


class ChatRequest(_Strict):
    """Body of ``POST /v1/chat/completions``."""

    model: str
    messages: list[Message] = Field(min_length=1)
    temperature: float = Field(0.2, ge=0, le=2, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
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
    user: str | None = Field(None, description="without effect")

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, fields: Any) -> Any:
        """Some clients send ``null`` for what they do not set."""
        return (
            {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else fields
        )


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
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    """What a request took. Patches of pictures count as tokens, for they take a position each."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    """What a piece of a stream adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The same for one of ``n`` answers."""

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class Chunk(BaseModel):
    """A piece of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All of them: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """That the server is there."""

    status: Literal["ok"] = "ok"


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorBody
