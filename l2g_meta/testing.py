"""Oracles and laws that every metric head must pass: run them on your own with ``check_head(MyHead)``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters
from torch.nn.utils.stateless import _reparametrize_module as _parameters  # what functional_call enters

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.inner.scores import loss_fn_of
from l2g_meta.models.batchnorm_policy import batchnorm_policy
from l2g_meta.models.metric import MetricModel, build_head
from l2g_meta.task import Task

Law = Callable[[nn.Module, tuple[int, ...]], None]
ALPHA = 0.05


class HeadReport(NamedTuple):
    """What ``check_head`` found of a head that can be trained.

    Args:
        holds: names of the laws that hold.
        findings: advisory laws that do not, each by its name, and how.
    """

    holds: tuple[str, ...]
    findings: tuple[str, ...]


def check_head(
    head: Callable[..., nn.Module] | nn.Module, *, feature_shape: tuple[int, ...] = (4, 4, 4), seed: int = 0
) -> HeadReport:
    """Runs every law below on a head, in float64, behind small encoders with and without BatchNorm.

    Args:
        head: a class or factory, whose ``channels``, ``map_size`` or ``dim`` arguments are filled in from
            ``feature_shape``, or a ready head for such features.
        feature_shape: (C, H, W) of maps, or (d,) of vectors, that the head takes.
        seed: of weights and tasks; PyTorch's generator is left as it was.

    Returns:
        The laws that hold, and findings. ``queries_are_scored_apart`` is advisory for all heads,
        ``a_support_is_known_again`` for those with trainable parameters, which training may teach it.

    Raises:
        AssertionError: naming the first law that fails, and how.
        FitError: if the head cannot be built for such features.

    Example:
        >>> from l2g_meta import PrototypicalHead
        >>> report = check_head(PrototypicalHead)
        >>> len(report.holds) == len(LAWS), report.findings
        (True, ())
    """
    holds, findings = [], []
    for law in LAWS:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            made = copy.deepcopy(head) if isinstance(head, nn.Module) else build_head(head, feature_shape)
            learned = any(p.requires_grad for p in made.parameters())
            try:
                law(made.double(), feature_shape)
                holds.append(law.__name__)
            except Exception as error:  # whatever a broken head raises
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                if kind or not (law is queries_are_scored_apart or (law is a_support_is_known_again and learned)):
                    raise AssertionError(f"{law.__name__}: {kind}{error}") from error
                findings.append(f"{law.__name__} (advisory): {error}")
    return HeadReport(tuple(holds), tuple(findings))


def scores_have_one_column_per_class(head: nn.Module, shape: tuple[int, ...]) -> None:
    """Scores are (n_query, n_way) for uneven shots and queries, and of the features' dtype; the loss is a scalar."""
    support_y, query_y = torch.tensor([2, 0, 1, 2, 0]), torch.tensor([1, 1, 0, 2, 1, 1, 0])
    scores = head(_features(5, shape), support_y, _features(7, shape), 3)
    assert scores.shape == (7, 3), f"need scores (n_query, n_way) = (7, 3), got {tuple(scores.shape)}"
    assert scores.dtype == torch.float64, f"need float64 scores from float64 features, got {scores.dtype}"
    loss = loss_fn_of(head)(scores, query_y)
    assert loss.shape == () and torch.isfinite(loss), f"need a finite scalar loss, got {loss}"


def the_loss_has_a_gradient(head: nn.Module, shape: tuple[int, ...]) -> None:
    """The gradient of the task loss is not zero for all parameters: there is something to train."""
    (model, (task, _)), _ = _problems(head, shape)
    norm = _gradient(model, L2GWrapper(model, ALPHA).loss(task)).norm()
    assert norm > 1e-12, "need a gradient, got zero for all parameters; look for constant scores or zero projections"


def relabelling_permutes_columns(head: nn.Module, shape: tuple[int, ...]) -> None:
    """Other numbers for the same classes, supports in the same order, permute the score columns and nothing else."""
    support, query, y = _features(6, shape), _features(4, shape), torch.arange(6) % 3
    new_number = torch.tensor([2, 0, 1])
    with batchnorm_policy(head, "running"):
        before, after = head(support, y, query, 3), head(support, new_number[y], query, 3)
    _close(after[:, new_number], before, "columns after relabelling against the same classes' before")


def a_support_is_known_again(head: nn.Module, shape: tuple[int, ...]) -> None:
    """A query equal to the only support of one class scores that class highest; advisory for heads with parameters."""
    y = torch.tensor([2, 0, 1])
    for z in _features(12, shape).split(3):
        # Of one length, so that dot products obey, too; single numbers would all be 1 or -1.
        z = nn.functional.normalize(z.flatten(1)).view_as(z) if z[0].numel() > 1 else z
        with batchnorm_policy(head, "running"):
            scores = head(z, y, z, 3)
        got, known = scores.detach().numpy().round(3).tolist(), torch.equal(scores.argmax(1), y)
        assert known, f"need the highest score for what the query is, {y.tolist()}, got {got}; check the sign"


