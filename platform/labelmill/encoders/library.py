"""`hf_image` and `hf_text`: encoders built by the transformers library, from a local folder or fresh.

Nothing is downloaded: `path` is a folder with `config.json` and safetensors, `architecture` builds a fresh
model from its configuration class. transformers is imported when an encoder is built, not before.

B samples, C channels, H height, W width, T tokens, D embedding width.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from labelmill.encoders.augment import _pad
from labelmill.encoders.base import Encoder, Prepared, Raw
from labelmill.encoders.hashing import Rng
from labelmill.encoders.vision import ImageOptions, as_map, prepare_images
from labelmill.errors import JobError, did_you_mean
from labelmill.job import StrictModel

BYTE_PAD, BYTE_START, BYTE_END, BYTE_OFFSET = 0, 1, 2, 3
BYTE_VOCABULARY = 256 + BYTE_OFFSET


class LibraryOptions(StrictModel):
    """Which library model, and how its output becomes an embedding."""

    path: str | None = Field(None, description="local folder with config.json and *.safetensors")
    architecture: str | None = Field(None, description="model type of a fresh model, such as vit, convnext, bert")
    options: dict[str, Any] = Field(default_factory=dict, description="fields of the architecture's configuration")
    pooling: Literal["mean", "cls"] = Field("mean", description="mean over tokens or positions, or the first token")
    dim: int | None = Field(None, ge=1, description="width after a linear layer; null = the model's own width")
    frozen: bool = Field(False, description="keep the library model's weights as they are")

    @model_validator(mode="after")
    def _one_source(self) -> LibraryOptions:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give either path (a local folder) or architecture (a fresh model), not both or neither")
        if self.path is not None and self.options:
            raise ValueError("options belong to architecture; a model from a path brings its own configuration")
        return self


class HfImageConfig(ImageOptions, LibraryOptions):
    """Options of the `hf_image` encoder."""

    kind: Literal["hf_image"] = "hf_image"
    image_size: int = Field(224, ge=4, description="side in pixels; other sizes are resized")
    channels: Literal[1, 3] = 3


class HfTextConfig(LibraryOptions):
    """Options of the `hf_text` encoder."""

    kind: Literal["hf_text"] = "hf_text"
    field: str = Field("text", description="manifest field that holds the text")
    max_length: int = Field(128, ge=4, description="tokens; longer texts are cut")
    tokenizer: str | None = Field(
        None, description="local folder of a tokenizer; null = the one in path, or bytes for a fresh model"
    )


class LibraryEncoder(Encoder):
    """Builds, pools and projects a library model; the input side is the subclass's."""

    config: HfImageConfig | HfTextConfig

    def __init__(self, config: HfImageConfig | HfTextConfig, root: Path | None, defaults: dict[str, Any]) -> None:
        super().__init__(config, 0, config.field)
        self.model = _build_model(config, root, defaults)
        self.project: nn.Module = nn.Identity()
        width = self._find_width_and_unused()
        self.dim = width if config.dim is None else config.dim
        if config.frozen:
            self.model.requires_grad_(False)
        if config.dim is not None:
            self.project = nn.Linear(width, config.dim)

    def example(self) -> Prepared:
        """One prepared sample, to find the width of the output."""
        raise NotImplementedError

    def _find_width_and_unused(self) -> int:
        """Runs one sample: the width of the embedding, and an early error where input and model don't fit.

        Parameters the pooled output doesn't depend on (a pooler, a mask token) are frozen, because
        data-parallel engines expect a gradient for every trainable parameter.
        """
        self.eval()
        try:
            with torch.enable_grad():
                emb_1D = self(self.example())
                named = [p for p in self.model.parameters() if p.requires_grad]
                grads = torch.autograd.grad(emb_1D.float().sum(), named, allow_unused=True)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            source = self.config.path or self.config.architecture
            raise JobError(f"encoder {self.config.kind!r} ({source}) can't encode one sample: {error}") from error
        for parameter, grad in zip(named, grads, strict=True):
            if grad is None:
                parameter.requires_grad_(False)
        self.train()
        return emb_1D.shape[1]

    def train(self, mode: bool = True) -> LibraryEncoder:
        """A frozen model stays in evaluation mode: no dropout in a teacher."""
        super().train(mode)
        if self.config.frozen:
            self.model.eval()
        return self

    def _portable_library(self) -> dict[str, Any]:
        """Config fields that rebuild the architecture without the folder it came from."""
        config: Any = self.model.config
        skip = {"architectures", "transformers_version", "model_type", "torch_dtype", "dtype"}
        options = {k: v for k, v in config.to_diff_dict().items() if k not in skip and not k.startswith("_")}
        known = _known_options(type(config)())
        return {
            "path": None,
            "architecture": config.model_type,
            "options": {k: options[k] for k in options if k in known},
        }


