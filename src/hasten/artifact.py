"""A model folder, read without its weights: config.json and the safetensors headers.

Nothing is loaded before the folder is found whole, and whatever is wrong with it raises a
HastenError of one sentence. Whether config and tensors agree is for `models` to judge,
which knows the architecture; a hub id is turned into a folder by `hub`.
"""

import difflib
import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.errors import ModelNotFoundError, UnsupportedModelError, WeightsError
from hasten.safetensors_header import MAX_HEADER_BYTES, TensorInfo, read_weights_file

__all__ = ["ModelRef", "TensorInfo", "inspect", "near_folders"]

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelRef:
    """A model folder that was looked at and found whole.

    Args:
        name: the folder's name, or the id of a model from the hub's cache.
        revision: sha256 of config.json, the weight headers and three 64 KiB samples of each
            weights file, so that other weights of the same shape have another revision.
        architecture: the first entry of the config's `architectures`.
        config: config.json as it is.
        generation_config: generation_config.json as it is, {} where there is none.
        tensors: by name, in the order of the files.
    """

    path: Path
    name: str
    revision: str
    architecture: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_elements for tensor in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def linear_parameters(self) -> int:
        """Weights that one decode step reads: every matrix but the embedding table; a tied head counts."""
        matrices = {name: tensor for name, tensor in self.tensors.items() if len(tensor.shape) == 2}
        embeddings = {name for name in matrices if "embed" in name.removesuffix(".weight").rpartition(".")[2]}
        total = sum(tensor.num_elements for name, tensor in matrices.items() if name not in embeddings)
        has_head = any(name.endswith("lm_head.weight") for name in matrices)
        if not has_head and self.architecture.endswith("ForCausalLM"):
            total += max((matrices[name].num_elements for name in embeddings), default=0)
        return total

    @property
    def vocab_size(self) -> int:
        """Raises UnsupportedModelError if the config does not say."""
        return self._config_count("vocab_size")

    @property
    def max_context_tokens(self) -> int:
        """Raises UnsupportedModelError if the config does not say."""
        return self._config_count("max_position_embeddings")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: the generation config's, else the config's."""
        value = self.generation_config.get("eos_token_id", self.config.get("eos_token_id"))
        values = value if isinstance(value, list) else [value]
        return tuple(each for each in values if isinstance(each, int) and not isinstance(each, bool))

    def _config_count(self, key: str) -> int:
        value = self.config.get(key)
        if value is None and isinstance(self.config.get("text_config"), dict):
            value = self.config["text_config"].get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UnsupportedModelError(
                f"{self.path / 'config.json'} must have a positive integer {key}, found {reprlib.repr(value)}"
            )
        return value


def inspect(model: str | Path) -> ModelRef:
    """Reads what a model folder says about itself, and checks that its weights are whole.

    Raises:
        ModelNotFoundError: no such folder, or no model in it; near matches are offered.
        UnsupportedModelError: config.json is not a model's configuration.
        WeightsError: weights that are missing, truncated, mislabelled or contradictory.
    """
    path = Path(model).expanduser()
    if not path.exists():
        raise ModelNotFoundError(f"there is no folder {path}{near_folders(path)}")
    if not path.is_dir():
        raise ModelNotFoundError(f"{path} is a file: give the folder that holds config.json and the weights")
    path = path.resolve()
    config_path = path / "config.json"
    if not config_path.exists():
        raise ModelNotFoundError(f"{path} is not a model: it has no config.json{_where_instead(path)}")
    config = _read_json_object(config_path, UnsupportedModelError)
    generation_path = path / "generation_config.json"
    generation_config = _read_json_object(generation_path, UnsupportedModelError) if generation_path.exists() else {}
    tensors, digest = _read_weights(path, hashlib.sha256(_read_file(config_path, UnsupportedModelError)))
    return ModelRef(
        path=path,
        name=_model_name(path),
        revision=digest,
        architecture=_architecture(config, config_path),
        config=config,
        generation_config=generation_config,
        tensors=tensors,
    )


def _read_weights(path: Path, digest: "hashlib._Hash") -> tuple[dict[str, TensorInfo], str]:
    index_path = path / INDEX_NAME
    weight_map = _read_weight_map(index_path) if index_path.exists() else {}
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(path, weight_map):
        weights = read_weights_file(file)
        for name, tensor in weights.tensors.items():
            if name in tensors:
                raise WeightsError(f"{path}: tensor {name} is in both {tensors[name].file} and {file.name}")
            tensors[name] = tensor
        digest.update(weights.fingerprint)
    for name, file_name in weight_map.items():
        found = tensors[name].file if name in tensors else "no file"
        if found != file_name:
            raise WeightsError(f"{index_path} says that tensor {name} is in {file_name}, but {found} has it")
    if not tensors:
        raise WeightsError(f"{path}: the safetensors files hold no tensors")
    return tensors, digest.hexdigest()


def _read_weight_map(index_path: Path) -> dict[str, str]:
    weight_map = _read_json_object(index_path, WeightsError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index_path} has no weight_map object: download it again")
    for file_name in weight_map.values():
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w][\w.+-]*\.safetensors", file_name):
            raise WeightsError(
                f"{index_path} names {reprlib.repr(file_name)}: allowed are .safetensors files beside it"
            )
    return weight_map


def _weight_files(path: Path, weight_map: Mapping[str, str]) -> list[Path]:
    if weight_map:
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise WeightsError(
                f"{path}: {len(missing)} of {len(names)} weights files are missing, the first is {missing[0]}: "
                "download the model again"
            )
        return [path / name for name in names]
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files
    others = sorted(file for suffix in ("bin", "pt", "pth", "gguf", "h5") for file in path.glob(f"*.{suffix}"))
    if others:
        raise WeightsError(
            f"{path} has no safetensors weights, only {others[0].name}: load it in transformers and write it with "
            "model.save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise WeightsError(f"{path} has a config.json but no safetensors weights: download the model again")


def _read_file(path: Path, error_type: type[UnsupportedModelError] | type[WeightsError]) -> bytes:
    try:
        if path.is_file() and path.stat().st_size > MAX_HEADER_BYTES:
            raise error_type(f"{path} is larger than {MAX_HEADER_BYTES:,} bytes, so it is not what its name says")
        if not path.is_file():
            raise error_type(f"{path} is not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise error_type(f"cannot read {path}: {error.strerror}") from error


def _read_json_object(path: Path, error_type: type[UnsupportedModelError] | type[WeightsError]) -> dict[str, Any]:
    try:
        value = json.loads(_read_file(path, error_type))
    except (ValueError, RecursionError) as error:
        raise error_type(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise error_type(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def _architecture(config: Mapping[str, Any], config_path: Path) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UnsupportedModelError(
            f'{config_path} must name its class: "architectures": ["LlamaForCausalLM"], found {reprlib.repr(names)}'
        )
    return names[0]


def _model_name(path: Path) -> str:
    """The hub cache keeps models--ORG--NAME/snapshots/REVISION."""
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name


def near_folders(path: Path) -> str:
    """An ending for the message that a folder does not exist: ": did you mean X?", or nothing."""
    parent = path.parent
    try:
        names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    matches = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f": did you mean {' or '.join(str(parent / match) for match in matches)}?" if matches else ""


def _where_instead(path: Path) -> str:
    if (path / "adapter_config.json").exists():
        return ", only an adapter: merge it into its base model with peft's merge_and_unload() and save that"
    inner = sorted(
        file.parent for pattern in ("*/config.json", "snapshots/*/config.json") for file in path.glob(pattern)
    )
    return f": did you mean {inner[0]}?" if inner else ""
