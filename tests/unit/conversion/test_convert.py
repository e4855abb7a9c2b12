"""Conversion there and back gives the same files, piece by piece, or leaves nothing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minpro_megatron.checkpoints.file_records import record_file
from minpro_megatron.checkpoints.sharded_files import ShardedWriter
from minpro_megatron.conversion import convert
from minpro_megatron.conversion.convert import to_hf, to_megatron
from minpro_megatron.files.replacement import LIST_OF_FILES, begin_folder
from minpro_megatron.models.text_files import other_files
from minpro_megatron.models.weight_files import weight_problem
from tests.support.hf_models import MIXTURE, Watch, assert_same_files, make_model, read_tensors, write_tensors

DENSE = {**MIXTURE, "architectures": ["Qwen3ForCausalLM"], "intermediate_size": 12}
TIED = {**DENSE, "tie_word_embeddings": True}
CONFIGS = {"mixture": MIXTURE, "dense": DENSE, "tied": TIED}


@pytest.mark.parametrize("piece_bytes", [100, 16 << 20])  # 3 rows of 8 float32; everything
@pytest.mark.parametrize(
    ("kind", "dtype", "num_files"),
    [("mixture", torch.bfloat16, 3), ("dense", torch.float32, 1), ("tied", torch.bfloat16, 1)],
    ids=["mixture", "dense", "tied"],
)
def test_the_files_come_back_byte_for_byte(
    kind: str, dtype: torch.dtype, num_files: int, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "PIECE_BYTES", piece_bytes)
    hf = make_model(tmp_path / "hf", CONFIGS[kind], dtype, num_files)
    watch = Watch()
    to_megatron(hf, tmp_path / "megatron", watch, verify=True)
    assert {what: done[0] == done[1] > 0 for what, done in watch.jobs.items()} == {"writing": True, "verifying": True}
    to_hf(tmp_path / "megatron", tmp_path / "back", watch, verify=True)
    assert all(total == done > 0 for total, done in watch.jobs.values())
    assert_same_files(tmp_path / "back", hf)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "megatron"]


def test_an_index_of_one_file_comes_back_too(tmp_path: Path) -> None:
    hf = make_model(tmp_path / "hf", DENSE)
    name = "model-00001-of-00001.safetensors"
    index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(read_tensors(hf), name)}
    index["metadata"]["total_size"] = sum(tensor.nbytes for tensor in read_tensors(hf).values())
    (hf / "model.safetensors").rename(hf / name)
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    to_megatron(hf, tmp_path / "megatron", Watch())
    to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), verify=True)
    assert_same_files(tmp_path / "back", hf)


def test_no_piece_is_larger_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "PIECE_BYTES", 200)
    hf, sizes = make_model(tmp_path / "hf", MIXTURE, torch.float32), []
    write = ShardedWriter.write
    monkeypatch.setattr(ShardedWriter, "write", lambda *args: sizes.append(args[-1].nbytes) or write(*args))
    to_megatron(hf, tmp_path / "megatron", Watch())
    assert 100 <= max(sizes) <= 200


def test_the_checksums_are_those_of_the_files(tmp_path: Path) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE, num_files=2)
    to_megatron(hf, tmp_path / "megatron", Watch())
    to_hf(tmp_path / "megatron", tmp_path / "back", Watch())
    for line in (tmp_path / "back" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert record_file(tmp_path / "back" / name).sha256 == digest
    listed = json.loads((tmp_path / "megatron" / "manifest.json").read_text())["files"]
    there = {str(p.relative_to(tmp_path / "megatron")) for p in (tmp_path / "megatron").rglob("*") if p.is_file()}
    assert set(listed) == there - {"manifest.json", LIST_OF_FILES}


def test_a_reference_gives_the_texts_and_the_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE)
    to_megatron(hf, tmp_path / "megatron", Watch())
    reference = make_model(tmp_path / "reference", MIXTURE, num_files=2)
    (reference / "tokenizer.json").write_text("another tokenizer")
    to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), reference)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "another tokenizer"
    files = {path.name for path in tmp_path.glob("back/*.safetensors")}
    assert files == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    # without weights: files of a size of our own
    for path in reference.glob("model*"):
        path.unlink()
    monkeypatch.setattr(convert, "SHARD_BYTES", 2000)
    to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), reference, verify=True)
    sizes: dict[str, int] = {}
    reader = convert.HfReader(tmp_path / "back")
    for name, tensor in reader.tensors.items():
        sizes[tensor.file] = sizes.get(tensor.file, 0) + reader.read(name).nbytes
    assert sorted(sizes) == [f"model-{i + 1:05d}-of-{len(sizes):05d}.safetensors" for i in range(len(sizes))]
    assert len(sizes) > 2
    assert max(sizes.values()) <= 2000


def test_a_tied_model_may_state_its_output_layer_again(tmp_path: Path) -> None:
    hf = make_model(tmp_path / "hf", TIED)
    tensors = read_tensors(hf)
    write_tensors(hf, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    to_megatron(hf, tmp_path / "megatron", Watch(), verify=True)
    to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), verify=True)
    assert_same_files(tmp_path / "back", hf)
    write_tensors(hf, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 0})
    with pytest.raises(ValueError, match=r"tie_word_embeddings, but lm_head.weight differs from model.embed_tokens"):
        to_megatron(hf, tmp_path / "other", Watch())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 tensors are missing for Qwen3Moe.*: model.norm.weight; does"),
        (lambda t: t.update(extra=torch.zeros(1)), r"1 tensors are not in the table of Qwen3Moe.*: extra; does"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(9)}),
            r"model.norm.weight: shape \(9,\), .* requires \(8,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(8)}),
            r"norm.weight is torch.float32 and model.*; give --dtype bfloat16",
        ),
        (
            lambda t: t.update(
                {
                    "model.norm.weight": torch.zeros(8).to(torch.float8_e4m3fn),
                    "model.norm.weight_scale_inv": torch.zeros(1),
                }
            ),
            r"model.norm.weight is F8_E4M3: these are quantized or unknown weights; use the release in bfloat16",
        ),
        (
            lambda t: t.update({name: x.half() for name, x in t.items()}),
            r"embed_tokens.weight is F16, .*; give --dtype bfloat16",
        ),
    ],
    ids=["missing", "extra", "shape", "mixed", "float8", "float16"],
)
def test_weights_that_would_not_come_through_are_refused(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE)
    tensors = read_tensors(hf)
    change(tensors)
    write_tensors(hf, tensors)
    with pytest.raises(ValueError, match=message):
        to_megatron(hf, tmp_path / "megatron", Watch())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def fused_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layout of save_pretrained(save_original_format=False) in transformers 5."""
    fused = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in range(MIXTURE["num_hidden_layers"]):
        experts = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: [tensors[f"{experts}.{expert}.{part}.weight"] for expert in range(MIXTURE["num_experts"])]
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        pairs = zip(parts["gate_proj"], parts["up_proj"], strict=True)
        fused[f"{experts}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        fused[f"{experts}.down_proj"] = torch.stack(parts["down_proj"])
    return fused


@pytest.mark.parametrize("piece_bytes", [200, 16 << 20])
@pytest.mark.parametrize("num_files", [1, 3])
def test_fused_experts_become_those_of_the_original_format(
    num_files: int, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = make_model(tmp_path / "original", MIXTURE)
    fused = make_model(tmp_path / "fused", MIXTURE, num_files=1)
    (fused / "model.safetensors").unlink()
    write_tensors(fused, fused_experts(read_tensors(original)), num_files)
    monkeypatch.setattr(convert, "PIECE_BYTES", piece_bytes)
    to_megatron(fused, tmp_path / "megatron", Watch(), verify=True)
    to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), verify=True)
    found, expected = read_tensors(tmp_path / "back"), read_tensors(original)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.int16), expected[name].view(torch.int16)) for name in expected)
    assert "fused into one tensor" in weight_problem(fused)
    assert weight_problem(fused, for_servers=False) == weight_problem(tmp_path / "back") == ""


