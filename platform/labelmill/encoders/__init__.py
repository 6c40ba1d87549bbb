"""Encoders: a field of a sample to an embedding, by modality, chosen by `kind`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from labelmill.encoders.base import Encoder, Prepared, prepared_rows, slice_prepared, to_device
from labelmill.encoders.ensemble import Ensemble, EnsembleConfig
from labelmill.encoders.hashing import sample_keys
from labelmill.encoders.library import HfImage, HfImageConfig, HfText, HfTextConfig
from labelmill.encoders.linear import LinearConfig, LinearProjection, Pixels, PixelsConfig
from labelmill.encoders.text import CharNgrams, CharNgramsConfig
from labelmill.encoders.vision import Mlp, MlpConfig, SmallCnn, SmallCnnConfig, SmallVit, SmallVitConfig
from labelmill.errors import JobError, did_you_mean
from labelmill.job import StrictModel

AnyEncoderConfig = (
    CharNgramsConfig
    | SmallCnnConfig
    | SmallVitConfig
    | MlpConfig
    | HfImageConfig
    | HfTextConfig
    | LinearConfig
    | PixelsConfig
)
EncoderConfig = Annotated[AnyEncoderConfig, Field(discriminator="kind")]

_CLASSES: dict[type[StrictModel], Any] = {
    CharNgramsConfig: CharNgrams,
    SmallCnnConfig: SmallCnn,
    SmallVitConfig: SmallVit,
    MlpConfig: Mlp,
    LinearConfig: LinearProjection,
    PixelsConfig: Pixels,
}
_LIBRARY: dict[type[StrictModel], Any] = {HfImageConfig: HfImage, HfTextConfig: HfText}
KINDS: tuple[str, ...] = tuple(c.model_fields["kind"].default for c in (*_CLASSES, *_LIBRARY))


def build_encoder(config: AnyEncoderConfig | EnsembleConfig | Mapping[str, Any], root: Path | None = None) -> Encoder:
    """The encoder a config describes, with fresh (or, for a library `path`, loaded) weights.

    Seed torch before the call: the weights come from its global generator. `root` is the folder that relative
    paths of the config start from. Raises JobError for an unknown kind or a wrong option, naming the field.
    """
    if isinstance(config, Mapping):
        config = _parse(config)
    if isinstance(config, EnsembleConfig):  # of packages alone: no job trains one
        return Ensemble(config, [build_encoder(config.member, root) for _ in range(config.members)])
    if type(config) in _LIBRARY:
        return _LIBRARY[type(config)](config, root)
    if type(config) not in _CLASSES:
        raise JobError(f"encoder: {type(config).__name__} is not an encoder config.{did_you_mean('', KINDS)}")
    try:
        return _CLASSES[type(config)](config)
    except ValueError as error:
        raise JobError(f"encoder {config.kind!r}: {error}") from error


def _parse(options: Mapping[str, Any]) -> AnyEncoderConfig | EnsembleConfig:
    kind = options.get("kind")
    if kind == "ensemble":
        return EnsembleConfig.model_validate(dict(options))
    if kind not in KINDS:
        raise JobError(f"encoder.kind: unknown encoder {kind!r}.{did_you_mean(str(kind), KINDS)}")
    adapter: TypeAdapter[AnyEncoderConfig] = TypeAdapter(EncoderConfig)
    try:
        return adapter.validate_python(dict(options))
    except ValidationError as error:
        lines = [f"encoder.{'.'.join(str(p) for p in e['loc'][1:])}: {e['msg']}" for e in error.errors()]
        raise JobError("; ".join(lines)) from error


__all__ = [
    "KINDS",
    "CharNgrams",
    "CharNgramsConfig",
    "Encoder",
    "EncoderConfig",
    "Ensemble",
    "EnsembleConfig",
    "HfImage",
    "HfImageConfig",
    "HfText",
    "HfTextConfig",
    "LinearConfig",
    "LinearProjection",
    "Mlp",
    "MlpConfig",
    "Pixels",
    "PixelsConfig",
    "Prepared",
    "SmallCnn",
    "SmallCnnConfig",
    "SmallVit",
    "SmallVitConfig",
    "build_encoder",
    "prepared_rows",
    "sample_keys",
    "slice_prepared",
    "to_device",
]