def cross_entropy_gets_no_probabilities(head: nn.Module, shape: tuple[int, ...]) -> None:
    """Scores under cross-entropy are no probabilities: it takes the softmax itself, and a second one flattens it."""
    query_y = torch.tensor([0, 1, 2, 0])
    with batchnorm_policy(head, "running"):
        scores = head(_features(3, shape), torch.arange(3), _features(4, shape), 3)
    mean = scores.sum(1).mean()
    probabilities = (scores >= 0).all() and torch.allclose(scores.sum(1), mean) and 0.5 < mean < 1.01
    loss, shifted = (loss_fn_of(head)(s, query_y) for s in (scores, scores + 1))
    twice = probabilities and torch.allclose(loss, shifted)  # a softmax does not see the shift
    assert not twice, "need logits for cross-entropy, got probabilities; leave the softmax out"


def queries_are_scored_apart(head: nn.Module, shape: tuple[int, ...]) -> None:
    """A query's scores do not depend on the other queries: the head is inductive. Advisory for all heads."""
    support, y, query = _features(4, shape), torch.tensor([0, 1, 0, 1]), _features(5, shape)
    others = torch.cat([query[:2], _features(3, shape)])
    with batchnorm_policy(head, "running"):
        difference = (head(support, y, query, 2) - head(support, y, others, 2))[:2].abs().max()
    assert difference < 1e-9, (
        f"transductive: other queries beside it change a query's scores by {difference:.1e}; report results as such"
    )


def nothing_is_remembered(head: nn.Module, shape: tuple[int, ...]) -> None:
    """Scores of a task are the same before and after another task was scored: nothing of an episode is stored."""
    tasks = [(_features(4, shape), torch.tensor([0, 1, 0, 1]), _features(3, shape), 2) for _ in range(2)]
    with batchnorm_policy(head, "running"):
        first, _, again = (head(*tasks[k]) for k in (0, 1, 0))
    _close(again, first, "scores of a task before and after another one")


def copies_agree(head: nn.Module, shape: tuple[int, ...]) -> None:
    """A deep copy and a reloaded state dict give the same scores."""
    task = (_features(4, shape), torch.tensor([0, 1, 0, 1]), _features(3, shape), 2)
    twin = copy.deepcopy(head)
    twin.load_state_dict(head.state_dict())
    with batchnorm_policy(head, "running"), batchnorm_policy(twin, "running"):
        _close(twin(*task), head(*task), "scores of a copy")


def derivatives_exist_at_a_support(head: nn.Module, shape: tuple[int, ...]) -> None:
    """First and second derivatives are finite where queries equal supports or prototypes, and for dead features."""
    y = torch.arange(2)
    for support in (_features(2, shape).requires_grad_(), torch.zeros(2, *shape).double().requires_grad_()):
        loss = loss_fn_of(head)(head(support, y, support.clone(), 2), y)
        (first,) = torch.autograd.grad(loss, support, create_graph=True)
        (second,) = torch.autograd.grad((first.square() + first + 0 * support).sum(), support)
        assert torch.isfinite(first).all(), "the gradient is not finite where a query equals a support"
        assert torch.isfinite(second).all(), "the second derivative is not finite where a query equals a support"


def task_loss_is_twice_differentiable(head: nn.Module, shape: tuple[int, ...]) -> None:
    """``gradcheck`` and ``gradgradcheck`` of the task loss, in features and the head's parameters."""
    support, query = _features(4, shape).requires_grad_(), _features(3, shape).requires_grad_()
    parameters = {name: p.detach().requires_grad_() for name, p in head.named_parameters() if p.requires_grad}

    def loss(support: Tensor, query: Tensor, *values: Tensor) -> Tensor:
        with _parameters(head, dict(zip(parameters, values, strict=True)), tie_weights=True):  # also of loss_fn
            return loss_fn_of(head)(head(support, torch.tensor([0, 1, 0, 1]), query, 2), torch.tensor([0, 1, 1]))

    inputs = (support, query, *parameters.values())
    with batchnorm_policy(head, "batch"), torch.random.fork_rng(devices=[]):
        torch.autograd.gradcheck(loss, inputs, fast_mode=True, atol=1e-5)
        torch.autograd.gradgradcheck(loss, inputs, fast_mode=True, atol=1e-4)


def no_inner_step_gives_the_plain_gradient(head: nn.Module, shape: tuple[int, ...]) -> None:
    """α = 0: the meta-gradient is ∇L(θ; T_j)."""
    for model, (task_i, task_j) in _problems(head, shape):
        plain = _gradient(model, L2GWrapper(model, 0.0).loss(task_j))
        _close(_gradient(model, L2GWrapper(model, 0.0)(task_i, task_j)), plain, "meta-gradient at α = 0")


