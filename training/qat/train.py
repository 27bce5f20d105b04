"""`qserve-train train`: run the steps of a run, commit them, and go on where an earlier process stopped.

What a run is trained with stands in its manifest from the first call on; the steps themselves are in `loop.py`.
"""

import argparse
import dataclasses
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from qserve.errors import UsageError
from training.config import TrainOptions, add_options, given_options
from training.data import hashes, load_tokenizer, read_text, windows
from training.qat.loop import Training, num_steps
from training.qat.model import build, load_source, source_of
from training.qat.state import gather, scatter
from training.run import DATA, Json, Run, open_run, read_tensors, require_same, versions, write_tensors

STOPPED = 75  # the exit status of a run that was told to stop and can go on: "temporary failure" in sysexits.h
_DESCRIPTION = """\
Train a run that `prepare` made. The same command goes on with a run that was
interrupted, and does nothing for one that is finished. SIGTERM and Ctrl-C finish
the step under way, commit it and exit with the status 75.
"""
_EXAMPLES = """\
examples:
  qserve-train train --run run --data stories.txt --tokens 500000
  qserve-train train --run run                       # goes on
  qserve-train train --run run --data chat.jsonl --learn-ranges --learning-rate 3e-5
  torchrun --nproc-per-node 2 -m training.cli train --run-dir run --data stories.txt
  torchrun --nproc-per-node 8 -m training.cli train --run-dir run --shard
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    # torchrun takes --run for an abbreviation of an option of its own.
    add("--run", "--run-dir", type=Path, required=True, metavar="DIR", help="the run, made by prepare")
    add(
        "--data",
        type=Path,
        nargs="+",
        default=(),
        metavar="PATH",
        help=".txt, .json or .jsonl (text, or messages with role and content), or a dataset saved by `datasets`",
    )
    add("--shard", action="store_true", help="over several processes: each keeps a part of the model (FSDP2)")
    add_options(parser, TrainOptions)


def run(options: argparse.Namespace) -> None:
    given = given_options(options, TrainOptions)
    if not train(options.run, data=options.data, given=given, is_sharded=options.shard, console=Console()):
        raise SystemExit(STOPPED)


def train(path: Path, *, data: Sequence[Path], given: Json, console: Console, is_sharded: bool = False) -> bool:
    """Whether the run is finished; False where it was told to stop, with everything committed."""
    processes = PartialState(cpu=not torch.cuda.is_available())
    if processes.is_main_process:
        work = open_run(path)
        with work.locked():
            _describe(work, data=data, given=given, console=console)
            processes.wait_for_everyone()
            return _train(work, console, is_sharded=is_sharded)
    processes.wait_for_everyone()
    return _train(open_run(path), Console(quiet=True), is_sharded=is_sharded)


def _train(work: Run, console: Console, *, is_sharded: bool) -> bool:
    options = TrainOptions(**work.manifest["training"]["options"])
    # Until rounding is switched on, learned ranges are not used.
    unused = DistributedDataParallelKwargs(find_unused_parameters=options.start > 0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[unused])
    texts = read_tensors(work.path / DATA)
    pieces = windows(texts["train"], options.sequence_length)
    latest = work.latest()
    if latest is not None and latest[0]["step"] >= num_steps(options, num_windows=len(pieces)):
        console.print(f"{work.path} is finished: qserve-train finalize {work.path} --out DIR", soft_wrap=True)
        return True
    _check_processes(options, accelerator, is_sharded=is_sharded)
    training = _make(work, options, pieces, accelerator, is_sharded=is_sharded)
    if latest is not None:
        state, tensors = latest
        scatter(tensors, training.trainee.trainable(), training.optimizer)
        training.step = state["step"]
        console.print(f"going on after step {training.step} of {training.num_steps}")
    if accelerator.is_main_process:
        work.keep_log_until(training.step)
    return _run_steps(work, training, held_out=texts["held_out"], console=console)


def _run_steps(work: Run, training: Training, *, held_out: Tensor, console: Console) -> bool:
    options = training.options
    with _stop_requested() as stop, _Report(work, training, console) as report:
        while not training.is_done:
            found = training.advance()
            is_told = _anywhere(stop.is_set, training.accelerator)
            report.add(found)
            if is_told or training.is_done or training.step % options.save_every == 0:
                measured = _measure(training, held_out) if training.is_done else None
                _commit(work, training, measured)
            if is_told and not training.is_done:
                console.print(f"stopped after step {training.step}; the same command goes on")
                return False
    console.print(f"{work.path} is trained: qserve-train finalize {work.path} --out DIR", soft_wrap=True)
    return True


def _commit(work: Run, training: Training, measured: float | None) -> None:
    tensors = gather(training.trainee.trainable(), training.optimizer)
    if training.accelerator.is_main_process:
        work.commit(training.step, tensors, {} if measured is None else {"held_out_loss": measured})
    training.accelerator.wait_for_everyone()


def _measure(training: Training, held_out: Tensor) -> float:
    length = min(training.options.sequence_length, len(held_out) - 1)
    return training.measure(windows(held_out, length))


def _make(work: Run, options: TrainOptions, pieces: Tensor, accelerator: Accelerator, *, is_sharded: bool) -> Training:
    torch.manual_seed(options.seed)
    trainee = build(work, options)
    kl_share = {"kl": 1.0, "task": 0.0, "mixture": options.kl_share}[options.objective]
    teacher = None
    if kl_share and options.train == "weights":
        teacher = load_source(work.manifest["source"], seed=options.seed).requires_grad_(False).eval()
        teacher.to(accelerator.device)
        if options.precision == "bf16":
            _narrow(teacher)
    return Training(
        trainee,
        options,
        windows=pieces,
        teacher=teacher,
        kl_share=kl_share,
        accelerator=accelerator,
        is_sharded=is_sharded,
    )


def _narrow(teacher: Any) -> None:
    """Its matrices in the dtype they are multiplied in, which autocast would convert at every step.

    A tied head stays: an embedding in bfloat16 would make the sums of all layers so.
    """
    embedding = teacher.get_input_embeddings().weight
    for module in teacher.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:
            module.to(torch.bfloat16)


# -- what the run is --------------------------------------------------------------------------------------------------


def _describe(work: Run, *, data: Sequence[Path], given: Json, console: Console) -> None:
    """Write on the first call what the run is trained with; on every later one, require the same."""
    recorded = {key: work.manifest[key] for key in ("source", "versions")}
    require_same(
        recorded, {"source": source_of(Path(recorded["source"]["path"])), "versions": versions()}, what=str(work.path)
    )
    if "training" in work.manifest:
        _require_same_training(work, data=data, given=given)
        return
    if not data:
        raise UsageError(f"{work.path} has no text yet; name some with --data")
    options = _resolve(TrainOptions(**given), is_float=work.is_float)
    options.check()
    with console.status("reading the text"):
        tokenizer = load_tokenizer(Path(work.manifest["source"]["path"]))
        text = read_text(data, tokenizer)
    held_out = min(options.held_out, len(text.tokens) // 5)
    parts = {
        "train": text.tokens[: len(text.tokens) - held_out],
        "held_out": text.tokens[len(text.tokens) - held_out :],
    }
    write_tensors(work.path / DATA, parts, {})
    work.write_manifest({**work.manifest, "training": {"options": dataclasses.asdict(options), "data": text.identity}})


def _require_same_training(work: Run, *, data: Sequence[Path], given: Json) -> None:
    recorded = work.manifest["training"]
    options = recorded["options"]
    resolved = dataclasses.asdict(_resolve(TrainOptions(**{**options, **given}), is_float=work.is_float))
    require_same({"options": options}, {"options": resolved}, what=str(work.path))
    if data:
        found = {name: value for path in data for name, value in hashes(path).items()}
        require_same({"data": recorded["data"]["files"]}, {"data": found}, what=str(work.path))


def _resolve(options: TrainOptions, *, is_float: bool) -> TrainOptions:
    """The options with everything that is `auto` decided for this run and this machine."""
    objective = options.objective
    if objective == "auto":
        objective = "task" if is_float else "kl"
    if is_float and (objective != "task" or options.train != "weights" or options.learn_ranges):
        raise UsageError(
            "a float run trains its weights on the text itself; --objective, --train and --learn-ranges are of QAT runs"
        )
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() else "fp32"
    return dataclasses.replace(options, objective=objective, precision=precision)


def _check_processes(options: TrainOptions, accelerator: Accelerator, *, is_sharded: bool) -> None:
    if is_sharded and accelerator.num_processes == 1:
        raise UsageError("--shard divides a model over processes, and this is one; start several with torchrun")
    if options.batch_size % accelerator.num_processes:
        raise UsageError(
            f"--batch-size {options.batch_size} cannot be shared out over {accelerator.num_processes} processes; "
            "choose a multiple of their number"
        )


# -- being told to stop, and telling ----------------------------------------------------------------------------------


class _Stop:
    is_set = False

    def __call__(self, _: int, __: FrameType | None) -> None:
        self.is_set = True


@contextmanager
def _stop_requested() -> Iterator[_Stop]:
    """Set by SIGTERM and SIGINT from now on, instead of dying of them."""
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _anywhere(flag: bool, accelerator: Accelerator) -> bool:
    """Whether any process has it set: all stop after the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device)).any())


