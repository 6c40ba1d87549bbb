"""Library-built encoders: fresh from a configuration, saved to and loaded from a local folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labelmill.encoders import build_encoder
from labelmill.encoders.library import bytes_to_ids
from labelmill.errors import JobError

torch.set_num_threads(1)

TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 8,
}
TINY_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TINY_CONVNEXT = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2}
WORDS = ["hello", "world", "a", "", "straße", "你好", "𝒳y", "x" * 50]


CONFIGS: dict[str, dict[str, Any]] = {
    "hf_image": {"architecture": "vit", "options": TINY_VIT, "image_size": 32, "dim": 10},
    "hf_text": {"architecture": "bert", "options": TINY_BERT, "max_length": 16},
}


def build(kind: str, seed: int = 0, **options: Any):  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    return build_encoder({"kind": kind, **CONFIGS[kind], **options})


def images(count: int = 4, size: int = 28, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def raw_for(kind: str) -> Any:
    return WORDS if kind in ("char_ngrams", "hf_text") else images(8)


def test_byte_tokens() -> None:
    tokens = bytes_to_ids(["ab", "", "é" * 9], max_length=6)
    assert tokens["input_ids"].tolist() == [
        [1, 100, 101, 2, 0, 0], [1, 2, 0, 0, 0, 0], [1, 198, 172, 198, 172, 2],
    ]  # fmt: skip
    assert tokens["attention_mask"].sum(dim=1).tolist() == [4, 2, 6]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("hf_image", {"architecture": "vit", "options": TINY_VIT, "image_size": 32}),
        ("hf_image", {"architecture": "convnext", "options": TINY_CONVNEXT, "image_size": 32}),
        ("hf_text", {"architecture": "bert", "options": TINY_BERT, "max_length": 16}),
    ],
)
def test_library_models_save_and_load_from_a_folder(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    fresh = build_encoder({"kind": kind, **options})
    raw = raw_for(kind)
    fresh.model.save_pretrained(tmp_path / "model", safe_serialization=True)
    source = {k: v for k, v in options.items() if k in ("image_size", "max_length")}
    path = {"kind": kind, "path": "model", **source, **({"tokenizer": None} if kind == "hf_text" else {})}
    if kind == "hf_text":
        _save_tokenizer(tmp_path / "model")
    loaded = build_encoder(path, root=tmp_path)
    if kind == "hf_image":
        assert torch.allclose(loaded.embed(raw), fresh.embed(raw), atol=1e-5)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = loaded.portable(elsewhere)
    assert config.path is None
    assert config.architecture == options["architecture"]
    rebuilt = build_encoder(type(config).model_validate_json(config.model_dump_json()), root=elsewhere)
    rebuilt.load_state_dict(loaded.state_dict())
    assert torch.allclose(rebuilt.embed(raw), loaded.embed(raw), atol=1e-6)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "hello": 2, "world": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def test_library_pooling_frozen_and_unused_parameters() -> None:
    cls = build("hf_text", pooling="cls", frozen=True, dim=7)
    assert cls.dim == 7
    assert [n for n, p in cls.named_parameters() if p.requires_grad] == ["project.weight", "project.bias"]
    cls.train()
    assert not cls.model.training
    assert cls.training
    free = build("hf_text")
    assert not any(p.requires_grad for n, p in free.named_parameters() if "pooler" in n), "the pooler isn't used"
    assert build("hf_image", pooling="cls").embed(images(2)).shape == (2, 10)
    with pytest.raises(JobError, match="class token"):
        build("hf_image", architecture="convnext", options=TINY_CONVNEXT, pooling="cls")


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, [(16, 4, 4), (16, 4, 4)]),
        ({"architecture": "convnext", "options": TINY_CONVNEXT}, [(8, 8, 8), (8, 8, 8), (12, 4, 4)]),
    ],
)
def test_library_feature_maps(options: dict[str, Any], shapes: list[tuple[int, ...]]) -> None:
    encoder = build("hf_image", **options).eval()
    prepared = encoder.prepare(images(2, size=32))
    emb_BD, maps = encoder.maps(prepared)
    torch.testing.assert_close(emb_BD, encoder(prepared))
    assert [tuple(m.shape[1:]) for m in maps] == shapes
    with pytest.raises(JobError, match="'hf_text' has no feature maps"):
        build("hf_text").maps({})


def test_library_errors_are_for_the_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError, match=r"no folder .*nothing is downloaded"):
        build_encoder({"kind": "hf_image", "path": str(tmp_path / "missing")})
    with pytest.raises(JobError, match=r"lacks config.json and \*.safetensors"):
        build_encoder({"kind": "hf_image", "path": str(tmp_path)})
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(JobError, match=r"can't be loaded"):
        build_encoder({"kind": "hf_image", "path": str(tmp_path)})
    with pytest.raises(JobError, match="no tokenizer that can be read"):
        build_encoder({"kind": "hf_text", "architecture": "bert", "tokenizer": str(tmp_path)})
    with pytest.raises(JobError, match=r"knows no 'vitt'. Did you mean"):
        build_encoder({"kind": "hf_image", "architecture": "vitt"})
    with pytest.raises(JobError, match=r"encoder.options.hiden_size: not an option of vit. Did you mean 'hidden_size'"):
        build_encoder({"kind": "hf_image", "architecture": "vit", "options": {"hiden_size": 3}})
    with pytest.raises(JobError, match=r"either path"):
        build_encoder({"kind": "hf_image"})
    with pytest.raises(JobError, match="options belong to architecture"):
        build_encoder({"kind": "hf_text", "path": "x", "options": {"hidden_size": 3}})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(JobError, match="need the package transformers"):
        build("hf_image")


def test_importing_encoders_leaves_transformers_alone() -> None:
    code = "import sys, labelmill.encoders; assert not {'transformers', 'ray', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
