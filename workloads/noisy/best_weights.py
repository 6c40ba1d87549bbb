"""The weights and the number of channels that predicted held-out samples best while training went on.

Everything is kept in buffers, so it is in checkpoints and survives a resume.

Shape legend: B samples of this rank, D prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from labelmill.heads.ranks import Ranks
from labelmill.losses.coteaching import best_prefix

_DOT = "/"  # a buffer's name has no dots


class BestWeights(nn.Module):
    """Copies of the parameters of `modules` from the evaluation with the best accuracy, longer prefixes counting less.

    Args:
        modules: whose parameters are kept; not registered here.
        prefixes: D; 1 for a model that always uses all channels.
    """

    hits_D: Tensor
    seen: Tensor
    score: Tensor

    def __init__(self, modules: Mapping[str, nn.Module], prefixes: int) -> None:
        super().__init__()
        self._live = {
            f"{name}.{own}": parameter
            for name, module in modules.items()
            for own, parameter in module.named_parameters()
        }
        self._ranks = Ranks()
        self.register_buffer("hits_D", torch.zeros(prefixes, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("score", torch.full((1,), -1.0, dtype=torch.float64))
        for name, parameter in self._live.items():
            self.register_buffer(name.replace(".", _DOT), torch.zeros_like(parameter.detach()))

    @torch.no_grad()
    def add(self, found_BD: Tensor, label_B: Tensor, weight_B: Tensor) -> Tensor:
        """Counts the classes that each prefix gave to a batch of an evaluation. Collective. Returns hits (B, D)."""
        hits_BD = (found_BD == label_B[:, None]) & (weight_B > 0)[:, None]
        total = torch.cat([hits_BD.double().sum(dim=0), (weight_B > 0).double().sum()[None]])
        self._ranks.sum_(total)  # buffers are the same on all ranks
        self.hits_D += total[:-1]
        self.seen += total[-1]
        return hits_BD

    @torch.no_grad()
    def settle(self) -> int | None:
        """Ends an evaluation, if there was one: keeps the weights if they are the best; returns its best prefix."""
        if not float(self.seen):
            return None
        accuracy_D = (self.hits_D / self.seen).cpu()
        prefix = best_prefix(accuracy_D)
        score = float(accuracy_D[prefix - 1]) - 1e-5 * (prefix - 1)
        if score > float(self.score):
            self.score.fill_(score)
            for name, parameter in self._live.items():
                self.get_buffer(name.replace(".", _DOT)).copy_(parameter)
        self.hits_D.zero_()
        self.seen.zero_()
        return prefix

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the modules have the kept weights, if there are some."""
        if float(self.score) < 0:
            yield
            return
        live = {name: parameter.data for name, parameter in self._live.items()}
        try:
            for name, parameter in self._live.items():
                parameter.data = self.get_buffer(name.replace(".", _DOT))
            yield
        finally:
            for name, parameter in self._live.items():
                parameter.data = live[name]


def kept_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An exported state whose parameters are those that its `best` kept, without what `best` needs for itself."""
    plain = {name: value for name, value in state.items() if not name.startswith("best.")}
    if "best.score" not in state or float(state["best.score"]) < 0:
        return plain
    kept = {name: name.removeprefix("best.").replace(_DOT, ".") for name in state if name.startswith("best.")}
    return plain | {own: state[name] for name, own in kept.items() if own in plain}
