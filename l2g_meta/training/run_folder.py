"""A run directory while a run is in it: locked, logged, saved; a process that does not log or save leaves it alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
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
from l2g_meta.training.signals import Signals, Stopped
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
        wrapper: the model and its step sizes.
        optimizer: of its parameters.
        average: of the weights, if the run keeps one.
        given: which parts came from Python.
        data: what identifies the data of each split.
        keep_weights: whether those of each validation stay, as ``after-N.safetensors``.

    Raises:
        CheckpointError: on entering, if the folder cannot be written or another process trains in it.
    """

    def __init__(
        self,
        out: Path,
        config: Config,
        world: World,
        wrapper: L2GWrapper,
        optimizer: torch.optim.Optimizer,
        *,
        average: AveragedModel | None = None,
        given: Sequence[str] = (),
        data: Mapping[str, Any] | None = None,
        keep_weights: bool = False,
    ):
        self.out, self.config, self.world, self.keep_weights = out, config, world, keep_weights
        self.wrapper, self.optimizer, self.average = wrapper, optimizer, average
        self.given, self.data = list(given), dict(data or {})
        self.signals = Signals(str(out))
        self.stack = ExitStack()
        self.rows: RunLog | None = None

    def __enter__(self) -> Run:
        self.stack.enter_context(self.signals)
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def begin(self, image_shape: Sequence[int], n_classes: int | None = None) -> dict[str, Any]:
        """A new run: makes the folder and saves its beginning; returns the header of its states.

        Raises:
            CheckpointError: if the folder holds a run or cannot be written.
        """
        # What it takes to build the model again, and what of the run is not in its config.
        info: dict[str, Any] = {"iteration": 0, "best": -1.0, "best_iteration": None, "skipped": 0, "pending": None}
        info |= {} if n_classes is None else {"n_classes": n_classes}
        info |= {"image_shape": list(image_shape), "given": self.given}
        info |= {"data": self.data, "config": vars(self.config)}
        self.world.from_main(lambda: self._begin(info))
        self._share()
        return info

    def _begin(self, info: Mapping[str, Any]) -> None:
        if holds_run(self.out):
            raise CheckpointError(f"{self.out} already holds a run; --resume {self.out}, or choose another --out")
        make_folder(self.out, "a folder for the run", "choose another --out")
        self._claim()
        state.save(self.out, self.wrapper, self.optimizer, info, average=self.average)
        self.config.save(self.out / "config.json")  # last: a folder that has it can be resumed

    def resume(self, *, force: bool = False) -> dict[str, Any]:
        """Puts the newest sound state back; returns its header.

        Raises:
            CheckpointError: if no state is sound, it belongs to another model or was given other parts from Python, or,
                without ``force``, it belongs to another config or other data.
        """
        info = self.world.from_main(lambda: self._resume(force))
        self._share()
        return info

    def _resume(self, force: bool) -> dict[str, Any]:
        if not self.out.is_dir():
            raise CheckpointError(f"need a run to resume, there is no folder {self.out}")
        self._claim()
        path, tensors, info = state.newest(self.out)
        if info["given"] != self.given:
            had, has = (" and ".join(names) or "no part" for names in (info["given"], self.given))
            raise CheckpointError(
                f"{self.out} was given its {had} from Python, now {has}; continue it with "
                "l2g_meta.train(..., resume=True) and the same parts"
            )
        stored, config = Config.from_json(info["config"]).resolved(), self.config
        for name, other, remedy in (
            ("config", config.differences(stored), "leave that out, begin another run, or go on with the new values"),
            ("data", changes(info.get("data"), self.data), "restore them, begin another run, or go on with these"),
        ):
            if other and not force:
                raise CheckpointError(
                    f"need the {name} that {self.out} was trained {'with' if name == 'config' else 'on'} so far, got "
                    f"{other}; {remedy} by --force (train(..., force=True))"
                )
        state.restore(tensors, self.wrapper, self.optimizer, path, self.average)
        self.wrapper.inner_lr.start(config.inner_lr)  # --force may have another
        learned = {"inner_lr": config.learn_inner_lr, "temperature": config.learn_temperature, "weights": True}
        kept = [n for n, is_kept in learned.items() if is_kept and getattr(config, n) != getattr(stored, n)]
        if kept:
            flags = ", ".join(map(flag, kept))
            warnings.warn(f"{flags}: where training began; what has been learned since goes on", stacklevel=2)
        if (n := info["iteration"]) > config.iterations:
            raise CheckpointError(f"{self.out} has {n} updates, need --iterations {n} or more, got {config.iterations}")
        info |= {"config": vars(config), "data": self.data}
        info = self._mended(info)
        config.save(self.out / "config.json")
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

    def save_state(self, info: Mapping[str, Any]) -> None:
        """What resuming needs.

        Raises:
            NotFiniteError: if a weight is not finite; nothing is saved.
        """
        if not all_finite(self.wrapper.parameters()):
            raise NotFiniteError(
                f"a weight is not finite after update {info['iteration'] - 1}; lower --lr; the state before is saved"
            )
        if self.rows is not None:
            self.rows.sync()
            state.save(self.out, self.wrapper, self.optimizer, info, average=self.average)

    def save(self, info: Mapping[str, Any], result: Evaluation) -> dict[str, Any]:
        """The state after a validation, and the best weights so far; returns the header of both."""
        info = {**info, "pending": None, "val_accuracy": result.accuracy_mean, "val_ways": result.ways}
        if result.accuracy_mean > info["best"]:
            info |= {"best": result.accuracy_mean, "best_iteration": info["iteration"]}
            if self.world.main:
                self._save_weights("best", info)
        if self.keep_weights and self.world.main:
            self._save_weights(f"after-{info['iteration']}", info)
            if self.average is not None:
                self._save_weights(f"after-{info['iteration']}-average", info, self.average.module)
        self.save_state(info)
        return info

    def _save_weights(self, name: str, info: Mapping[str, Any], module: nn.Module | None = None) -> None:
        save_tensors(self.out / f"{name}.safetensors", (module or self.wrapper).state_dict(), info)

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

    def not_finite(self, k: int, stats: UpdateStats) -> None:
        """Ends a run whose update k found a number that is not finite, unless such updates are to be left out.

        Raises:
            NotFiniteError: with the update, its tasks, and which number it is.
        """
        if self.config.skip_nonfinite:
            return
        positions = positions_of_update(self.config, k)
        raise NotFiniteError(
            f"update {k} (pairs {positions.start} to {positions.stop - 1} of the stream of seed {self.config.seed}) "
            f"found a number that is not finite: {culprit(self.config, stats, self.wrapper)}; nothing was changed. "
            "Lower --inner-lr or --lr, use --dims mean, or leave such updates out with --skip-nonfinite"
        )

    def _claim(self) -> None:
        if not self.stack.enter_context(claim(self.out / ".lock")):
            raise CheckpointError(f"another process trains in {self.out}; wait, stop it, or choose another --out")
        remove_partial(self.out)

    def _share(self) -> None:
        if self.world.size > 1:  # other machines may not see the folder, and a given model may differ
            parts = self.wrapper, self.optimizer
            tensors = self.world.from_main(
                lambda: {name: t.cpu() for name, t in state.collect(*parts, self.average).items()}
            )
            if not self.world.main:
                state.restore(tensors, *parts, self.out, self.average)

    def _mended(self, info: dict[str, Any]) -> dict[str, Any]:
        """Makes sure that the last and the best weights are there and sound; returns the header that says the best."""
        now, best = info["iteration"], info["best_iteration"]
        for name, n in (("last", now), ("best", best)):
            path = self.out / f"{name}.safetensors"
            try:
                if n is not None:
                    load_tensors(path)
            except CheckpointError as error:
                kept = (self.wrapper.state_dict(), info) if name == "last" else state.weights_after(self.out, n)
                if kept is not None:
                    warnings.warn(f"{error}; made again from the state after update {n}", stacklevel=2)
                    save_tensors(path, *kept)
                    continue
                over = now >= self.config.iterations
                warnings.warn(
                    f"{error}; the best weights of {info['best']:.2f} % at update {best} are lost, "
                    f"{'the last ones are' if over else 'the best of what follows is'} kept instead",
                    stacklevel=2,
                )
                if over:
                    self._save_weights("best", info)
                else:
                    info |= {"best": -1.0, "best_iteration": None}
        return info

    def _stopped(self, iteration: int) -> str:
        return f"stopped after update {iteration} of {self.config.iterations}, saved"