class _Report:
    """The bar, the lines of the log, and for those who watch no terminal a line now and then."""

    def __init__(self, work: Run, training: Training, console: Console) -> None:
        self._work = work
        self._training = training
        self._console = console
        self._found: list[Tensor] = []
        self._since = time.perf_counter()
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=training.num_steps, completed=training.step)

    def __enter__(self) -> "_Report":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def add(self, found: Tensor) -> None:
        self._found.append(found)
        step, total = self._training.step, self._training.num_steps
        self._bar.update(self._task, completed=step)
        if step % self._training.options.log_every == 0 or step == total:
            self._tell()

    def _tell(self) -> None:
        training = self._training
        mean = training.accelerator.reduce(torch.stack(self._found).mean(0), reduction="mean").tolist()
        seconds = time.perf_counter() - self._since
        speed = len(self._found) * training.tokens_per_step / seconds
        entry = {
            "step": training.step,
            "tokens": training.step * training.tokens_per_step,
            **dict(zip(("objective", "loss", "kl"), mean, strict=True)),
            "rounds": training.trainee.switch.is_on and bool(training.trainee.rounders),
            "tokens_per_second": round(speed, 1),
        }
        self._found, self._since = [], time.perf_counter()
        told = f"loss {entry['loss']:.4f}" + (f", kl {entry['kl']:.4f}" if training.kl_share else "")
        self._bar.update(self._task, description=f"{told}, {speed:,.0f} tokens/s")
        if training.accelerator.is_main_process:
            self._work.log(entry)
        if not self._console.is_terminal:
            self._console.print(f"step {training.step} of {training.num_steps}: {told}, {speed:,.0f} tokens/s")
