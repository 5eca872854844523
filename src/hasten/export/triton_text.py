"""The model NAME of an exported repository: text in, text out, over the engines of NAME_tokens.

Streamed text never holds half a character, nor anything of a stop string or after one. Where a stop string
is met, the engine stops as well.

Runs in Triton's Python backend: neither torch nor transformers is there. Not here: the engine (`triton_tokens`).
"""

import uuid
from contextlib import aclosing
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]
from tokenizers import Tokenizer

from hasten.export import triton_link
from hasten.export.triton_messages import RequestOptions, text_tensor, value_of
from hasten.export.triton_model import StreamingModel
from hasten.request import Request
from hasten.serve.pieces import ContinuationText, RustDetokenizer


class TritonPythonModel(StreamingModel):
    """Tokenizing before the engine, and text from tokens after it."""

    async def load(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokens_model = self.parameter("tokens_model")

    async def close(self) -> None:
        """There is nothing to free."""

    async def answer(self, request: Any, sender: Any) -> Any:
        options = RequestOptions(request, prompt="text_input")
        is_streamed = options.flag("stream")
        prompt = value_of(pb_utils.get_input_tensor_by_name(request, "text_input"))
        text = "" if options.flag("exclude_input_in_output", default=True) else prompt
        sampling = options.sampling
        continuation = ContinuationText(0, sampling, RustDetokenizer(self._tokenizer))
        asked = Request(uuid.uuid4().hex, tuple(self._tokenizer.encode(prompt).ids), sampling)
        async with aclosing(triton_link.stream(self._tokens_model, asked)) as stream:
            async for events in stream:
                for event in events:
                    if continuation.finish_reason is None:
                        continuation.add(event)
                piece = continuation.take()
                text += piece.text if piece is not None else ""
                if continuation.finish_reason is not None:
                    break
                if is_streamed and text:
                    sender.send(pb_utils.InferenceResponse([text_tensor("text_output", text)]))
                    text = ""
        outputs = [text_tensor("text_output", text), text_tensor("finish_reason", str(continuation.finish_reason))]
        return pb_utils.InferenceResponse(outputs)
