"""A run directory while a run is in it: locked, logged, saved; a process that does not log or save leaves it alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.data.identity import changes
from l2g_meta.errors import CheckpointError, NotFiniteError
from l2g_meta.evaluation.episodes import Evaluation
from l2g_meta.evaluation.world import World
from l2g_meta.files.locks import claim
from l2g_meta.files.tensors import load_tensors, make_folder, save_tensors
from l2g_meta.files.writing import remove_partial
from l2g_meta.training import checkpoints as state
from l2g_meta.training.checks import flag
from l2g_meta.training.config import Config
from l2g_meta.training.log import RunLog
from l2g_meta.training.objectives import UpdateStats
from l2g_meta.training.signals import Signals, Stopped, requeue
from l2g_meta.training.task_stream import positions_of_update
from l2g_meta.training.update import all_finite, culprit


def holds_run(out: Path) -> bool:
    """Whether a folder has a run, or what is left of one, that must not be begun anew."""
    states = state.numbers(out)
    left = ["config.json", "log.csv", "best.safetensors"]
    left += [] if 0 in states else ["last.safetensors"]  # a beginning that was killed has both, and loses nothing
    return any(states) or any((out / name).exists() for name in left)


class Run:
    """Holds a run directory for one process, or for the first of several.

    Args:
        out: the directory.
        config: of the run, resolved.
        world: the processes that train together.
        average: of the weights, if the run keeps one.
        keep_weights: whether those of each validation stay, as ``after-N.safetensors``.

    Raises:
        CheckpointError: on entering, if the folder cannot be written or another process trains in it.
    """

    def __init__(
        self,
        out: Path,
        config: Config,
        world: World,
        average: AveragedModel | None = None,
        *,
        keep_weights: bool = False,
    ):
        self.out, self.config, self.world = out, config, world
        self.average, self.keep_weights = average, keep_weights
        self.signals = Signals(str(out))
        self.stack = ExitStack()
        self.rows: RunLog | None = None

    def __enter__(self) -> Run:
        self.stack.enter_context(self.signals)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()
        if isinstance(error, Stopped) and self.world.main:
            requeue(error.code - 128)

    def begin(
        self,
        wrapper: L2GWrapper,
        optimizer: torch.optim.Optimizer,
        image_shape: Sequence[int],
        given: Sequence[str],
        data: Mapping[str, Any],
        n_classes: int | None = None,
    ) -> dict[str, Any]:
        """A new run: makes the folder and saves its beginning; returns the header of its states.

        Raises:
            CheckpointError: if the folder holds a run or cannot be written.
        """
        # What it takes to build the model again, and what of the run is not in its config.
        info: dict[str, Any] = {"iteration": 0, "best": -1.0, "best_iteration": None, "skipped": 0, "pending": None}
        info |= {} if n_classes is None else {"n_classes": n_classes}
        info |= {"image_shape": list(image_shape), "given": list(given)}
        info |= {"data": dict(data), "config": vars(self.config)}
        self.world.from_main(lambda: self._begin(wrapper, optimizer, info))
        self._share(wrapper, optimizer)
        return info

    def _begin(self, wrapper: L2GWrapper, optimizer: torch.optim.Optimizer, info: Mapping[str, Any]) -> None:
        if holds_run(self.out):
            raise CheckpointError(
                f"{self.out} already holds a run; continue it with --resume {self.out}, or choose another --out"
            )
        make_folder(self.out, "a folder for the run", "choose another --out")
        self._claim()
        state.save(self.out, wrapper, optimizer, info, average=self.average)
        self.config.save(self.out / "config.json")  # last: a folder that has it can be resumed

    def resume(
        self,
        wrapper: L2GWrapper,
        optimizer: torch.optim.Optimizer,
        given: Sequence[str],
        data: Mapping[str, Any],
        *,
        force: bool = False,
    ) -> dict[str, Any]:
        """Puts the newest sound state back; returns its header.

        Raises:
            CheckpointError: if no state is sound, it belongs to another model or was given other parts from Python, or,
                without ``force``, it belongs to another config or other data.
        """
        info = self.world.from_main(lambda: self._resume(wrapper, optimizer, given, data, force))
        self._share(wrapper, optimizer)
        return info

    def _resume(
        self,
        wrapper: L2GWrapper,
        optimizer: torch.optim.Optimizer,
        given: Sequence[str],
        data: Mapping[str, Any],
        force: bool,
    ) -> dict[str, Any]:
        if not self.out.is_dir():
            raise CheckpointError(f"need a run to resume, there is no folder {self.out}")
        self._claim()
        path, tensors, info = state.newest(self.out)
        if info["given"] != list(given):
            had, has = (" and ".join(names) or "no part" for names in (info["given"], given))
            raise CheckpointError(
                f"{self.out} was given its {had} from Python, now {has}; continue it with "
                "l2g_meta.train(..., resume=True) and the same parts"
            )
        stored = Config.from_json(info["config"]).resolved()
        difference = self.config.differences(stored)
        if difference and not force:
            raise CheckpointError(
                f"need the config that {self.out} was trained with so far, got {difference}; leave that out, begin "
                "another run, or go on with the new values by --force (train(..., force=True))"
            )
        if (other := changes(info.get("data"), data)) and not force:
            raise CheckpointError(
                f"need the data that {self.out} was trained on so far, got {other}; restore them, begin another "
                "run, or go on with these by --force (train(..., force=True))"
            )
        state.restore(tensors, wrapper, optimizer, path, self.average)
        wrapper.inner_lr.start(self.config.inner_lr)  # --force may have another
        config = self.config
        learned = {"inner_lr": config.learn_inner_lr, "temperature": config.learn_temperature, "weights": True}
        kept = [n for n, is_kept in learned.items() if is_kept and getattr(config, n) != getattr(stored, n)]
        if kept:
            flags = ", ".join(map(flag, kept))
            warnings.warn(f"{flags}: where training began; what has been learned since goes on", stacklevel=2)
        if info["iteration"] > self.config.iterations:
            raise CheckpointError(
                f"{self.out} has {info['iteration']} updates, need --iterations of at least as many, got "
                f"{self.config.iterations}"
            )
        info |= {"config": vars(self.config), "data": dict(data)}
        self._mend_last(wrapper, info)
        info = self._with_best(wrapper, info)
        self.config.save(self.out / "config.json")
        return info

    def open_log(self, info: Mapping[str, Any], *, progress: bool) -> None:
        """Starts or continues ``log.csv``."""
        if self.world.main:
            start = info["iteration"] - (info["pending"] is not None)
            self.rows = self.stack.enter_context(RunLog(self.out, self.config, start=start, progress=progress))

    def log(self, row: Mapping[str, Any]) -> None:
        """Writes one row."""
        if self.rows is not None:
            self.rows.write(row)

    def save_state(self, wrapper: L2GWrapper, optimizer: torch.optim.Optimizer, info: Mapping[str, Any]) -> None:
        """What resuming needs.

        Raises:
            NotFiniteError: if a weight is not finite; nothing is saved.
        """
        if not all_finite(wrapper.parameters()):
            raise NotFiniteError(
                f"a weight is not finite after update {info['iteration'] - 1}; lower --lr; the state before is saved"
            )
        if self.rows is not None:
            self.rows.sync()
            state.save(self.out, wrapper, optimizer, info, average=self.average)

    def save(
        self, wrapper: L2GWrapper, optimizer: torch.optim.Optimizer, info: Mapping[str, Any], result: Evaluation
    ) -> dict[str, Any]:
        """The state after a validation, and the best weights so far; returns the header of both."""
        info = {**info, "pending": None, "val_accuracy": result.accuracy_mean, "val_ways": result.ways}
        if result.accuracy_mean > info["best"]:
            info |= {"best": result.accuracy_mean, "best_iteration": info["iteration"]}
            if self.world.main:
                save_tensors(self.out / "best.safetensors", wrapper.state_dict(), info)
        if self.keep_weights and self.world.main:
            kept = {"": wrapper} if self.average is None else {"": wrapper, "-average": self.average.module}
            for which, module in kept.items():
                save_tensors(self.out / f"after-{info['iteration']}{which}.safetensors", module.state_dict(), info)
        self.save_state(wrapper, optimizer, info)
        return info

    def saved(self, info: Mapping[str, Any]) -> AbstractContextManager[None]:
        """While nothing is unsaved, a signal ends the run at once."""
        return self.signals.saved(self._stopped(info["iteration"]), alone=self.world.size == 1)

    def stop(self, asked: int, iteration: int) -> None:
        """Ends the run for a signal to any of its processes, its state being saved.

        Raises:
            Stopped: always.
        """
        self.world.wait()  # for the main process, which saved
        raise Stopped(self._stopped(iteration), asked, str(self.out))

    def not_finite(self, k: int, stats: UpdateStats, wrapper: L2GWrapper) -> None:
        """Ends a run whose update k found a number that is not finite, unless such updates are to be left out.

        Raises:
            NotFiniteError: with the update, its tasks, and which number it is.
        """
        if self.config.skip_nonfinite:
            return
        positions = positions_of_update(self.config, k)
        raise NotFiniteError(
            f"update {k} (pairs {positions.start} to {positions.stop - 1} of the stream of seed {self.config.seed}) "
            f"found a number that is not finite: {culprit(self.config, stats, wrapper)}; nothing was changed. Lower "
            "--inner-lr or --lr, use --dims mean, or leave such updates out with --skip-nonfinite"
        )

    def _claim(self) -> None:
        if not self.stack.enter_context(claim(self.out / ".lock")):
            raise CheckpointError(
                f"another process trains in {self.out}; wait for it or stop it, or choose another --out"
            )
        remove_partial(self.out)

    def _share(self, wrapper: L2GWrapper, optimizer: torch.optim.Optimizer) -> None:
        if self.world.size > 1:  # other machines may not see the folder, and a given model may differ
            tensors = self.world.from_main(
                lambda: {name: t.cpu() for name, t in state.collect(wrapper, optimizer, self.average).items()}
            )
            if not self.world.main:
                state.restore(tensors, wrapper, optimizer, self.out, self.average)

    def _mend_last(self, wrapper: L2GWrapper, info: Mapping[str, Any]) -> None:
        try:
            load_tensors(self.out / "last.safetensors")
        except CheckpointError as error:
            warnings.warn(f"{error}; made again from the state after update {info['iteration']}", stacklevel=2)
            save_tensors(self.out / "last.safetensors", wrapper.state_dict(), info)

    def _with_best(self, wrapper: L2GWrapper, info: dict[str, Any]) -> dict[str, Any]:
        """Makes sure that the best weights so far are there and sound; returns the header that says which they are."""
        if info["best_iteration"] is None:
            return info
        path = self.out / "best.safetensors"
        try:
            load_tensors(path)
            return info
        except CheckpointError as error:
            kept = state.weights_after(self.out, info["best_iteration"])
            if kept is not None:
                warnings.warn(f"{error}; made again from the state after update {info['best_iteration']}", stacklevel=2)
                save_tensors(path, *kept)
                return info
            over = info["iteration"] >= self.config.iterations
            warnings.warn(
                f"{error}; the best weights of {info['best']:.2f} % at update {info['best_iteration']} are lost, "
                f"{'the last ones are' if over else 'the best of what follows is'} kept instead",
                stacklevel=2,
            )
            if over:
                save_tensors(path, wrapper.state_dict(), info)
                return info
            return {**info, "best": -1.0, "best_iteration": None}

    def _stopped(self, iteration: int) -> str:
        return f"stopped after update {iteration} of {self.config.iterations}, saved"