def meta_gradient_matches_finite_differences(head: nn.Module, shape: tuple[int, ...]) -> None:
    """The exact meta-gradient against central differences of L(θ − α∇L(θ; T_i); T_j) along random directions."""
    step = 1e-7  # small, for heads that are nearly kinked (smooth L1, square roots)
    for model, tasks in _problems(head, shape):
        wrapper = L2GWrapper(model, ALPHA)
        gradient = _gradient(model, wrapper(*tasks))
        parameters = [p for p in model.parameters() if p.requires_grad]
        start = _flat(parameters).detach()
        for direction in torch.randn(3, len(start), dtype=start.dtype):
            values = []
            for t in (-step, step):
                vector_to_parameters(start + t * direction, parameters)
                values.append(wrapper(*tasks).detach())
            numeric = (values[1] - values[0]) / (2 * step)
            _close(gradient @ direction, numeric, "meta-gradient and finite differences", rtol=1e-5, atol=1e-6)


def meta_gradient_matches_torch_func(head: nn.Module, shape: tuple[int, ...]) -> None:
    """The exact meta-gradient against ``torch.func.grad`` of the same expression, written without the wrapper."""
    for model, (task_i, task_j) in _problems(head, shape):
        trainable = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        expected = torch.func.grad(functional_meta_loss(model, ALPHA, task_i, task_j))(trainable)
        actual = _gradient(model, L2GWrapper(model, ALPHA)(task_i, task_j))
        _close(actual, _flat(expected.values()), "meta-gradient against torch.func", rtol=1e-8, atol=1e-10)


def second_order_is_kept(head: nn.Module, shape: tuple[int, ...]) -> None:
    """The first-order meta-gradient differs from the exact one: no inner graph is lost silently."""
    for model, tasks in _problems(head, shape):
        exact, first = (_gradient(model, L2GWrapper(model, ALPHA, first_order=f)(*tasks)) for f in (False, True))
        difference = (exact - first).norm() / exact.norm()
        assert difference > 1e-6, f"exact and first-order meta-gradients differ by {difference:.1e} only: graph lost?"


LAWS: tuple[Law, ...] = (
    scores_have_one_column_per_class,
    the_loss_has_a_gradient,
    relabelling_permutes_columns,
    a_support_is_known_again,
    cross_entropy_gets_no_probabilities,
    queries_are_scored_apart,
    nothing_is_remembered,
    copies_agree,
    derivatives_exist_at_a_support,
    task_loss_is_twice_differentiable,
    no_inner_step_gives_the_plain_gradient,
    meta_gradient_matches_finite_differences,
    meta_gradient_matches_torch_func,
    second_order_is_kept,
)


def functional_meta_loss(
    model: nn.Module, alpha: float, task_i: Task, task_j: Task
) -> Callable[[dict[str, Tensor]], Tensor]:
    """L(θ − α∇L(θ; T_i); T_j) as a pure function of the trainable parameters: the independent, slow reference.

    Args:
        model: any module that ``L2GWrapper`` takes; BatchNorm uses batch statistics and updates none.
        alpha: step size.
        task_i: inner task.
        task_j: outer task.
    """

    def loss(parameters: dict[str, Tensor], task: Task) -> Tensor:
        with batchnorm_policy(model, "batch"), _parameters(model, parameters, tie_weights=True):  # also of loss_fn
            return loss_fn_of(model)(model(task), task.query_y)

    def meta_loss(parameters: dict[str, Tensor]) -> Tensor:
        inner = torch.func.grad(loss)(parameters, task_i)
        return loss({name: p - alpha * inner[name] for name, p in parameters.items()}, task_j)

    return meta_loss


def random_task(image_shape: tuple[int, ...], *, n_way: int = 2, shots: int = 1, queries: int = 3) -> Task:
    """A task of float64 noise, from PyTorch's global generator."""
    x, y = _features(n_way * (shots + queries), image_shape), torch.arange(n_way)
    return Task(x[: n_way * shots], y.repeat(shots), x[n_way * shots :], y.repeat(queries), n_way)


def _problems(head: nn.Module, shape: tuple[int, ...]) -> list[tuple[MetricModel, tuple[Task, Task]]]:
    """A smooth encoder without and with BatchNorm in front of the head, and a pair of tasks."""
    problems = []
    for norm in (False, True):
        maps = len(shape) == 3
        layer = nn.Conv2d(2, shape[0], 3, padding=1, bias=not norm) if maps else nn.Linear(6, shape[0])
        norms = [(nn.BatchNorm2d if maps else nn.BatchNorm1d)(shape[0])] * norm
        model = MetricModel(nn.Sequential(layer, *norms, nn.Softplus()), copy.deepcopy(head)).double()
        image_shape = (2 if maps else 6, *shape[1:])
        for dropout in (m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)):
            dropout.p = 0.0  # noise would make two evaluations of one loss differ
        problems.append((model, (random_task(image_shape), random_task(image_shape))))
    return problems


def _gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """∂ loss / ∂ trainable parameters, flat."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return _flat(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _features(n: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(n, *shape, dtype=torch.float64)


def _close(actual: Tensor, expected: Tensor, what: str, *, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda m: f"{what} differ: {m}")