@pytest.mark.parametrize("kind", ["float32 router", "float32 norms", "float16", "float64 head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_several_dtypes_are_cast_where_that_is_asked_for(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE)
    tensors = {name: torch.randn(tensor.shape).bfloat16() for name, tensor in read_tensors(hf).items()}
    for name, tensor in tensors.items():
        if kind == "float16":
            tensors[name] = torch.randn(tensor.shape).half()
        elif kind == "float64 head" and name == "lm_head.weight":
            tensors[name] = torch.randn(tensor.shape).double()
        elif (kind == "float32 router" and "mlp.gate" in name) or (kind == "float32 norms" and "norm" in name):
            tensors[name] = torch.randn(tensor.shape)
    write_tensors(hf, tensors)
    with pytest.raises(ValueError, match="give --dtype bfloat16 or --dtype float32 to cast every tensor"):
        to_megatron(hf, tmp_path / "megatron", Watch())
    watch = Watch()
    to_megatron(hf, tmp_path / "megatron", watch, verify=True, cast_to=dtype)
    assert all(total == done > 0 for total, done in watch.jobs.values())
    to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), verify=True)
    found = read_tensors(tmp_path / "back")
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in tensors.items())


def test_the_index_comes_back_as_transformers_5_writes_it(tmp_path: Path) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE, num_files=2)
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["metadata"] = {"total_parameters": 2448, "total_size": index["metadata"]["total_size"]}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    to_megatron(hf, tmp_path / "megatron", Watch())
    to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), verify=True)
    expected = {str(path.relative_to(hf)): path.read_bytes() for path in hf.rglob("*") if path.is_file()}
    back = tmp_path / "back"
    found = {str(path.relative_to(back)): path.read_bytes() for path in back.rglob("*") if path.is_file()}
    assert found.keys() - expected.keys() == {"SHA256SUMS", LIST_OF_FILES}
    assert {name: found[name] for name in expected} == expected


