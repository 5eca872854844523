"""What the OpenAI API's requests with messages may hold, as pydantic models: chats, and the tools they offer.

See `openai_models` for how values are checked.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from hasten.errors import RequestError
from hasten.request import Grammar
from hasten.serve.openai_models import INT32, OpenAIModel, SamplingFields, schema_grammar
from hasten.serve.tool_calls import FreeReader, NamedReader, ToolReader

MAX_TOOLS = 128

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class TextPart(OpenAIModel):
    type: Literal["text"]
    text: str


class CalledFunction(OpenAIModel):
    name: str
    arguments: str = Field(description="a JSON object")


class MessageToolCall(OpenAIModel):
    """A call that an earlier answer had."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """With the arguments as an object. Raises RequestError if they are none."""
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise RequestError(f"the arguments of the call {self.id!r} are no JSON object")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessage(OpenAIModel):
    """One message. Roles and their order are the chat template's to judge."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] = Field([], max_length=MAX_TOOLS, description="of an assistant's message")
    tool_call_id: str | None = Field(None, description="the call that a tool's message answers")

    @model_validator(mode="after")
    def _check_together(self) -> "ChatMessage":
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to messages of the role assistant")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: the parts of a text joined. Raises RequestError for calls without arguments."""
        content = self.content or ""
        message: dict[str, Any] = {
            "role": self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
        }
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message | {
            name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None
        }


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]


class ToolFunction(OpenAIModel):
    """What a model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] = Field({"type": "object"}, description="a JSON schema of the arguments")
    strict: bool = Field(False, description="arguments follow their schema where tool_choice demands a call")

    @model_validator(mode="after")
    def _check_object(self) -> "ToolFunction":
        if self.parameters.get("type", "object") != "object":
            raise ValueError("parameters must describe an object")
        return self

    @property
    def arguments_grammar(self) -> Grammar:
        """What a call's arguments must match. Raises RequestError for a schema that is nested too deeply."""
        return schema_grammar({"type": "object", **self.parameters})


class Tool(OpenAIModel):
    type: Literal["function"]
    function: ToolFunction

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class ChosenFunction(OpenAIModel):
    name: str


class ToolChoice(OpenAIModel):
    """The one tool that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class ChatCompletionRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: int | None = Field(None, ge=1, le=INT32, description="OpenAI's older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32, description="as many as fit if absent")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS, description="what the model may call")
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = Field(True, description="whether an answer may have several calls")
    chat_template_kwargs: dict[str, Any] = Field({}, max_length=32, description="variables of the chat template")

    @model_validator(mode="after")
    def _check_together(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set it to true")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools have the same name twice")
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is required and there are no tools")
        has_format = self.response_format is not None and self.response_format.type != "text"
        if self.offered_tools and (has_format or self.structured_outputs is not None):
            raise ValueError("tools cannot be called in the form that response_format or structured_outputs asks for")
        return self

    @property
    def offered_tools(self) -> list[Tool]:
        """Those that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def grammar(self) -> Grammar | None:
        if isinstance(self.tool_choice, ToolChoice):
            name = self.tool_choice.function.name
            return next(each.function.arguments_grammar for each in self.tools if each.function.name == name)
        if self.tool_choice == "required":
            return _calls_grammar(self.tools, is_one=not self.parallel_tool_calls)
        return super().grammar

    def tool_reader(self) -> ToolReader:
        """A fresh one, for one choice of an answer that may call tools, or must."""
        if isinstance(self.tool_choice, ToolChoice):
            return NamedReader(self.tool_choice.function.name)
        names = frozenset(tool.function.name for tool in self.offered_tools)
        return FreeReader(names, None if self.parallel_tool_calls else 1)


def _calls_grammar(tools: Sequence[Tool], *, is_one: bool) -> Grammar:
    """An array of calls, in llguidance's dialect of Lark, where each schema has a root of its own."""
    numbers = range(len(tools))
    rules = [
        'start: "[" call "]"' if is_one else 'start: "[" call (", " call)* "]"',
        f"call: {' | '.join(f'call{number}' for number in numbers)}",
    ]
    for number, tool in zip(numbers, tools, strict=True):
        head = json.dumps(f'{{"name": "{tool.function.name}", "arguments": ')
        rules.append(f'call{number}: {head} arguments{number} "}}"')
        rules.append(f"arguments{number}: %json {tool.function.arguments_grammar.text}")
    return Grammar("lark", "\n".join(rules))


class TokenizeRequest(OpenAIModel):
    """POST /tokenize: of a prompt, or of messages in the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = Field(True, description="of a prompt; a chat template has its own")
    add_generation_prompt: bool = True
    tools: list[Tool] = Field([], max_length=MAX_TOOLS, description="of messages")
    chat_template_kwargs: dict[str, Any] = Field({}, max_length=32, description="variables of the chat template")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_together(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages must be given, and not both")
        if self.messages is None and (self.tools or self.chat_template_kwargs):
            raise ValueError("tools and chat_template_kwargs belong to messages")
        return self
