"""The methods between loop and losses: which activations they ask for, what they weigh, what they remember."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cka_probe.activations.stage_shapes import as_map
from cka_probe.activations.taps import Taps
from cka_probe.distill import losses
from cka_probe.distill.config import Training
from cka_probe.distill.methods import METHODS
from cka_probe.distill.methods.crd import CRD
from cka_probe.distill.methods.dkd import DKD
from cka_probe.distill.methods.fitnet import FitNet
from cka_probe.distill.methods.kd import KD
from cka_probe.distill.methods.loss import MethodLoss, Setting, StepInputs
from cka_probe.distill.methods.ofa import OFA
from cka_probe.distill.methods.rkd import RKD
from cka_probe.distill.methods.rsd import RSD
from cka_probe.distill.methods.stage_choice import StageChoice
from cka_probe.distill.methods.visual_words.bag_method import BagMethod
from cka_probe.distill.subjects import examine
from cka_probe.distill.training.train import distill
from cka_probe.errors import SpecError
from cka_probe.networks.models import load_subject
from tests.distill import paper_oracles as papers
from tests.distill.conftest import NETWORKS, spec

CPU = torch.device("cpu")
N = 8
Make = Callable[..., Setting]


@pytest.fixture(scope="module")
def sides() -> tuple[Any, Any]:
    return tuple(examine(load_subject(spec(name)), "stages", CPU) for name in ("tiny_vit", "teacher"))  # type: ignore[return-value]


@pytest.fixture
def make(sides: tuple[Any, Any]) -> Make:
    """A setting with some options, and stages chosen."""

    def build(chosen: tuple[int, ...] = (), matches: tuple[str, ...] = (), **options: Any) -> Setting:
        config = Training(student="student", teacher="teacher", **options)
        return Setting(config, 3, 40, sides[0].side, sides[1].side, chosen, matches)

    return build


def seen_by(method: MethodLoss, setting: Setting) -> StepInputs:
    """A batch of noise."""
    assert setting.teacher is not None
    images = torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    logits, taken = Taps(setting.student.network, method.student_layers).run(images)
    with torch.no_grad():
        teacher_logits, teacher_taken = Taps(setting.teacher.network, method.teacher_layers).run(images)
    teacher_taken = method.of_teacher(teacher_taken)
    return StepInputs(images, torch.arange(N) % 3, torch.arange(N), logits, taken, teacher_logits, teacher_taken)


def test_one_gamma_is_a_number_or_a_tuple_of_one() -> None:
    OFA(gamma=1.2).check()
    assert OFA(gamma=1.2) == OFA(gamma=(1.2,)) == OFA(gamma=np.float64(1.2))
    with pytest.raises(SpecError, match="--gamma must be finite numbers, each of at least 1"):
        OFA(gamma=0.5).check()


def test_ofa_weighs_its_branches_to_one_sum_and_gives_each_its_gamma(make: Make) -> None:
    setting = make((1, 3), smoothing=0.0)
    ofa = OFA(gamma=(1.1, 1.2, 1.3, 1.4, 1.5), branch_weight=0.5, kd_weight=2.0)
    method = ofa.build(setting).eval()
    seen = seen_by(method, setting)
    parts = method(seen)
    student, teacher = (z.detach().double().numpy() for z in (seen.logits, seen.teacher_logits))
    labels = seen.target.numpy()
    assert list(parts) == ["ce", "ofa", "branch_1", "branch_3"]
    assert parts["ofa"].item() == pytest.approx(2 * papers.ofa(student, teacher, labels, gamma=1.5), rel=1e-5)
    for index, (stage, gamma) in enumerate(((1, 1.1), (3, 1.3))):
        logits = method.trained[index](seen.taken[index]).detach().double().numpy()
        expected = 0.5 * 4 / 2 * papers.ofa(logits, teacher, labels, gamma=gamma)
        assert parts[f"branch_{stage}"].item() == pytest.approx(expected, rel=1e-5)


def double(logits: Tensor) -> np.ndarray[Any, Any]:
    return np.asarray(logits.detach().double().numpy())


def test_standardized_logits_are_those_of_teacher_student_and_branches(make: Make) -> None:
    setting = make((1,))
    kd, dkd, ofa = (kind(standardize_logits=True, temperature=2.0, kd_weight=9.0) for kind in (KD, DKD, OFA))
    seen = seen_by(ofa.build(setting), setting)
    arrays, labels = (double(seen.logits), double(seen.teacher_logits)), seen.target.numpy()
    assert kd.build(setting)(seen)["kd"].item() == pytest.approx(9 * papers.kd_standardized(*arrays, 2.0), rel=1e-5)
    expected = papers.dkd_standardized(*arrays, labels, alpha=1.0, beta=2.0, temperature=2.0)
    assert dkd.build(setting)(seen)["dkd"].item() == pytest.approx(9 * expected, rel=1e-5)
    method = ofa.build(setting).eval()
    parts = method(seen)
    expected = 9 * papers.ofa_standardized(*arrays, labels, temperature=2.0)
    assert parts["ofa"].item() == pytest.approx(expected, rel=1e-5)
    branch = double(method.trained[0](seen.taken[0]))
    # One branch has the weight of four.
    expected = 4 * papers.ofa_standardized(branch, arrays[1], labels, temperature=2.0)
    assert parts["branch_1"].item() == pytest.approx(expected, rel=1e-5)


def test_ofa_without_stages_is_cross_entropy_and_the_final_logits(make: Make) -> None:
    setting = make(())
    method = OFA().build(setting)
    assert list(method(seen_by(method, setting))) == ["ce", "ofa"]
    assert not list(method.parameters())


def test_every_loss_reaches_the_student_and_never_the_teacher(make: Make) -> None:
    for name, kind in METHODS.items():
        if issubclass(kind, BagMethod):  # they need larger maps: see test_words.py
            continue
        setting = make(
            (1, 4) if issubclass(kind, StageChoice) else (), ("stages.0", "stages.3") if name == "fitnet" else ()
        )
        assert setting.teacher is not None
        method = kind().build(setting)
        setting.student.network.zero_grad()
        sum(method(seen_by(method, setting)).values()).backward()  # type: ignore[union-attr]
        assert all(p.grad is not None for n, p in setting.student.network.named_parameters() if "blocks.0" in n), name
        assert all(parameter.grad is None for parameter in setting.teacher.network.parameters()), name
        assert all(parameter.grad is not None for parameter in method.parameters()), name


def test_fitnet_compares_tokens_on_their_grid_with_maps(make: Make) -> None:
    setting = make((2,), ("stages.1",))
    method = FitNet(feature_weight=3.0).build(setting)
    seen = seen_by(method, setting)
    tokens, teacher = seen.taken[0], seen.teacher_taken[0]
    assert (tokens.shape, teacher.shape) == ((N, 17, 16), (N, 8, 4, 4))
    grid = torch.zeros(N, 16, 4, 4)
    for row in range(4):
        for column in range(4):
            grid[:, :, row, column] = tokens[:, 1 + 4 * row + column]
    torch.testing.assert_close(as_map(tokens, setting.student.shapes[1]), grid)
    expected = 3 * (method.trained[0](grid) - teacher).square().mean()
    torch.testing.assert_close(method(seen)["hint_2"], expected)


def test_rsd_projects_the_student_to_the_teacher_s_width(make: Make) -> None:
    setting = make()
    rsd = RSD(feature_weight=0.5, kappa=0.2)
    method = rsd.build(setting)
    seen = seen_by(method, setting)
    first, norm, _, last = method.trained
    assert [tuple(weight.shape) for weight in method.parameters()] == [(32, 16), (32,), (32,), (8, 32)]
    torch.testing.assert_close(
        torch.cat([first.weight.flatten(), last.weight.flatten()]).std().item(), 0.02, atol=2e-3, rtol=0
    )
    hidden = nn.functional.batch_norm(seen.taken[0][:, 0] @ first.weight.T, None, None, training=True, eps=norm.eps)
    projected = nn.functional.gelu(hidden) @ last.weight.T
    expected = 0.5 * losses.rsd_loss(projected, seen.teacher_taken[0], kappa=0.2)
    torch.testing.assert_close(method(seen)["rsd"], expected)


def test_crd_remembers_half_of_what_it_sees_and_draws_no_image_against_itself(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = make()
    method = CRD(feature_weight=1.0).build(setting)
    bank = method.trained
    before, compared = bank.memory.clone(), []

    def watched(cosines: Tensor, log_mean: Tensor, **options: Any) -> Tensor:
        compared.append(cosines)
        return losses.crd_loss(cosines, log_mean, **options)

    monkeypatch.setattr("cka_probe.distill.memory_bank.crd_loss", watched)
    teacher_before = bank.teacher_memory.clone()
    seen = seen_by(method, setting)
    method(seen)
    embedding = nn.functional.normalize(bank.embed(seen.taken[0][:, 0]), dim=1)  # the class token
    moved = nn.functional.normalize(0.5 * before[:N] + 0.5 * embedding, dim=1)
    torch.testing.assert_close(bank.memory[:N], moved.detach())
    assert torch.equal(bank.memory[N:], before[N:])
    assert compared[0].shape == (N, 1 + 39)
    torch.testing.assert_close(compared[0][:, 0], (embedding * teacher_before[:N]).sum(1))
    assert not torch.isclose(compared[0][:, 1:], compared[0][:, :1]).any()


def test_crd_takes_what_it_divides_by_from_the_first_batch_and_keeps_it(make: Make) -> None:
    setting = make()
    method = CRD(feature_weight=1.0).build(setting)
    seen = seen_by(method, setting)
    bank = method.trained
    assert bank.log_mean_of_memory.isnan()
    method(seen)
    first = bank.log_mean_of_memory.clone(), bank.log_mean_of_teacher_memory.clone()
    assert first[0].isfinite()
    assert first[0] != first[1]
    method(seen)
    assert (bank.log_mean_of_memory, bank.log_mean_of_teacher_memory) == first
    again = CRD(feature_weight=1.0).build(setting)
    again.load_state_dict(method.state_dict())
    again(seen)
    assert (again.trained.log_mean_of_memory, again.trained.log_mean_of_teacher_memory) == first


def test_state_that_checkpoints_keep_is_in_buffers(make: Make) -> None:
    first, second = (CRD().build(make()) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.trained.memory, second.trained.memory)


def test_a_feature_weight_of_zero_is_zero(make: Make) -> None:
    setting = make()
    method = RKD(feature_weight=0.0).build(setting)
    parts = method(seen_by(method, setting))
    assert parts["distance"] == parts["angle"] == 0


def test_mixed_targets_reach_every_method(make: Make) -> None:
    soft = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(3), N)).float()
    for name, kind in METHODS.items():
        setting = make((1,) if issubclass(kind, StageChoice) else (), ("stages.0",) if name == "fitnet" else ())
        method = kind().build(setting)
        parts = method(replace(seen_by(method, setting), target=soft))
        assert all(part.isfinite() for part in parts.values()), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "float64"])
def test_networks_of_any_floating_type_teach_and_learn(
    options: Callable[..., Training], tmp_path: Path, kind: str
) -> None:
    file = tmp_path / "nets.py"
    file.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(NETWORKS.parents[2])!r})\n"
        "from tests.distill.networks import teacher, tiny_vit\n"
        f"def student(): return tiny_vit().to(torch.{kind})\n"
        f"def knowing(): return teacher().to(torch.{kind})\n"
    )
    config = options(student=f"{file}:student", teacher=f"{file}:knowing", epochs=1, warmup_epochs=0)
    done = distill(config, tmp_path / "run")
    assert done.student is not None
    assert {weight.dtype for weight in done.student.parameters()} == {getattr(torch, kind)}
    assert done.teacher is not None
    assert done.teacher.top1 == 1
