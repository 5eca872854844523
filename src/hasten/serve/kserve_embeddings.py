"""The KServe models of an encoder: texts into vectors, and the token ids of one text into its vector."""

from collections.abc import AsyncIterator, Mapping
from functools import cached_property

from hasten.errors import RequestError
from hasten.serve.embedding_service import Embedding
from hasten.serve.kserve_fields import EmbedInference, EmbedTextInference, EmbedTokenInference, Spec
from hasten.serve.kserve_models import TOKENS_SUFFIX, KServeModel, KServeModels, Outputs
from hasten.serve.service import Service

EMBEDDING = "embedding"


class EmbeddingModel(KServeModel[EmbedInference]):
    """One of the two models."""

    is_decoupled = False

    @cached_property
    def outputs(self) -> Mapping[str, Spec]:
        """A row for each input. Raises EngineUnavailableError until the model is loaded, which tells a row's size."""
        self._service.check_ready()
        facts = self._service.client.facts.embedding
        assert facts is not None, "an encoder tells what its vectors are"
        return {EMBEDDING: Spec("FP32", (-1, facts.size))}

    async def open(self, inference: EmbedInference, *, is_stream: bool) -> "EmbeddingAnswer":
        if is_stream:
            raise RequestError(f"{self.name} gives embeddings and generates nothing to stream: use ModelInfer")
        self._service.check_ready()
        return EmbeddingAnswer(await Embedding.of(self._service, inference.prompt))


class EmbeddingAnswer:
    """The one response to a request."""

    def __init__(self, embedding: Embedding) -> None:
        self.work = embedding

    async def __aiter__(self) -> AsyncIterator[Outputs]:
        vectors = await self.work.vectors()
        yield {EMBEDDING: vectors.reshape(-1)}

    async def aclose(self) -> None:
        """Does nothing: the request has a place only while its vectors are waited for."""


def embedding_models(service: Service) -> KServeModels:
    """Both models of a service whose model is an encoder."""
    return KServeModels(
        service,
        EmbeddingModel(service, service.model_name, EmbedTextInference),
        EmbeddingModel(service, service.model_name + TOKENS_SUFFIX, EmbedTokenInference),
    )
