"""The run folder: one run at a time, through its first process, writes metrics, log and
checkpoints; one that stops can go on.

<run folder>/config.json, versions.json   the config with all defaults written out; versions, git
                                          revision, machine
             log.txt, metrics.jsonl       what happened; a line for every step and every evaluation
             tensorboard/, curve.png      the same to look at
             checkpoints/step-00000120/   see state.py
             earlier-1/ ...               whatever lay here when a new run began, or beyond the
                                          checkpoint one went on from
"""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from uiollms.config.sections import EnvConfig, MemoryConfig
from uiollms.distributed.groups import World
from uiollms.distributed.watch import LostProcess
from uiollms.files.atomic import (
    clear_leftovers,
    make_folder,
    remove,
    replace_text,
    reporting_write_errors,
    sync,
    work_path,
)
from uiollms.files.errors import ConfigError
from uiollms.files.folders import run_folder
from uiollms.files.json_files import as_json, replace_nonfinite
from uiollms.runs.board import Board
from uiollms.runs.checks import check_can_save
from uiollms.runs.environment import device_name, environment
from uiollms.runs.metrics import (
    ITERATIONS,
    cut_metrics,
    machine_use,
    perplexities,
    read_metrics,
    scalars,
)
from uiollms.runs.own_files import FILES, LOCK, free_name, held, put_back, set_aside
from uiollms.runs.state import (
    CheckpointInfo,
    TrainingState,
    check_same_run,
    load_state,
    read_record,
    save_state,
    saved_steps,
    seed_generators,
    share_state,
    step_of,
)
from uiollms.training.schedule import Schedule
from uiollms.weights.adapters import save_weights

log = logging.getLogger("uiollms")

Item = TypeVar("Item")


@contextmanager
def open_run(
    config: EnvConfig,
    compressor: MemoryConfig,
    env_conf: str | Path,
    resume: str | None,
    restart: bool,
    world: World,
) -> Iterator[Run]:
    """The run folder, for this run alone, with the checkpoint to go on from found, checked and
    compared with the config; nothing in it is touched yet. resume: a checkpoint, "" = the newest
    one if there is any; restart: leave an unfinished run. Raises ConfigError."""
    folder = run_folder(config.train.run_dir, config.model.save_ckp, env_conf)
    with ExitStack() as stack:
        if not world.is_main_process:
            yield Run(folder, config, compressor, None, True, stack, world)
            return
        with reporting_write_errors(folder):
            make_folder(folder)
            said = "another process is training in this folder; choose another train.run_dir"
            stack.enter_context(held(folder / LOCK, f"{folder}: {said}"))
            put_back(folder)
        check_can_save(config.model.save_ckp, stack)
        run = Run(folder, config, compressor, resume, restart, stack, world)
        try:
            yield run
        except (SystemExit, LostProcess):
            run.save_last_step()
            raise


