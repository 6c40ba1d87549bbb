"""`ensemble`: the embeddings of several models of one kind side by side, so that a score is the mean of theirs.

Class rows of such a model are the members' rows side by side. It is put together from trained members, not trained.

B samples, M members, D embedding width of a member.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from labelmill.encoders.base import Encoder, Prepared, Raw
from labelmill.encoders.hashing import Rng
from labelmill.job import StrictModel


class EnsembleConfig(StrictModel):
    """Options of an ensemble, as its package holds them."""

    kind: Literal["ensemble"] = "ensemble"
    member: dict[str, Any] = Field(description="the encoder section of a member")
    members: int = Field(ge=1)
    normalize: bool = Field(True, description="whether the members' heads compare directions")

    @property
    def image_size(self) -> int | None:
        """Of a member."""
        return self.member.get("image_size")

    @property
    def channels(self) -> int:
        """Of a member."""
        return self.member.get("channels", 3)


class Ensemble(Encoder):
    """(B, M x D): the members' unit vectors, or, of heads without normalisation, their embeddings over M.

    With rows joined likewise the cosine (the product) is the mean over the members. Embeddings of length zero stay.
    """

    config: EnsembleConfig

    def __init__(self, config: EnsembleConfig, members: Sequence[Encoder]) -> None:
        super().__init__(config, sum(member.dim for member in members), members[0].field)
        self.members = nn.ModuleList(members)

    def prepare(self, raw: Raw, rng: Rng | None = None) -> Prepared:
        """As a member: all are of one kind."""
        first: Any = self.members[0]
        return first.prepare(raw, rng)

    def forward(self, prepared: Prepared) -> torch.Tensor:
        """emb_BE, E = M x D."""
        parts = [member(prepared) for member in self.members]
        if self.config.normalize:
            return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)
        return torch.cat(parts, dim=1) / len(parts)

    def portable(self, folder: Path) -> StrictModel:
        """A member's files go into `folder` once."""
        first: Any = self.members[0]
        return self.config.model_copy(update={"member": first.portable(folder).model_dump(mode="json")})
