"""Parameters come out of Megatron's format as they went in, by whatever rows; and nothing else is unpickled."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from minpro_megatron.checkpoints import sharded_files
from minpro_megatron.checkpoints.file_records import file_records, record_file
from minpro_megatron.checkpoints.sharded_files import (
    Place,
    ShardedReader,
    ShardedWriter,
    place,
    read_metadata,
    refuse_code,
)
from minpro_megatron.weights.table import entries
from tests.support.tiny_architecture import TINY

KEY = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
SHAPE = (6, 4)
LAYERS, EXPERTS = 2, 3


def where(layer: int, expert: int) -> Place:
    return Place(KEY, (layer, expert), (LAYERS, EXPERTS))


def parameters() -> dict[tuple[int, int], Tensor]:
    return {(layer, expert): torch.randn(SHAPE).bfloat16() for layer in range(LAYERS) for expert in range(EXPERTS)}


def written(folder: Path, tensors: dict[tuple[int, int], Tensor], pieces: Sequence[int] = (6,)) -> ShardedReader:
    with file_records(folder) as records:
        writer = ShardedWriter(folder, records)
        for (layer, expert), tensor in tensors.items():
            first = 0
            for rows in tensor.split(list(pieces)):
                writer.write(where(layer, expert), SHAPE, first, rows)
                first += len(rows)
        writer.finish()
    assert records.records() == {path.name: record_file(path) for path in folder.iterdir()}
    return ShardedReader(folder)


@pytest.mark.parametrize("pieces", [(6,), (3, 3), (1, 4, 1)], ids=str)
@pytest.mark.parametrize("file_bytes", [1, 1 << 30])
def test_any_rows_are_read_from_any_pieces(
    pieces: Sequence[int], file_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_files, "_FILE_BYTES", file_bytes)
    monkeypatch.setattr(sharded_files, "_CACHE_BYTES", 50)
    tensors = parameters()
    reader = written(tmp_path, tensors, pieces)
    assert len(list(tmp_path.glob("*.distcp"))) == 1 + (len(tensors) * len(pieces) if file_bytes == 1 else 1)
    for (layer, expert), tensor in tensors.items():
        for first, count in ((0, 6), (0, 2), (2, 3), (5, 1)):
            found = reader.read_rows(where(layer, expert), SHAPE, first, count)
            assert torch.equal(found, tensor[first : first + count])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_reader_finds_one_global_tensor(tmp_path: Path) -> None:
    tensors = parameters()
    written(tmp_path, tensors, (2, 4))
    state = {KEY: torch.empty(LAYERS, EXPERTS, *SHAPE, dtype=torch.bfloat16)}
    load(state, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(state[KEY], torch.stack(list(tensors.values())).view(LAYERS, EXPERTS, *SHAPE))


def test_every_linear_layer_has_its_extra_state_and_the_file_its_common_state(tmp_path: Path) -> None:
    written(tmp_path, parameters(), (2, 4))
    objects = {key for key in read_metadata(tmp_path).state_dict_metadata if key != KEY}
    states = {f"{KEY.removesuffix('weight')}_extra_state/shard_{i}.{j}_2.3" for i in range(2) for j in range(3)}
    assert objects == states | {"common_state/shard_0_1"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_chunk_of_several_layers_and_experts_is_read_too(tmp_path: Path) -> None:
    tensors = parameters()
    whole = torch.stack(list(tensors.values())).view(LAYERS, EXPERTS, *SHAPE)
    save({KEY: whole}, checkpoint_id=tmp_path / "whole", no_dist=True)
    reader = ShardedReader(tmp_path / "whole")
    assert torch.equal(reader.read_rows(where(1, 2), SHAPE, 1, 3), tensors[1, 2][1:4])


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    tensors = parameters()
    short = {key: tensor[:4] for key, tensor in tensors.items()}
    reader = written(tmp_path, short, (4,))
    with pytest.raises(ValueError, match=r"linear_fc1.weight \(1, 2\) is not complete; convert again"):
        reader.read_rows(where(1, 2), SHAPE, 3, 3)
    with pytest.raises(ValueError, match=r"there is no decoder.other.weight; convert again"):
        reader.check(Place("decoder.other.weight", (), ()), SHAPE, torch.bfloat16)
    for shape, dtype in ((SHAPE, torch.float32), ((7, 4), torch.bfloat16)):
        with pytest.raises(ValueError, match=r"is torch.bfloat16 \(2, 3, 6, 4\), but the manifest requires"):
            reader.check(where(0, 0), shape, dtype)
    reader.check(where(0, 0), SHAPE, torch.bfloat16)


class Harmful:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Harmful()), "it names builtins.print, which checkpoint metadata never contains; give a folder"),
        (pickle.dumps(torch.Size([1])), "this is not the metadata of a checkpoint"),
        (b"damaged", "give a folder made by `minpro convert`"),
        (None, "No such file"),
    ],
    ids=["harmful", "other", "damaged", "absent"],
)
def test_only_metadata_is_unpickled(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if content is not None:
        (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_parameter_s_place_is_its_layer_and_expert() -> None:
    places = {entry.megatron: place(entry, TINY) for entry in entries(TINY)}
    assert places["embedding.word_embeddings.weight"] == Place("embedding.word_embeddings.weight", (), ())
    assert places["decoder.layers.1.input_layernorm.weight"] == Place(
        "decoder.layers.input_layernorm.weight", (1,), (2,)
    )
    assert places["decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"] == where(1, 2)
    assert [place.state_object for name, place in places.items() if "layers.0" not in name and place.state_object][
        :3
    ] == [
        "decoder.layers.self_attention.linear_qkv._extra_state/shard_1_2",
        "decoder.layers.self_attention.linear_proj._extra_state/shard_1_2",
        "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_1.0_2.3",
    ]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_object_that_would_run_code_is_refused_before_torchs_reader_runs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, parameters())
    refuse_code(tmp_path)
    save_value = ShardedWriter._save
    monkeypatch.setattr(
        ShardedWriter, "_save", lambda self, value: save_value(self, Harmful() if value == [None] else value)
    )
    written(tmp_path, parameters())
    key = f"{KEY.removesuffix('weight')}_extra_state/shard_0.0_2.3"
    with pytest.raises(
        ValueError, match=rf"__0_0.distcp: the object '{key}' contains more than data, .*it names print"
    ):
        refuse_code(tmp_path)
    assert capsys.readouterr().out == ""
    # what makes the check necessary: the loader that megatron calls runs it
    load({key: None}, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert "unpickled" in capsys.readouterr().out


def test_objects_outside_of_the_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(ShardedWriter, "_object", _object_elsewhere)
    written(tmp_path / "inside", parameters())
    with pytest.raises(ValueError, match=r"'../secret' is not a file of this folder"):
        refuse_code(tmp_path / "inside")


def _object_elsewhere(self: ShardedWriter, key: str, stored: _StorageInfo) -> None:
    self._objects[key] = BytesStorageMetadata()
    self._stored[MetadataIndex(key)] = _StorageInfo("../secret", stored.offset, stored.length)
