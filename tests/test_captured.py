"""An update as one program on fixed tensors: the same bits as the plain loop; the graph itself needs a GPU."""

import contextlib
import copy
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch

from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead
from l2g_meta.cli.main import main
from l2g_meta.data.augment import Augment
from l2g_meta.data.dataset import ClassDataset, MapDataset
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.errors import L2GError
from l2g_meta.training.captured import StaticUpdate
from l2g_meta.training.config import Config
from l2g_meta.training.loop import train
from l2g_meta.training.objectives import OBJECTIVES, meta_gradient
from l2g_meta.training.task_stream import arrange, positions_of_update, tasks_of_update

DATA = ClassDataset(np.random.default_rng(0).integers(0, 256, (60, 16, 16, 1), dtype=np.uint8), np.arange(60) // 6)
SHAPE = {"ways": 3, "shots": 1, "queries": 2, "outer_ways": 4}


def parts(config, *, device="cpu", augment=None, options=None, **adam):
    torch.manual_seed(0)
    options = options or {"mix": config.mix}
    wrapper = L2GWrapper(MetricModel(Conv4(1, 4), PrototypicalHead()), 0.05, **options).to(device)
    optimizer = torch.optim.Adam(wrapper.parameters(), **adam)
    return wrapper, optimizer, TaskPairs(DATA, **SHAPE, seed=3, augment=augment, device=device)


def static(config, wrapper, optimizer, pairs):
    positions = partial(positions_of_update, config)
    return StaticUpdate(OBJECTIVES[config.method], wrapper, optimizer, pairs, positions, partial(arrange, config))


@pytest.mark.parametrize("augment", [None, Augment(2)])
@pytest.mark.parametrize(
    "config",
    [
        Config(pairs=2),
        Config(pairs=2, mix=0.0),
        Config(method="maml", pairs=2),
        Config(method="episodic", pairs=1),
        Config(method="episodic", tasks_per_update=2),
    ],
    ids=lambda c: f"{c.method}-{c.tasks_per_update}-{c.mix}",
)
def test_same_bits_as_the_plain_loop(config, augment):
    config, seen = config.resolved(), []
    for fixed in (False, True):
        wrapper, optimizer, pairs = parts(config, augment=augment)
        update = static(config, wrapper, optimizer, pairs)
        for k in (0, 1, 2, 7):  # in and out of turn
            if fixed:
                stats, finite, _ = update(k)
                assert finite
            else:
                optimizer.zero_grad()
                stats = meta_gradient(OBJECTIVES[config.method], wrapper, tasks_of_update(config, pairs, k))
                optimizer.step()
        seen.append((torch.tensor(stats), wrapper.state_dict()))
    (stats, state), (static_stats, static_state) = seen
    assert torch.equal(stats.nan_to_num(), static_stats.nan_to_num())
    assert all(torch.equal(static_state[name], value) for name, value in state.items())


@pytest.mark.parametrize("options", [{"learn_inner_lr": "element"}, {"learn_inner_lr": "scalar", "mix": 0.5}], ids=str)
def test_same_bits_with_learned_steps(options):
    config, states = Config(pairs=2).resolved(), []
    for fixed in (False, True):
        wrapper, optimizer, pairs = parts(config, options=options)
        update = static(config, wrapper, optimizer, pairs)
        for k in range(3):
            if fixed:
                update(k)
            else:
                optimizer.zero_grad()
                meta_gradient(OBJECTIVES["l2g"], wrapper, tasks_of_update(config, pairs, k))
                optimizer.step()
        states.append(wrapper.state_dict())
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_a_recording_that_fails_falls_back_with_a_warning_and_changes_nothing(monkeypatch):
    """With PyTorch's CUDA calls replaced by ones that do nothing, and a recording that ends as a real one may."""

    @contextlib.contextmanager
    def refused(graph):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nfurther lines")

    config = Config(pairs=2).resolved()
    wrapper, optimizer, pairs = parts(config)
    update, cpu = static(config, wrapper, optimizer, pairs), torch.device("cpu")
    rows = update.drawn(0)
    before = copy.deepcopy(wrapper.state_dict())
    for name in ("CUDAGraph", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", refused)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    monkeypatch.setattr(update, "drawn", lambda k: rows)
    update.device = mock.MagicMock(type="cuda")
    need = (
        r"cannot record the update as a CUDA graph \(operation not permitted when stream is capturing\); running step"
    )
    with pytest.warns(UserWarning, match=need):
        assert not update.capture()
    update.device = cpu
    assert all(torch.equal(before[name], value) for name, value in wrapper.state_dict().items())
    assert update(0).finite


def test_what_cannot_be_a_fixed_program_is_refused():
    config = Config().resolved()
    wrapper, optimizer, _ = parts(config)
    varying = TaskPairs(DATA, ways={2, 3}, shots=1, queries=2)
    with pytest.raises(L2GError, match="need --ways, --shots and --queries as numbers"):
        static(config, wrapper, optimizer, varying)
    items = MapDataset([(torch.randn(1, 16, 16), k // 6) for k in range(60)], labels=np.arange(60) // 6)
    with pytest.raises(L2GError, match="leave --cuda-graph out"):
        static(config, wrapper, optimizer, TaskPairs(items, **SHAPE))
    with pytest.raises(L2GError, match="need an even --tasks-per-update"):
        Config(method="episodic", tasks_per_update=3, cuda_graph=True).resolved()


def test_data_that_cannot_be_captured_leaves_no_run(tmp_path):
    items = MapDataset([(torch.randn(1, 16, 16), k // 6) for k in range(60)], labels=np.arange(60) // 6)
    config = Config(cuda_graph=True, pairs=1, queries=2, ways=2, eval_episodes=1, device="cpu")
    with pytest.raises(L2GError, match="leave --cuda-graph out"):
        train(config, tmp_path / "run", data=items, validation=items, progress=False)
    assert not (tmp_path / "run").exists()


def test_without_a_gpu_the_flag_warns_and_trains_the_same(tmp_path):
    flags = "--iterations 2 --pairs 1 --queries 1 --eval-episodes 2 --image-size 28 --device cpu --out".split()
    assert main(["train", *flags, str(tmp_path / "plain")]) == 0
    with pytest.warns(UserWarning, match="a CUDA graph needs a CUDA device, got cpu; running step by step"):
        assert main(["train", *flags, str(tmp_path / "graph"), "--cuda-graph"]) == 0
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("plain", "graph")]
    for plain, graph in zip(*logs, strict=True):
        a, b = (line.split(",") for line in (plain, graph))
        assert a[:6] == b[:6] and a[7:-1] == b[7:-1]  # all but the seconds, and the checksum over them


@pytest.fixture
def deterministic(monkeypatch):
    """What the same bits are claimed for."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"mix": 0.5}, {"autocast": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("method", OBJECTIVES)
def test_a_replayed_graph_has_the_bits_of_the_eager_program(method, options, deterministic):
    config, states = Config(method=method, pairs=2).resolved(), []
    for captured in (False, True):
        lr = torch.tensor(1e-3, device="cuda")
        given = {"device": "cuda", "augment": Augment(2), "options": options or {"mix": 0.0}}
        wrapper, optimizer, pairs = parts(config, **given, lr=lr, capturable=True)
        update = static(config, wrapper, optimizer, pairs)
        before = copy.deepcopy(wrapper.state_dict())
        assert not captured or update.capture()
        assert all(torch.equal(before[name], value) for name, value in wrapper.state_dict().items())
        stats = [update(k).stats for k in range(4)]
        states.append((torch.tensor(stats).nan_to_num(), wrapper.state_dict()))
    assert torch.equal(states[0][0], states[1][0])
    assert all(torch.equal(states[1][1][name], value) for name, value in states[0][1].items())