class HfImage(LibraryEncoder):
    """Any transformers vision backbone whose output has `last_hidden_state` (tokens or a feature map)."""

    config: HfImageConfig

    def __init__(self, config: HfImageConfig, root: Path | None = None) -> None:
        super().__init__(config, root, {"image_size": config.image_size, "num_channels": config.channels})

    def prepare(self, raw: Raw, rng: Rng | None = None) -> Prepared:
        """See `prepare_images`."""
        return prepare_images(raw, self.config, rng)

    def example(self) -> Prepared:
        """A black image."""
        c = self.config
        return torch.zeros(1, c.channels, c.image_size, c.image_size)

    def forward(self, prepared: Prepared) -> torch.Tensor:
        """float (B, C, H, W) -> emb_BD."""
        return self._pooled(self.model(pixel_values=prepared).last_hidden_state)

    def maps(self, prepared: Prepared) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """See `Encoder.maps`: the model's hidden states; tokens in the places of their patches, class tokens left out."""
        output = self.model(pixel_values=prepared, output_hidden_states=True)
        states = getattr(output, "hidden_states", None) or (output.last_hidden_state,)
        return self._pooled(output.last_hidden_state), [h if h.dim() == 4 else as_map(h) for h in states]

    def _pooled(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dim() == 4:  # a convolutional backbone: (B, D, H, W)
            if self.config.pooling == "cls":
                raise ValueError("pooling 'cls' needs a model with a class token; use 'mean' for a feature map")
            return self.project(hidden.mean(dim=(2, 3)))
        return self.project(hidden.mean(dim=1) if self.config.pooling == "mean" else hidden[:, 0])

    def portable(self, folder: Path) -> StrictModel:
        """See `Encoder.portable`; needs no files."""
        return self.config.model_copy(update=self._portable_library())


class HfText(LibraryEncoder):
    """Any transformers text encoder whose output has `last_hidden_state`; bytes or a local tokenizer."""

    config: HfTextConfig

    def __init__(self, config: HfTextConfig, root: Path | None = None) -> None:
        folder = config.tokenizer or config.path
        self._tokenizer = None if folder is None else _load_tokenizer(_local(folder, root, "encoder.tokenizer"))
        defaults: dict[str, Any] = {"max_position_embeddings": config.max_length}
        if self._tokenizer is None:
            defaults |= {"vocab_size": BYTE_VOCABULARY, "pad_token_id": BYTE_PAD}
            defaults |= {"bos_token_id": BYTE_START, "eos_token_id": BYTE_END}
        else:
            defaults["vocab_size"] = len(self._tokenizer)
        tokenizer = self._tokenizer
        super().__init__(config, root, defaults)
        self._tokenizer = tokenizer

    def prepare(self, raw: Raw, rng: Rng | None = None) -> Prepared:
        """Strings -> {"input_ids": int64 (B, T), "attention_mask": int64 (B, T)}, T the longest of the
        batch.
        """
        texts = [s or "" for s in raw]
        if self._tokenizer is None:
            return bytes_to_ids(texts, self.config.max_length)
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self.config.max_length, return_tensors="pt"
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def example(self) -> Prepared:
        """A two-word text."""
        return self.prepare(["a text"])

    def forward(self, prepared: Prepared) -> torch.Tensor:
        """{"input_ids", "attention_mask"} -> emb_BD."""
        assert isinstance(prepared, dict)
        mask_BT = prepared["attention_mask"]
        hidden_BTD = self.model(input_ids=prepared["input_ids"], attention_mask=mask_BT).last_hidden_state
        if self.config.pooling == "cls":
            return self.project(hidden_BTD[:, 0])
        mask_BT1 = mask_BT[:, :, None].to(hidden_BTD.dtype)
        return self.project((hidden_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1).clamp_min(1.0))

    def portable(self, folder: Path) -> StrictModel:
        """See `Encoder.portable`; a tokenizer is saved to `folder`/tokenizer."""
        update = self._portable_library()
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(str(folder / "tokenizer"))
            update["tokenizer"] = "tokenizer"
        return self.config.model_copy(update=update)


def bytes_to_ids(texts: list[str], max_length: int) -> dict[str, torch.Tensor]:
    """UTF-8 bytes as tokens: start, bytes + 3, end; 0 pads. At most max_length tokens, the end mark kept."""
    encoded = [t.encode("utf-8", "surrogatepass") for t in texts]
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    flat = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    matrix, length_B = _pad(flat, lengths, max_length - 2)
    ids = np.zeros((len(texts), matrix.shape[1] + 2), dtype=np.int64)
    ids[:, 0] = BYTE_START
    column = np.arange(matrix.shape[1])[None, :]
    ids[:, 1:-1] = np.where(column < length_B[:, None], matrix.astype(np.int64) + BYTE_OFFSET, BYTE_PAD)
    ids[np.arange(len(texts)), length_B + 1] = BYTE_END
    mask = np.arange(ids.shape[1])[None, :] < (length_B + 2)[:, None]
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def _transformers() -> Any:
    """The library, told to stay off the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise JobError(
            "encoder kinds hf_image and hf_text need the package transformers; install it with "
            "`pip install transformers`, or choose another encoder.kind"
        ) from error
    return transformers


def _local(path: str, root: Path | None, where: str) -> Path:
    """The folder, relative ones from `root`. Raises JobError when it isn't there."""
    folder = Path(path).expanduser()
    if root is not None and not folder.is_absolute():
        folder = root / folder
    if not folder.is_dir():
        raise JobError(f"{where}: no folder {str(folder)!r}; models are read from local folders, nothing is downloaded")
    return folder


def _build_model(config: HfImageConfig | HfTextConfig, root: Path | None, defaults: dict[str, Any]) -> nn.Module:
    transformers = _transformers()
    if config.path is not None:
        folder = _local(config.path, root, "encoder.path")
        present = {
            "config.json": (folder / "config.json").is_file(),
            "*.safetensors": any(folder.glob("*.safetensors")),
        }
        missing = [name for name, found in present.items() if not found]
        if missing:
            raise JobError(f"encoder.path: {str(folder)!r} lacks {' and '.join(missing)}")
        try:
            return transformers.AutoModel.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False
            ).float()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise JobError(f"encoder.path: {str(folder)!r} can't be loaded: {error}") from error
    assert config.architecture is not None
    types = transformers.CONFIG_MAPPING
    if config.architecture not in types:
        raise JobError(
            f"encoder.architecture: transformers {transformers.__version__} knows no {config.architecture!r}."
            f"{did_you_mean(config.architecture, types.keys())}"
        )
    known = _known_options(types[config.architecture]())
    for name in config.options:
        if name not in known:
            raise JobError(
                f"encoder.options.{name}: not an option of {config.architecture}.{did_you_mean(name, known)}"
            )
    options = {k: v for k, v in defaults.items() if k in known} | config.options
    try:
        return transformers.AutoModel.from_config(types[config.architecture](**options))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise JobError(f"encoder.options: {config.architecture} can't be built: {error}") from error


def _known_options(example: Any) -> set[str]:
    """Names a configuration class takes, aliases (such as num_channels of some models) included."""
    return set(example.to_dict()) | set(getattr(example, "attribute_map", {}) or {})


def _load_tokenizer(folder: Path) -> Any:
    try:
        return _transformers().AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        raise JobError(
            f"encoder.tokenizer: {str(folder)!r} has no tokenizer that can be read ({error}); it needs "
            "tokenizer.json or the files of a slow tokenizer"
        ) from error
