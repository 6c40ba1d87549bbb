"""Forgetting without labels: two autoencoders say what embeddings of all and of forgotten samples look like.

Shen, Zhang, Zhao, Bialkowski, Chen, Xu: Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models (LAF, ICLR
2024, arXiv 2404.00506), code MIT. The extractor is drawn off the autoencoder of the forgotten samples and kept near that of
all, in turns with a contrast to the original embeddings. Labels are never read; the class rows aren't touched.

Shape legend: B samples of this rank, S retained and U forgotten ones of all ranks, D embedding width, L latent width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest
from labelmill.data.spec import StreamSpec
from labelmill.data.stream import Batch
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError, JobError
from labelmill.job import StrictModel
from labelmill.losses.unlearning import alignment, cosine_distance, latent_kl, psi, reconstruction
from labelmill.training.config import TrainConfig
from labelmill.training.objective import Losses, Objective
from workloads.unlearning.model import Marked, frozen, load_encoder

FIELD = "embedding"


class LafConfig(StrictModel):
    """LAF; `train` is the budget of the turns (epochs are passes over the forgotten samples)."""

    kind: Literal["laf"] = "laf"
    train: TrainConfig | None = Field(None, description="its own budget; default: the job's `train`")
    latent: int = Field(8, ge=1, description="L: width of the autoencoders' latent")
    decoder: Literal["linear", "sigmoid"] = Field(
        "linear", description="the authors' sigmoid can't reconstruct embeddings beyond 0 to 1, and psi is flat there"
    )
    kl_weight: float = Field(0.025, ge=0)
    vae_epochs: float = Field(10.0, gt=0)
    vae_rate: float = Field(1e-3, gt=0)
    vae_batch: int = Field(32, ge=1)
    unlearn_rate: float = Field(
        0.5, gt=0, description="learning rate of the unlearning turns, over that of the alignment"
    )
    temperature: float = Field(20.0, gt=0, description="of the contrast; the authors take 5 (random), 20 (class)")
    repair: TrainConfig | None = Field(None, description="LAF+R: fine-tuning on retained samples, which needs labels")
    repair_layers: int = Field(
        1, ge=0, description="LAF+R: how many last layers learn; 0: all (stronger than the authors')"
    )


class Vae(nn.Module):
    """p -> 128 -> 32 -> (mu, ln variance) in R^L -> 32 -> 128 -> p. Noise goes in also when it is frozen."""

    def __init__(self, dim: int, latent: int, decoder: str) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(dim, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU())
        self.mu, self.logvar = nn.Linear(32, latent), nn.Linear(32, latent)
        last: list[nn.Module] = [nn.Sigmoid()] if decoder == "sigmoid" else []
        self.decode = nn.Sequential(
            nn.Linear(latent, 32), nn.ReLU(), nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, dim), *last
        )

    def forward(self, e_BD: Tensor, eps_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction (B, D), mu, sigma (B, L))."""
        hidden = self.encode(e_BD)
        mu_BL, sigma_BL = self.mu(hidden), torch.exp(self.logvar(hidden) / 2)
        return self.decode(mu_BL + sigma_BL * eps_BL), mu_BL, sigma_BL


def batch_noise(batch: Batch, size: int, width: int, seed: int) -> Tensor:
    """Normal noise (B, L) of a global batch of `size`: that of a place of the batch, whatever the number of ranks."""
    all_GL = torch.randn(size, width, generator=torch.Generator().manual_seed(seed))
    return all_GL[batch.positions_B.cpu() % size].to(batch.weight_B.device)


# --- stage A ----------------------------------------------------------------------------------------------------


class Embedder(Objective):
    """Predicts the embeddings of the original model. Stream and answers have no labels."""

    def __init__(self, package: str) -> None:
        super().__init__()
        self.encoder = frozen(load_encoder(Path(package)))
        self.anchor = nn.Parameter(torch.zeros(1))  # an engine wants something to train

    def prepare(self, raw: Any, labels: Any, rng: Any) -> Any:
        return self.encoder.prepare(raw, rng)

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        return {FIELD: self.encoder(batch.inputs).float()}


def write_embeddings(predictions: Path, out: Path, data: Manifest) -> Manifest:
    """The embeddings of a label-free pass as a data set: keys and numbers, no labels; a shard for each rank.

    Raises DataError for an embedding that has no direction (NaN, infinite, length zero), with the sample's key.
    """
    parts = sorted(predictions.glob("part-*.parquet"))
    width = pq.ParquetFile(parts[0]).schema_arrow.field(FIELD).type.list_size
    fields = {FIELD: FieldSpec(kind="array", ext="npy", shape=(width,), dtype="float32")}
    spec = LabelSpec(form="none")
    with ShardWriter(out, "embeddings", fields, spec, "packed", overwrite=True, parents=(data.digest,)) as writer:
        for part in parts:
            for rows in pq.ParquetFile(part).iter_batches(1 << 14, columns=["key", FIELD]):
                values = rows.column(FIELD).flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1)
                length = np.linalg.norm(values, axis=1)
                bad = np.flatnonzero(~np.isfinite(length) | (length == 0))
                if len(bad):
                    raise DataError(
                        f"sample {rows.column('key')[bad[0]].as_py()!r}: its embedding has no direction (zero, NaN or "
                        f"infinite; {len(bad)} of this part). LAF compares directions: check the model."
                    )
                writer.write_table(pa.Table.from_batches([rows]))
        return writer.close()


