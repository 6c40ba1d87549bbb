"""Label augmentation by views: the numbers of its losses, the vote, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from labelmill.data.labels import Labels
from labelmill.data.stream import Batch
from labelmill.encoders import MlpConfig
from labelmill.errors import DataError, JobError
from labelmill.losses.class_sums import dense_distillation
from labelmill.losses.distillation import KD
from workloads.distillation.self_label_augmentation import SlaArm, ViewClassifier
from workloads.distillation.views import aggregated, check_views, expand, identity_of, joint_labels, transforms

Z = torch.tensor([[1, 0, 0.5, -1], [0, 2, 1, 0]], dtype=torch.float64)  # two views of a sample, N = M = 2


def test_joint_loss_vote_and_distillation() -> None:
    z = Z.clone().requires_grad_()
    joint = F.cross_entropy(z, joint_labels(torch.tensor([1]), 2))
    assert joint.item() == pytest.approx(1.8701894891230149)
    vote = aggregated(z, 2)
    torch.testing.assert_close(vote, torch.tensor([[1.5, 0.25]]).double())
    torch.testing.assert_close(torch.softmax(vote, 1)[0, 0].item(), 0.7772998611746911)
    single = torch.softmax(z[:1, ::2], 1)
    assert single[0].tolist() == pytest.approx([0.6224593312018546, 0.3775406687981455])
    w = torch.tensor([[0.3, 0.1]]).double()
    kl = dense_distillation(KD(temperature=1), w, vote).sum()
    ce = F.cross_entropy(w, torch.tensor([1]))
    assert kl.item() == pytest.approx(0.11237464226964458)
    assert ce.item() == pytest.approx(0.7981388693815918)
    assert (joint + ce + kl).item() == pytest.approx(2.7807030007742513)
    (with_sd,) = torch.autograd.grad(joint + ce + kl, z, retain_graph=True)
    (alone,) = torch.autograd.grad(joint, z)
    assert torch.equal(with_sd, alone), "the vote doesn't learn from its student"


def test_multi_task_is_the_factorised_joint_head() -> None:
    a, b = torch.tensor([0.7, -0.2, 1.1]).double(), torch.tensor([0.1, 0.4]).double()
    joint = F.cross_entropy((a[:, None] + b).flatten()[None], torch.tensor([2 * 2 + 1]))
    both = F.cross_entropy(a[None], torch.tensor([2])) + F.cross_entropy(b[None], torch.tensor([1]))
    assert joint.item() == pytest.approx(1.2185121582608736)
    assert both.item() == pytest.approx(joint.item())
    flat = F.cross_entropy(a[:, None].expand(3, 2).reshape(1, -1), torch.tensor([5]))
    assert flat.item() == pytest.approx(1.3573040943522916), "logits that don't tell the view cost ln M more"


def test_rotations_and_their_order() -> None:
    x = torch.arange(4.0).view(1, 1, 2, 2)
    turned = expand(x, transforms("rotation")).flatten(1).tolist()
    assert turned == [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]
    sizes = {
        "rotation": 4,
        "rotation2": 2,
        "color_perm": 6,
        "color_perm3": 3,
        "rot_color_perm6": 6,
        "rot_color_perm12": 12,
        "rot_color_perm24": 24,
    }
    for name, size in sizes.items():
        chosen = transforms(name)  # type: ignore[arg-type]
        assert len(set(chosen)) == size
        assert chosen[0] == (0, (0, 1, 2))
    colours = torch.arange(3.0).view(1, 3, 1, 1)
    assert expand(colours, transforms("color_perm3")).flatten(1).tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    order = [1, 0, 3, 2]
    z = torch.randn(8, 12, dtype=torch.float64)
    swapped = z.unflatten(0, (2, 4))[:, order].unflatten(2, (3, 4))[..., order].reshape(8, 12)
    torch.testing.assert_close(aggregated(swapped, 4), aggregated(z, 4))


def batch(size: int = 6) -> Batch:
    x = torch.randn(4, 1, size, size)
    label = torch.tensor([[0], [2], [1], [2]])
    return Batch(list("abcd"), x, Labels("single", label), torch.tensor([1.0, 1, 0, 1]), torch.arange(4))


@pytest.mark.parametrize("kind", ["plain", "augment", "multi_task", "joint", "joint_distilled"])
def test_arms_train_and_predict(kind: Any) -> None:
    torch.manual_seed(0)
    model = ViewClassifier(MlpConfig(image_size=6, channels=1, hidden=(), dim=5), 3, SlaArm(kind=kind))
    inputs = batch()
    losses = model.forward(inputs)
    losses.total.backward()
    assert all(p.grad is not None for p in model.parameters())
    kept = Batch(
        list("abd"),
        inputs.inputs[[0, 1, 3]],
        Labels("single", inputs.labels.ids_BP[[0, 1, 3]]),
        torch.ones(3),
        torch.arange(3),
    )
    assert model.forward(kept).total.item() == pytest.approx(losses.total.item(), rel=1e-5), "a hole doesn't count"
    found = model.predict(inputs)
    if kind == "plain":
        assert torch.equal(found["vote"], found["class_id"][:, 0])
        want = F.cross_entropy(model.classes(model.encoder(kept.inputs)), kept.labels.single_B)
        assert losses.total.item() == pytest.approx(want.item(), rel=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(JobError, match="use rotation"):
        check_views(transforms("color_perm"), 1, 8, 8)
    with pytest.raises(JobError, match="quarter turn of 8 x 6"):
        check_views(transforms("rotation"), 3, 8, 6)
    check_views(transforms("rotation2"), 3, 8, 6)
    model = ViewClassifier(MlpConfig(image_size=6, channels=1, hidden=(), dim=5), 3, SlaArm())
    model.views_id.fill_(identity_of(transforms("rotation2")))
    with pytest.raises(DataError, match="another list of views"):
        model.predict(batch())
