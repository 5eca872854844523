"""The model NAME_tokens of an exported repository: tokens in, tokens out, over one engine process.

Each instance has an engine process of its own, which batches the requests of all clients in flight, those
of NAME among them (`triton_link`). Blocks of a request that is given up are free at once.

Runs in Triton's Python backend: neither torch nor transformers is there. Not here: text (`triton_text`).
"""

import os
import time
import uuid
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from hasten.errors import EngineUnavailableError, RequestError, RuntimeFailedError
from hasten.export import triton_link
from hasten.export.triton_messages import RequestOptions, text_tensor
from hasten.export.triton_metrics import EngineMetrics
from hasten.export.triton_model import StreamingModel
from hasten.request import Request
from hasten.runtimes.base import RuntimeConfig
from hasten.serve.engine_client import EngineClient


class TritonPythonModel(StreamingModel):
    """The engine as a model."""

    async def load(self, args: dict[str, str]) -> None:
        _choose_device(args)
        config = RuntimeConfig(
            model=Path(self.parameter("model")),
            scheme=self.parameter("scheme"),
            max_num_seqs=int(self.parameter("max_num_seqs")),
            max_model_tokens=int(self.parameter("max_model_tokens")),
            num_threads=int(self.parameter("num_threads")) or None,
            device=self.parameter("device"),
        )
        self._client = EngineClient(self.parameter("runtime"), config, python=self.parameter("python"))
        await self._client.start()
        self._metrics = EngineMetrics(self.instance, self._client)
        self._server = await triton_link.listen(self.name, self.instance, self._stream)

    async def close(self) -> None:
        triton_link.close(self._server)
        await self._client.close()

    async def answer(self, request: Any, sender: Any) -> Any:
        options = RequestOptions(request, prompt="input_ids")
        is_streamed = options.flag("stream")
        if options.sampling.stop:
            raise RequestError("stop strings need text: give stop_token_ids, or use the model that takes text")
        prompt = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy().reshape(-1).tolist()
        token_ids: list[int] = []
        async with aclosing(self._stream(Request(uuid.uuid4().hex, tuple(prompt), options.sampling))) as stream:
            async for events in stream:
                token_ids += [event.token_id for event in events if event.token_id is not None]
                if events[-1].finish_reason is not None:
                    break
                if is_streamed:
                    sender.send(pb_utils.InferenceResponse([_token_tensor(token_ids)]))
                    token_ids = []
        return pb_utils.InferenceResponse(
            [_token_tensor(token_ids), text_tensor("finish_reason", str(events[-1].finish_reason))]
        )

    async def _stream(self, request: Request) -> triton_link.EventStream:
        """The engine's events; raises what the engine gave up a request for."""
        arrival_s = time.perf_counter()
        is_first = True
        async with aclosing(self._client.stream(request)) as stream:
            async for events in stream:
                last = events[-1]
                if last.finish_reason == "error":
                    reason = last.error or "the engine gave up this request"
                    raise RuntimeFailedError(reason) if self._client.is_ready else EngineUnavailableError(reason)
                if is_first:
                    self._metrics.observe_first_token(time.perf_counter() - arrival_s)
                    is_first = False
                yield events


def _choose_device(args: dict[str, str]) -> None:
    """Lets the engine's process, which inherits this one's environment, see only its instance's GPU or MIG slice."""
    instance = args["model_instance_name"]
    if args["model_instance_kind"] == "GPU":
        os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
    elif instance.startswith("MIG-"):  # the instance group's name, with _NUMBER behind it if there are more
        os.environ["CUDA_VISIBLE_DEVICES"] = instance.partition("_")[0]


def _token_tensor(token_ids: list[int]) -> Any:
    return pb_utils.Tensor("output_ids", np.array(token_ids, np.int32))