class FitVae(Objective):
    """An autoencoder of stored embeddings: ||h(e) - e||^2 + weight * KL, sums over dimensions, means over the batch."""

    step: Tensor

    def __init__(self, dim: int, config: LafConfig, seed: int) -> None:
        super().__init__()
        self.vae, self.config, self.seed = Vae(dim, config.latent, config.decoder), config, seed
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))

    def begin(self, step: int, total: int) -> None:
        self.step.fill_(step)

    def prepare(self, raw: Any, labels: Any, rng: Any) -> Tensor:
        return torch.from_numpy(np.array(raw, dtype=np.float32))

    def forward(self, batch: Batch) -> Losses:
        e_BD, weight_B = batch.inputs, batch.weight_B
        noise = batch_noise(batch, self.config.vae_batch, self.config.latent, self.seed * 1_000_003 + int(self.step))
        h_BD, mu_BL, sigma_BL = self.vae(e_BD, noise)
        loss_B = reconstruction(e_BD, h_BD) + self.config.kl_weight * latent_kl(mu_BL, sigma_BL)
        return Losses((loss_B * weight_B).sum() / weight_B.sum().clamp_min(1))


def load_vae(folder: Path, dim: int, config: LafConfig) -> Any:
    """A fitted autoencoder, frozen."""
    state = load_file(folder / "export" / "dense.safetensors")
    vae = Vae(dim, config.latent, config.decoder)
    vae.load_state_dict({k.removeprefix("vae."): v for k, v in state.items() if k.startswith("vae.")})
    return frozen(vae)


# --- stage B ----------------------------------------------------------------------------------------------------


class Laf(Marked):
    """The two turns on each batch, with moments and rates of their own.

    L_UE = sum_s psi(||h(e) - e||^2) - sum_u psi(||h_f(e) - e||^2)
    L_RA = sum_i c1_i - |s| logsumexp_j(c2_j / temp), over the global batch

    Sums are over the samples of all ranks, so that the number of ranks changes nothing.

    Args:
        package: the original model.
        forget: hashes of the forgotten keys.
        config: the method.
        all_vae, forget_vae: folders of the fitted autoencoders.
        size: samples of a global batch.
        seed: of the autoencoders' noise.
    """

    def __init__(
        self, package: str, forget: str, config: LafConfig, all_vae: str, forget_vae: str, size: int, seed: int
    ) -> None:
        super().__init__(forget)
        self.encoder = load_encoder(Path(package))
        self.teacher = frozen(load_encoder(Path(package)))
        dim = self.encoder.dim
        self.h, self.h_f = load_vae(Path(all_vae), dim, config), load_vae(Path(forget_vae), dim, config)
        self.config, self.size, self.seed = config, size, seed
        self.phase_rates = (config.unlearn_rate, 1.0)

    def prepare(self, raw: Any, labels: Any, rng: Any) -> Any:
        return self.encoder.prepare(raw, rng)

    def forward(self, batch: Batch) -> Losses:
        if batch.labels.form != "none":
            raise JobError("LAF takes a stream without labels (data.deletion.unlabelled): they would only be ignored.")
        self.encoder.eval()  # as the authors': statistics and dropout rest
        forget_B = self.forgotten(batch)
        retain_B = ~forget_B & (batch.weight_B > 0)
        e_BD = self.encoder(batch.inputs).float()
        loss = self.unlearning(batch, e_BD, retain_B, forget_B) if self.step % 2 == 0 else None
        return Losses(self.aligning(batch, e_BD, retain_B, forget_B) if loss is None else loss)

    def unlearning(self, batch: Batch, e_BD: Tensor, retain_B: Tensor, forget_B: Tensor) -> Tensor:
        """L_UE, this rank's part times the number of ranks: the engine averages over them."""
        noise = batch_noise(batch, self.size, self.config.latent, self.seed * 1_000_003 + self.step)
        to_all_B = psi(reconstruction(e_BD, self.h(e_BD, noise)[0]))
        to_forget_B = psi(reconstruction(e_BD, self.h_f(e_BD, noise)[0]))
        return self.ranks.world * ((to_all_B * retain_B).sum() - (to_forget_B * forget_B).sum())

    def aligning(self, batch: Batch, e_BD: Tensor, retain_B: Tensor, forget_B: Tensor) -> Tensor:
        """L_RA over the global batch: cosine distances are gathered, not embeddings; the same on each rank."""
        with torch.no_grad():
            teacher_BD = self.teacher(batch.inputs).float()
        alive_B = retain_B | forget_B
        c_B = torch.zeros_like(batch.weight_B).masked_scatter(
            alive_B, cosine_distance(e_BD[alive_B], teacher_BD[alive_B])
        )
        counts = [n for (n,) in self.ranks.gather_numbers([len(c_B)], c_B.device)]
        c_N = self.ranks.gather_rows_with_grad(c_B, counts)
        kind_N = self.ranks.gather_rows(retain_B.long() + 2 * forget_B.long(), counts)
        return alignment(c_N[kind_N == 1], c_N[kind_N == 2], self.config.temperature)


# --- what runs the stages ---------------------------------------------------------------------------------------


def embed(run: Any, folder: Path, package: Path, whole: StreamSpec, config: TrainConfig) -> Manifest:
    """The streamed pass of the original model over a label-free stream, and its embeddings as a data set."""
    if whole.label.form != "none":
        raise JobError("labels must be dropped before the label-free method sees the stream.")
    from functools import partial

    run.fit(folder, partial(Embedder, str(package.resolve())), None, config, predict={"all": whole})
    return write_embeddings(folder / "predictions" / "all", folder / "data", whole.manifest)