class Run:
    """One training run in its folder; made by `open_run`, started by `begin`. All processes of a
    run have one, and make the same calls; only the first one's touches the folder."""

    def __init__(
        self,
        folder: Path,
        config: EnvConfig,
        compressor: MemoryConfig,
        resume: str | None,
        restart: bool,
        stack: ExitStack,
        world: World,
    ) -> None:
        self.folder, self.config, self.compressor, self.stack, self.world = (
            folder,
            config,
            compressor,
            stack,
            world,
        )
        self.checkpoints = folder / "checkpoints"
        self.metrics = folder / "metrics.jsonl"
        # what else a line of metrics.jsonl goes to
        self.echo: Callable[[str], None] = lambda line: None
        self.watch = world.watch
        self.stopped_by: signal.Signals | None = None  # what all processes have agreed upon
        self.state: TrainingState | None = None  # once there is one
        self.record: CheckpointInfo | None = None
        saved = saved_steps(self.checkpoints)
        self.start = (
            None if resume is None else Path(resume) if resume else saved[-1] if saved else None
        )
        if self.start:
            self.record = self.checked(self.start, saved)
            self.changes = check_same_run(self.record, config, compressor, self.start)
        elif saved and resume is None and not restart:
            self.refuse_unfinished(saved[-1])
        begun = (self.record.counts, self.record.borders) if self.record else ("documents", ())
        self.schedule = Schedule(
            config.train, config.train.accum_grad * world.data.size, *world.broadcast(begun)
        )

    def checked(self, path: Path, saved: list[Path]) -> CheckpointInfo:
        """The record of a whole checkpoint. Raises ConfigError that offers the newest whole one
        before it."""
        try:
            return read_record(path)
        except ConfigError as error:
            for other in reversed([p for p in saved if step_of(p) < step_of(path)]):
                try:
                    read_record(other)
                except ConfigError:
                    continue
                raise ConfigError(
                    f"{error}; the one before it is whole: --resume {other}"
                ) from None
            raise ConfigError(f"{error}; no other whole checkpoint is there") from None

    def refuse_unfinished(self, newest: Path) -> None:
        done, of, finished = step_of(newest), "", False
        with suppress(ConfigError):  # a damaged checkpoint is no finished run
            schedule = read_record(newest).schedule
            of, finished = (
                f" of {schedule.train.train_iters} {schedule.counts}",
                not schedule.steps(done),
            )
        if not finished:
            raise ConfigError(
                f"{self.folder}: holds an unfinished run, {done}{of} done; go on with --resume, or "
                "begin "
                f"anew with --restart (its files then move to {free_name(self.folder).name}/)"
            )

    def begin(self, state: TrainingState) -> None:
        """Restore `state` from the checkpoint, if there is one to go on from, in all processes,
        and open the folder's files. From here SIGINT and SIGTERM let the step finish."""
        seed_generators(self.config.train.seed)
        if self.start and self.record:
            load_state(state, self.start, self.record)
        share_state(state, self.world)
        state.set_mark()
        if self.world.is_main_process:
            self.open_files(state)
        self.state = state
        self.watch.begin()

    def open_files(self, state: TrainingState) -> None:
        going_on = (
            self.start is not None and self.start.resolve().parent == self.checkpoints.resolve()
        )
        with reporting_write_errors(self.folder):
            newer = [
                path for path in saved_steps(self.checkpoints) if step_of(path) > state.iteration
            ]
            self.set_aside(
                newer
                if going_on
                else [self.folder / name for name in FILES if (self.folder / name).exists()]
            )
            make_folder(self.checkpoints)
            clear_leftovers(self.checkpoints)
            seconds = cut_metrics(self.folder, state.iteration)
            replace_text(self.folder / "config.json", self.config.model_dump_json(indent=4) + "\n")
            here: dict[str, str | None] = {
                "dtype": str(state.model.dtype),
                "device": device_name(),
                "processes": str(self.world.size),
            }
            self.environment = environment() | here
            versions = as_json(self.environment | {ITERATIONS: self.schedule.counts}, indent=4)
            replace_text(self.folder / "versions.json", versions + "\n")
            self.open_log()
        self.board = Board(self.folder / "tensorboard", state.iteration + 1 if self.start else None)
        self.began = time.time() - seconds
        if self.record:
            goal, counts = self.config.train.train_iters, self.schedule.counts
            log.info("goes on from %s, %d of %d %s done", self.start, state.iteration, goal, counts)
            was = self.record.environment
            to_device = [
                f"{name}: {was.get(name)} -> {now}"
                for name, now in self.environment.items()
                if was.get(name) != now
            ]
            for change in (*self.changes, *to_device):
                log.info("changed since: %s", change)

    def set_aside(self, paths: list[Path]) -> None:
        """Move what another run left into the next free earlier-<n>/: nothing is lost."""
        if paths:
            target = set_aside(self.folder, paths)
            log.info("%s kept in %s", ", ".join(path.name for path in paths), target)

    def open_log(self) -> None:
        handler = logging.FileHandler(self.folder / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        self.stack.callback(handler.close)
        self.stack.callback(log.removeHandler, handler)

    # ---- while it runs ---------------------------------------------------------------------------

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl, with the seconds that the run has taken, and its
        numbers to TensorBoard. Numbers that are not finite become null. tokens: read in the
        step, from which follow those a second."""
        if not self.world.is_main_process:
            return
        line = {"seconds": round(time.time() - self.began, 2), **values}
        if "tokens" in values:
            line["machine"] = machine_use(values["tokens"], self.step_seconds)
        line = replace_nonfinite(line)
        text = json.dumps(line)
        with reporting_write_errors(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        self.echo(text)
        self.board.add(values["iteration"], scalars(line, self.config.train.loss))

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items. The clock behind tokens a second starts anew with each: evaluations and
        checkpoints do not count."""
        for item in items:
            self.clock = time.perf_counter()
            yield item

    @property
    def step_seconds(self) -> float:
        """Since the current item of `timed` was handed out."""
        return time.perf_counter() - self.clock

    def save(self, state: TrainingState) -> None:
        """Weights to `save_ckp`, then everything to a checkpoint; older ones than the config
        keeps are deleted once it is whole. Raises ConfigError if the disk is full; the
        checkpoints before stay."""
        if self.world.is_main_process:
            with self.watch.undisturbed():
                self.write(state)

    def write(self, state: TrainingState) -> None:
        if self.config.model.save_ckp:
            save_weights(state.model, self.config.model.save_ckp)
        with reporting_write_errors(self.metrics):
            sync(self.metrics)  # a checkpoint never knows of more steps than the metrics
        save_state(
            state, self.schedule, self.checkpoints, self.config, self.compressor, self.environment
        )
        saved = saved_steps(self.checkpoints)
        best = self.best(saved) if self.config.train.keep_best else None
        with reporting_write_errors(self.checkpoints):
            for path in saved[: -self.config.train.keep_last]:
                if path != best:
                    gone = work_path(self.checkpoints)
                    path.rename(gone)
                    remove(gone)

    def best(self, saved: list[Path]) -> Path | None:
        """The checkpoint with the lowest perplexity of the first task."""
        perplexity = perplexities(self.folder)
        return min(
            (p for p in saved if step_of(p) in perplexity),
            key=lambda p: perplexity[step_of(p)],
            default=None,
        )

    def evaluation_missing(self, iteration: int) -> bool:
        """Whether the run was stopped between a checkpoint and the evaluation that follows it."""
        missing = False
        if self.record and self.config.train.tasks:
            # steps may have another size now
            last = replace(self.schedule, documents=self.record.documents)
            due = last.reaches(iteration, self.config.train.eval) or not self.schedule.steps(
                iteration
            )
            lines = [line for line in read_metrics(self.folder) if line["iteration"] == iteration]
            missing = due and not any("eval" in line for line in lines)
        return self.world.broadcast(missing)

    def evaluates(self, iteration: int) -> bool:
        """An evaluation is due after a step: at the first that reaches a multiple of `eval`, and
        at the end."""
        train, schedule = self.config.train, self.schedule
        return bool(train.tasks) and (
            schedule.reaches(iteration, train.eval) or not schedule.steps(iteration)
        )

    def saves(self, state: TrainingState) -> bool:
        """A checkpoint is due, for all processes alike: at the first step that reaches a
        multiple of `save`, before an evaluation, at the end, and when the run has to stop."""
        train, schedule = self.config.train, self.schedule
        last = not schedule.steps(state.iteration)
        due = (
            last or schedule.reaches(state.iteration, train.save) or self.evaluates(state.iteration)
        )
        return due or self.stopped_by is not None or state.bad_in_a_row >= train.max_bad_steps

    def stop_if_asked(self, state: TrainingState, sources: list[str]) -> None:
        """Called by all processes alike, once all is saved. Raises SystemExit after a signal,
        ConfigError after too many bad steps in a row."""
        if self.stopped_by is not None or state.bad_in_a_row >= self.config.train.max_bad_steps:
            # a launcher ends all others once one has ended: not while the first one saves
            self.world.barrier()
        if state.bad_in_a_row >= self.config.train.max_bad_steps:
            raise ConfigError(
                f"{self.folder}: the loss or gradient of {state.bad_in_a_row} steps in a row was "
                "not finite, the last at "
                f"iteration {state.iteration} on {', '.join(sources)}; none of them changed the "
                "weights, which are saved; lower "
                f"train.max_lr, or look at the documents that metrics.jsonl names"
            )
        self.exit_if_signalled()

    def agree_on_signals(self) -> None:
        """What one process was told, all do."""
        if self.watch.lost:
            raise self.watch.reason()
        number = self.world.max(self.watch.asked or 0)
        if number:
            self.stopped_by = signal.Signals(number)
            self.watch.ask(self.stopped_by)

    def exit_if_signalled(self) -> None:
        if self.stopped_by is not None:
            raise SystemExit(128 + self.stopped_by)

    def until_signal(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, until a signal comes: an evaluation is given up, and made again when the
        run goes on."""
        for item in items:
            if self.watch.asked:  # the others wait for this process, and agree later
                raise self.watch.reason()
            yield item

    def save_last_step(self) -> None:
        """In the first process of a run that ends before its end: save the last whole step, where
        that is not saved yet, and say how it goes on."""
        self.watch.leaving = True
        state, saved = self.state, saved_steps(self.checkpoints)
        if state and state.iteration > (step_of(saved[-1]) if saved else 0):
            try:
                self.save(state)
            except ConfigError as error:  # why the run ends is said too
                log.warning("%s", error)
            else:
                log.info("iteration %d, the last whole step, is saved", state.iteration)
        if self.watch.asked:
            then = "--resume goes on" if state else "nothing was trained yet"
            log.info("stopped by %s; %s", self.watch.asked.name, then)
