"""Calibration against transformers with hooks on a whole model, and its input files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import random_model
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.diagnostics import InputError, SourceError
from trtqwen.hf.source import HfModel
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.quantize.calibrate import MAX_TOKENS, activation_ranges, calibrate
from trtqwen.quantize.ranges import LINEARS, read_ranges, write_ranges
from trtqwen.quantize.texts import CALIBRATION, read_texts, tokenize
from trtqwen.recipe import CheckpointRecipe

GOLDEN = Path(__file__).parent.parent / "golden" / "g09_sq_pertensor_fp16_tp1"


def hooked_ranges(model: torch.nn.Module, samples: list[list[int]]) -> dict[str, torch.Tensor]:
    """max |input| and max |output| of every linear layer over a whole model's forward passes."""
    largest: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            for side, tensor in (("x", inputs[0]), ("y", output)):
                seen = tensor.detach().abs().flatten(0, -2).amax(0).float()
                largest[f"{name}.{side}"] = torch.maximum(seen, largest.get(f"{name}.{side}", seen))

        return note

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(hook(name))
    with torch.inference_mode():
        for sample in samples:
            model(torch.tensor([sample]))
    return largest


def test_layer_by_layer_is_the_whole_model(hf_directory: Callable[..., Path]) -> None:
    directory = hf_directory(num_hidden_layers=3, dtype=torch.float16)
    samples = [[int(i) for i in np.random.default_rng(n).integers(0, 515, 4 + 9 * n)] for n in range(5)]
    layers: list[int] = []
    ranges = calibrate(HfModel(directory), samples, layers.append)
    expected = hooked_ranges(random_model(num_hidden_layers=3, dtype=torch.float16).float(), samples)
    assert layers == [1, 1, 1]
    assert set(ranges) == {name.rpartition(".")[0] for name in expected}
    for name, values in expected.items():
        module, _, side = name.rpartition(".")
        ours = getattr(ranges[module], side)
        np.testing.assert_allclose(ours, values.numpy(), rtol=4e-3, atol=4e-3 * float(values.max()), err_msg=name)


def test_an_activation_that_overflows_float16_is_named(hf_directory: Callable[..., Path]) -> None:
    directory = hf_directory(dtype=torch.bfloat16)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e7
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(SourceError, match=r"activations of model\.layers\.1\.mlp\.\w+ overflow float16"):
        calibrate(HfModel(directory), [[1, 2, 3]])


def test_the_bundled_texts_are_in_four_languages_and_short_enough() -> None:
    texts = read_texts(CALIBRATION)
    assert len(texts) >= 40
    everything = "".join(texts)
    assert any("\u4e00" <= character <= "\u9fff" for character in everything)
    assert any("\u3040" <= character <= "\u30ff" for character in everything)
    samples = tokenize(texts, Tokenizer(MODEL), MAX_TOKENS)
    assert all(0 < len(sample) <= MAX_TOKENS for sample in samples)


def test_text_and_jsonl_files_say_the_same(tmp_path: Path) -> None:
    texts = ["one\nand more", "二つ目"]
    (tmp_path / "a.txt").write_text("\n\n".join(texts) + "\n\n\n", encoding="utf-8")
    lines = [json.dumps({"text": text, "lang": "?"}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == read_texts(tmp_path / "a.jsonl") == texts


def test_the_chat_template_wraps_each_text() -> None:
    tokenizer = Tokenizer(MODEL)
    (plain,), (chat,) = (tokenize(["Hello"], tokenizer, 512, chat=flag) for flag in (False, True))
    assert len(chat) > len(plain) + 4
    assert "Hello" in tokenizer.decode(chat)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot be read"),
        ("empty.txt", b"\n\n \n", "holds no text"),
        ("latin.txt", b"caf\xe9", "is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"content": "b"}', "line 2 is not a JSON object with a field 'text'"),
        ("list.jsonl", b"[1]", "line 1 is not a JSON object"),
        ("half.jsonl", b'{"text": "a', "line 1 is not a JSON object"),
    ],
)
def test_calibration_files_that_cannot_be_used(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    plan = plan_conversion(MODEL, CheckpointRecipe(quant="int8_sq", calib=str(path)))
    with pytest.raises(InputError, match=message) as caught:
        run_conversion(plan, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    if content is None:
        with pytest.raises(InputError, match="cannot be read"):
            plan.key()


def test_ranges_are_read_as_written(tmp_path: Path) -> None:
    ranges = read_ranges(GOLDEN / "act_range.safetensors", 2)
    assert set(ranges) == {f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS}
    write_ranges(ranges, tmp_path / "copy.safetensors")
    for module, span in read_ranges(tmp_path / "copy.safetensors", 2).items():
        np.testing.assert_array_equal(span.x, ranges[module].x)
        np.testing.assert_array_equal(span.y, ranges[module].y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.down_proj.y"), r"has no tensor 'model\.layers\.1\.mlp\.down_proj\.y'"),
        (lambda t: t["model.layers.0.mlp.up_proj.x"].fill_(float("inf")), "up_proj has no usable range"),
        (lambda t: t["model.layers.0.mlp.up_proj.y"].zero_(), "up_proj has no usable range"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.x": torch.ones(7)}),
            r"up_proj has ranges of 7 inputs and 256 outputs, but the model's has 128 and 256",
        ),
        (None, "cannot be read"),
    ],
)
def test_ranges_that_cannot_be_used(tmp_path: Path, change: Callable[..., Any] | None, message: str) -> None:
    path = tmp_path / "ranges.safetensors"
    if change:
        tensors = load_file(GOLDEN / "act_range.safetensors")
        change(tensors)
        save_file(tensors, path)
    plan = plan_conversion(GOLDEN / "hf", CheckpointRecipe(quant="int8_sq", act_ranges=str(path)))
    with pytest.raises(InputError, match=message) as caught:
        run_conversion(plan, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_without_tokenizer_cannot_calibrate(hf_directory: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="tokenizer"):
        activation_ranges(HfModel(hf_directory()), CheckpointRecipe(quant="int8_sq"))
