import json
import struct
from pathlib import Path
from typing import Any

import pytest

from hasten.artifact import inspect
from hasten.errors import HastenError, ModelNotFoundError, UnsupportedModelError, WeightsError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8,
    "max_position_embeddings": 32,
    "eos_token_id": 2,
}
TENSORS = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.norm.weight": (4,),
}


def safetensors(tensors: dict[str, tuple[int, ...]], fill: bytes = b"\1") -> bytes:
    """A bf16 safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        size = 2
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    return with_header(header, fill * offset)


def with_header(header: object, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "model.safetensors").write_bytes(safetensors(TENSORS))
    return model


def shard(folder: Path, **changes: Any) -> None:
    """Turns the folder's weights into two shards with an index."""
    (folder / "model.safetensors").unlink()
    names = list(TENSORS)
    for file, held in (("a.safetensors", names[:1]), ("b.safetensors", names[1:])):
        (folder / file).write_bytes(safetensors({name: TENSORS[name] for name in held}))
    weight_map = {name: "a.safetensors" if name == names[0] else "b.safetensors" for name in names} | changes
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_inspect_describes_the_model(folder: Path) -> None:
    model = inspect(folder)
    assert model.name == "tiny"
    assert model.architecture == "LlamaForCausalLM"
    assert model.num_parameters == 32 + 24 + 4
    assert model.weight_bytes == 2 * 60
    assert (model.vocab_size, model.max_context_tokens, model.eos_token_ids) == (8, 32, (2,))
    tensor = model.tensors["model.layers.0.mlp.up_proj.weight"]
    assert (tensor.dtype, tensor.shape, tensor.file) == ("BF16", (6, 4), "model.safetensors")
    with (folder / tensor.file).open("rb") as file:
        file.seek(tensor.offset)
        assert len(file.read(tensor.num_bytes)) == 48


def test_linear_parameters_count_a_tied_head_and_not_the_table(folder: Path) -> None:
    assert inspect(folder).linear_parameters == 24 + 32
    (folder / "model.safetensors").write_bytes(safetensors({**TENSORS, "lm_head.weight": (8, 4)}))
    assert inspect(folder).linear_parameters == 24 + 32


def test_generation_config_names_the_end_tokens(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert inspect(folder).eos_token_ids == (5, 6)


def test_revision_changes_with_config_and_with_weights_of_the_same_shape(folder: Path) -> None:
    first = inspect(folder).revision
    assert inspect(folder).revision == first
    (folder / "model.safetensors").write_bytes(safetensors(TENSORS, fill=b"\2"))
    second = inspect(folder).revision
    (folder / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": 3}))
    assert len({first, second, inspect(folder).revision}) == 3


def test_shards_are_read_together(folder: Path) -> None:
    single = inspect(folder)
    shard(folder)
    assert inspect(folder).num_parameters == single.num_parameters
    assert inspect(folder).tensors["model.norm.weight"].file == "b.safetensors"


def test_shards_without_an_index_are_read(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert set(inspect(folder).tensors) == set(TENSORS)


def test_links_to_files_elsewhere_are_followed_and_the_hub_cache_gives_the_name(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert inspect(snapshot).name == "org/name"
    assert inspect(snapshot).revision == inspect(folder).revision


def test_missing_folder_offers_near_names(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"there is no folder .*tinny: did you mean .*tiny\?"):
        inspect(folder.parent / "tinny")
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        inspect(folder.parent / "nowhere" / "at" / "all")


def test_file_instead_of_folder(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is a file: give the folder"):
        inspect(folder / "model.safetensors")


def test_folder_without_config_offers_the_model_inside(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config.json: did you mean .*tiny\?"):
        inspect(folder.parent)


def test_adapter_is_told_apart(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(ModelNotFoundError, match="only an adapter: merge"):
        inspect(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "config.json is not valid JSON"),
        (b"", "config.json is not valid JSON"),
        (b"\xff\xfe{}", "config.json is not valid JSON"),
        (b"[" * 200_000, "config.json is not valid JSON"),
        (b"[1]", "must hold a JSON object, found list"),
        (b"{}", "must name its class"),
        (b'{"architectures": []}', "must name its class"),
        (b'{"architectures": [3]}', "must name its class"),
    ],
)
def test_bad_config(folder: Path, text: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(UnsupportedModelError, match=message):
        inspect(folder)


@pytest.mark.parametrize("value", [None, "8", 0, -1, True, 2.5, [8]])
def test_config_with_an_impossible_size(folder: Path, value: object) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": value}))
    with pytest.raises(UnsupportedModelError, match="must have a positive integer vocab_size"):
        _ = inspect(folder).vocab_size


def test_config_that_is_a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(UnsupportedModelError, match="not a regular file"):
        inspect(folder)


def test_unreadable_files_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(HastenError, match=r"cannot read .*: Permission denied"):
        inspect(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "weights.pt"])
def test_other_formats_come_with_the_way_to_convert(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(WeightsError, match=f"only {name}: .*save_pretrained"):
        inspect(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no safetensors weights: download"):
        inspect(folder)


def test_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"1 of 2 weights files are missing, the first is b.safetensors"):
        inspect(folder)


@pytest.mark.parametrize(
    "name", ["../b.safetensors", "/etc/passwd", "sub/b.safetensors", "b.bin", "", 3, None, "..", "b\0"]
)
def test_index_must_name_weights_files_beside_it(folder: Path, name: object) -> None:
    shard(folder, **{"model.norm.weight": name})
    with pytest.raises(WeightsError, match=r"index.json names .*: allowed are \.safetensors files beside it"):
        inspect(folder)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_malformed_index(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=r"index\.json"):
        inspect(folder)


def test_index_that_disagrees_with_the_shards(folder: Path) -> None:
    shard(folder, **{"model.norm.weight": "a.safetensors"})
    with pytest.raises(WeightsError, match=r"model.norm.weight is in a.safetensors, but b.safetensors has it"):
        inspect(folder)
    shard_name = {"model.lost.weight": "a.safetensors"}
    (folder / "model.safetensors").touch()
    shard(folder, **shard_name)
    with pytest.raises(WeightsError, match=r"model.lost.weight is in a.safetensors, but no file has it"):
        inspect(folder)


def test_tensor_in_two_shards(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").write_bytes(safetensors(TENSORS))
    with pytest.raises(WeightsError, match=r"embed_tokens.weight is in both a.safetensors and b.safetensors"):
        inspect(folder)


def test_weights_without_tensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(with_header({}))
    with pytest.raises(WeightsError, match="hold no tensors"):
        inspect(folder)
