"""The requests, as OpenAI's API has them. What is not done is refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator

Number = Annotated[float, Field(strict=False)]
PROMPTS = 16


class Request(BaseModel):
    """Fields that both endpoints share. Unknown fields are ignored, as OpenAI's servers do."""

    model_config = ConfigDict(extra="ignore")

    model: StrictStr | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[StrictInt, Field(ge=0)] = 0
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    stop: StrictStr | list[StrictStr] | None = Field(default=None)
    stream: StrictBool = False
    stream_options: dict[str, Any] | None = None
    n: StrictInt = 1
    logprobs: Any = None
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    logit_bias: Any = None

    @field_validator("n")
    @classmethod
    def one_choice(cls, value: int) -> int:
        if value != 1:
            raise ValueError("only n = 1 is done; send several requests, they are batched")
        return value

    @field_validator("logprobs", "presence_penalty", "frequency_penalty", "logit_bias")
    @classmethod
    def not_done(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not done by this server")
        return value

    @field_validator("stop")
    @classmethod
    def few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and (len(value) > 4 or any(len(stop) > 200 for stop in value)):
            raise ValueError("at most 4 stop strings of 200 characters")
        return value

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def with_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class Completion(Request):
    """POST /v1/completions: text or token ids, one prompt or several."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    echo: Literal[False] = False

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    @field_validator("prompt")
    @classmethod
    def few_prompts(cls, value: Any) -> Any:
        if isinstance(value, list) and value and not isinstance(value[0], int) and len(value) > PROMPTS:
            raise ValueError(f"at most {PROMPTS} prompts in one request")
        return value


class Message(BaseModel):
    """One message of a chat; `content` is text, or a list of text parts."""

    model_config = ConfigDict(extra="allow")

    role: StrictStr
    content: StrictStr | list[dict[str, Any]] | None = None

    @field_validator("content")
    @classmethod
    def text_only(cls, value: Any) -> Any:
        if isinstance(value, list):
            if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in value):
                raise ValueError("only parts of type text are taken")
            return "".join(part["text"] for part in value)
        return value


class Chat(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
