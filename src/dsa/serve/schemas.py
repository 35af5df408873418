"""The requests as OpenAI has them. A field that is not here is refused by its name.

Where OpenAI has a feature that this server has not, its field may be there with the value that leaves it off.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

MOST_CHOICES = 8
MOST_STOPS = 4

Text = Annotated[str, Field(max_length=64 << 20)]
Temperature = Annotated[float | None, Field(ge=0, le=2)]
TopP = Annotated[float | None, Field(ge=0, le=1)]
Penalty = Annotated[float | None, Field(ge=-2, le=2)]
NewTokens = Annotated[StrictInt | None, Field(ge=1)]
Choices = Annotated[StrictInt | None, Field(ge=1, le=MOST_CHOICES)]
Seed = Annotated[StrictInt | None, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
Name = Annotated[str, Field(max_length=300)]


class Strict(BaseModel):
    """Refuses fields that it does not have."""

    model_config = ConfigDict(extra="forbid")


class Own(Strict):
    """What this server adds to OpenAI's requests.

    Args:
        sources: Tell where each sentence of the answer was read.
    """

    sources: bool = False


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class FileOf(Strict):
    """A file that was uploaded, or its content in base64, with or without `data:...;base64,` before it."""

    file_id: Name | None = None
    file_data: Text | None = None
    filename: Name | None = None


class FilePart(Strict):
    type: Literal["file"]
    file: FileOf


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Name | None = None


class UserMessage(Strict):
    role: Literal["user"]
    content: Text | Annotated[list[Annotated[TextPart | FilePart, Field(discriminator="type")]], Field(min_length=1)]
    name: Name | None = None


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Name | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    dsa: Any = None


class Labels(Strict):
    """What says something about a request and changes nothing of its answer."""

    model: Name
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    dsa: Own | None = None


class Writing(Labels):
    """How an answer is written."""

    temperature: Temperature = None
    top_p: TopP = None
    seed: Seed = None
    stop: Stop | None = None
    n: Choices = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class PlainFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class Schema(Strict):
    name: Name | None = None
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: Schema


class FlatSchemaFormat(Schema):
    type: Literal["json_schema"]


class ChatRequest(Writing):
    """`POST /v1/chat/completions`."""

    messages: Annotated[
        list[Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]],
        Field(min_length=1, max_length=10_000),
    ]
    max_tokens: NewTokens = None
    max_completion_tokens: NewTokens = None
    logprobs: bool | None = None
    top_logprobs: Annotated[StrictInt | None, Field(ge=0, le=20)] = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none"] | None = None
    response_format: Annotated[PlainFormat | ObjectFormat | SchemaFormat | None, Field(discriminator="type")] = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    store: Literal[False] | None = None
    verbosity: None = None
    web_search_options: None = None


class CompletionRequest(Writing):
    """`POST /v1/completions`."""

    prompt: Text | Annotated[list[StrictInt], Field(min_length=1)] | Annotated[list[Text], Field(max_length=1)]
    max_tokens: NewTokens = None
    logprobs: Annotated[StrictInt | None, Field(ge=0, le=5)] = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None


class InputText(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class InputFile(FileOf):
    type: Literal["input_file"]


class InputMessage(Strict):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Annotated[InputText | InputFile, Field(discriminator="type")]], Field(min_length=1)]
    id: Name | None = None
    status: Name | None = None
    phase: None = None


class ResponseTextFormat(Strict):
    format: Annotated[PlainFormat | ObjectFormat | FlatSchemaFormat | None, Field(discriminator="type")] = None
    verbosity: None = None


class ResponseRequest(Labels):
    """`POST /v1/responses`, of texts."""

    input: Text | Annotated[list[InputMessage], Field(min_length=1, max_length=10_000)]
    instructions: Text | None = None
    max_output_tokens: NewTokens = None
    temperature: Temperature = None
    top_p: TopP = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    include: Annotated[list[Any], Field(max_length=0)] | None = None
    max_tool_calls: None = None
    parallel_tool_calls: bool | None = None
    prompt: None = None
    reasoning: None = None
    text: ResponseTextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    top_logprobs: Literal[0] | None = None
    truncation: Literal["disabled"] | None = None


class TokenizeRequest(Strict):
    """`POST /tokenize`: of a text, or of a conversation as it would be read."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[
        list[Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]] | None,
        Field(min_length=1, max_length=10_000),
    ] = None
