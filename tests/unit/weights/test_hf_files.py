"""Hugging Face folders are written whole or not at all, and read from safetensors only."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minpro_megatron.files.replacement import LIST_OF_FILES
from minpro_megatron.weights import hf_files
from minpro_megatron.weights.hf_files import HfReader, dtype_name, write_hf

TENSORS = {f"model.layers.{index}.weight": torch.randn(8, index + 1) for index in range(6)}


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """A model folder whose weights and index must not be taken over."""
    folder = tmp_path / "reference"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "tokenizer.model"):
        (folder / name).write_text(f"this is {name}")
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json", "old.safetensors", "old.bin"):
        (folder / name).write_text("stale")
    return folder


def assert_reads_back(folder: Path) -> None:
    reader = HfReader(folder)
    assert sorted(reader.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name), tensor)


def test_a_small_model_is_one_file_with_the_references_texts(reference: Path, tmp_path: Path) -> None:
    write_hf(TENSORS.items(), reference, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        LIST_OF_FILES,
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert (tmp_path / "out" / "config.json").read_text() == "this is config.json"
    assert_reads_back(tmp_path / "out")


def test_others_may_read_the_weights(reference: Path, tmp_path: Path) -> None:
    write_hf(TENSORS.items(), reference, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_large_model_is_cut_into_files_no_larger_than_asked(reference: Path, tmp_path: Path) -> None:
    announced: list[int] = []
    write_hf(TENSORS.items(), reference, tmp_path / "out", shard_bytes=350, announce=announced.append)
    assert announced == [tensor.nbytes for tensor in TENSORS.values()] == [32, 64, 96, 128, 160, 192]
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    held = [load_file(file) for file in files]
    assert [sum(tensor.nbytes for tensor in tensors.values()) for tensors in held] == [320, 160, 192]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(announced)
    for file, tensors in zip(files, held, strict=True):
        assert all(index["weight_map"][name] == file.name for name in tensors)
    assert_reads_back(tmp_path / "out")


def test_a_tensor_larger_than_a_file_gets_its_own(reference: Path, tmp_path: Path) -> None:
    write_hf(TENSORS.items(), reference, tmp_path / "out", shard_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(TENSORS)
    assert_reads_back(tmp_path / "out")


def test_views_and_parameters_are_written_as_they_look(reference: Path, tmp_path: Path) -> None:
    whole = torch.nn.Parameter(torch.arange(24.0).reshape(4, 6))
    write_hf([("gate", whole[:2]), ("up", whole[2:]), ("columns", whole.t())], reference, tmp_path / "out")
    reader = HfReader(tmp_path / "out")
    for name, expected in (("gate", whole[:2]), ("up", whole[2:]), ("columns", whole.t())):
        assert torch.equal(reader.read(name), expected.detach())


def test_a_write_that_fails_leaves_the_earlier_folder_as_it_was(reference: Path, tmp_path: Path) -> None:
    def breaks_off() -> Iterator[tuple[str, Tensor]]:
        yield "model.layers.0.weight", torch.zeros(4)
        raise RuntimeError("disk full")

    output = tmp_path / "out"
    with pytest.raises(RuntimeError, match="disk full"):
        write_hf(breaks_off(), reference, output)
    assert not output.exists()
    write_hf(TENSORS.items(), reference, output)
    with pytest.raises(RuntimeError, match="disk full"):
        write_hf(breaks_off(), reference, output)
    assert_reads_back(output)


def test_an_earlier_folder_is_replaced_whole(reference: Path, tmp_path: Path) -> None:
    write_hf(TENSORS.items(), reference, tmp_path / "out", shard_bytes=300)
    write_hf(TENSORS.items(), reference, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "reference"]


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"neither model.safetensors nor .*; pickled weights are refused"):
        HfReader(tmp_path)


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"there is no tensor 'b'; does config.json belong to these weights\?"):
        HfReader(tmp_path).read("b")


def test_dtype_names_are_hugging_faces() -> None:
    assert [dtype_name(d) for d in (torch.float32, torch.bfloat16)] == ["float32", "bfloat16"]


def write_sharded(folder: Path) -> Path:
    for number, name in enumerate(("a", "b"), start=1):
        save_file({name: torch.arange(24.0).reshape(12, 2) + number}, folder / f"{name}.safetensors")
    set_index(folder, {"a": "a.safetensors", "b": "b.safetensors"})
    return folder


def set_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_rows_of_a_tensor_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_files, "_MAPPED_BYTES", 20)  # mapped again for almost every read
    reader = HfReader(write_sharded(tmp_path))
    assert reader.names() == ["a", "b"]
    for first, count in ((0, 12), (0, 5), (5, 7), (11, 1)):
        for name in ("a", "b"):
            assert torch.equal(reader.read_rows(name, first, count), reader.read(name)[first : first + count])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "a.safetensors", "b": "a.safetensors"}, "index.json: b is not in a.safetensors; download"),
        ({"a": "c.safetensors"}, "c.safetensors: .*[Nn]o such file.*; download the folder again"),
        ({"a": "../a.safetensors"}, "'../a.safetensors' is not the name of a safetensors file in the same folder"),
        ({"a": "pytorch_model.bin"}, "'pytorch_model.bin' is not .*; pickles are refused"),
        (None, "it has no weight_map; download the folder again"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(weight_map: object, message: str, tmp_path: Path) -> None:
    set_index(write_sharded(tmp_path), weight_map)
    with pytest.raises(ValueError, match=message):
        HfReader(tmp_path)


def test_numbered_files_without_their_index_are_refused(tmp_path: Path) -> None:
    set_index(write_sharded(tmp_path), {})
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(
        ValueError, match=r"there are 2 files such as a.safetensors, but no model.safetensors.index.json"
    ):
        HfReader(tmp_path)


def test_two_sets_of_weights_are_refused_and_both_are_named(tmp_path: Path) -> None:
    both = write_sharded(tmp_path)
    save_file(TENSORS, both / "model.safetensors")
    match = r"two sets of weights, model.safetensors and the files that model.safetensors.index.json names"
    with pytest.raises(ValueError, match=match):
        HfReader(both)
    (both / "model.safetensors.index.json").unlink()
    (both / "a.safetensors").rename(both / "model-00001-of-00002.safetensors")
    with pytest.raises(
        ValueError, match=r"two sets of weights, model.safetensors and model-00001-of-00002.safetensors"
    ):
        HfReader(both)


def test_a_single_file_that_the_index_names_is_one_set(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    set_index(tmp_path, dict.fromkeys(TENSORS, "model.safetensors"))
    assert sorted(HfReader(tmp_path).names()) == sorted(TENSORS)


def test_a_git_lfs_pointer_is_named_as_one(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 900\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match=r"model.safetensors: this is a Git LFS pointer .*; run 'git lfs pull' there"):
        HfReader(tmp_path)


def test_an_impossible_number_of_fused_experts_makes_no_names(tmp_path: Path) -> None:
    save_file({"model.layers.0.mlp.experts.down_proj": torch.zeros(100_000, 0, 1)}, tmp_path / "model.safetensors")
    assert HfReader(tmp_path).names() == ["model.layers.0.mlp.experts.down_proj"]


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    file = write_sharded(tmp_path) / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"b.safetensors: .*; download the folder again"):
        HfReader(tmp_path)