def test_what_a_conversion_leaves_out_is_named(tmp_path: Path) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE, num_files=2)
    for name in ("README.md", "LICENSE", ".gitattributes", "additional_chat_templates/a.jinja", "figures/loss.png"):
        (hf / name).parent.mkdir(exist_ok=True)
        (hf / name).touch()
    assert other_files(hf) == ["LICENSE", "README.md", "figures"]


def test_a_conversion_that_breaks_off_leaves_the_earlier_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE)
    to_megatron(hf, tmp_path / "megatron", Watch())
    before = (tmp_path / "megatron" / "manifest.json").read_text()
    (begin_folder(tmp_path / "megatron") / "left_over").touch()  # of a conversion that was killed

    def disk_full(*_: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardedWriter, "write", disk_full)
        with pytest.raises(OSError, match="No space left"):
            to_megatron(hf, tmp_path / "megatron", Watch())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]
    assert (tmp_path / "megatron" / "manifest.json").read_text() == before
    to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), verify=True)


def test_a_flipped_bit_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE)
    write = ShardedWriter.write

    def flip(self: ShardedWriter, where: Any, shape: Any, first: int, rows: Tensor) -> None:
        if where.key == "decoder.final_layernorm.weight":
            rows = (rows.view(torch.int16) ^ 1).view(rows.dtype)
        write(self, where, shape, first, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ShardedWriter, "write", flip)
        with pytest.raises(ValueError, match=r"model.norm.weight: rows 0 to 8 differ between the two formats"):
            to_megatron(hf, tmp_path / "megatron", Watch(), verify=True)
    assert not (tmp_path / "megatron").exists()
    to_megatron(hf, tmp_path / "megatron", Watch())
    data = tmp_path / "megatron" / "__0_1.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(ValueError, match=r"__0_1.distcp: its SHA-256 is not the one in manifest.json; convert again"):
        to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), verify=True)


def test_folders_of_something_else_and_full_disks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE)
    to_megatron(hf, tmp_path / "megatron", Watch())
    with pytest.raises(ValueError, match=r"did not write there \(config.json, .*\), so it is not replaced"):
        to_megatron(hf, hf, Watch())
    with pytest.raises(ValueError, match=r"did not write there \(config.json, .*\), so it is not replaced"):
        to_hf(tmp_path / "megatron", hf, Watch())
    (tmp_path / "megatron" / "hf" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"hf: there is no config.json; give --hf-reference"):
        to_hf(tmp_path / "megatron", tmp_path / "back", Watch())
    other = make_model(tmp_path / "other", {**MIXTURE, "num_experts": 4})
    with pytest.raises(
        ValueError, match=r"num_experts = 3, but the Hugging Face config.json says 4; convert that model"
    ):
        to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), other)
    monkeypatch.setattr(convert, "free_bytes", lambda _: 10)
    with pytest.raises(ValueError, match=r"--output = .*/again: 0.0 kB free on .*, \d+\.\d kB needed; free some space"):
        to_megatron(hf, tmp_path / "again", Watch())


def test_a_tokenizer_and_all_tensors_are_kept_in_the_folder(tmp_path: Path) -> None:
    hf = make_model(tmp_path / "hf", DENSE)
    to_megatron(hf, tmp_path / "megatron", Watch())
    kept = {path.name for path in (tmp_path / "megatron" / "hf").iterdir()}
    assert kept == {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    total = sum(math.prod(tensor.shape) * 2 for tensor in read_tensors(hf).values())
    index = json.loads((tmp_path / "megatron" / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
