"""Measure how fast this machine trains and scores students of a space, by a few real steps of shallow ones.

A step costs `fixed + layers * layer`. `layer` is from students of one and three layers with a small vocabulary, whose
step is little else; `fixed` (embedding, both output heads, loss) is what one layer with the whole vocabulary takes
beyond that. Every worker of this machine measures at once: what they share, they wait for in the run too. The clock of
a worker of one thread is that thread's: what else this machine happens to do now is no part of what it can do.
"""

import copy
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from minitron_search.architecture_search.schedule import batch_tokens
from minitron_search.config.schema import Config
from minitron_search.config.types import Precision
from minitron_search.distillation.loop import make_optimizer
from minitron_search.distillation.objective import Objective
from minitron_search.distillation.settings import LoopSettings
from minitron_search.distillation.teacher import TeacherBatch
from minitron_search.losses.output_loss import next_tokens, token_losses
from minitron_search.models.architecture import Architecture, parameter_count
from minitron_search.models.device import autocast, release_memory
from minitron_search.models.families import final_hidden, sizes_of
from minitron_search.models.loading import random_student
from minitron_search.models.output_head import OutputHead, output_head
from minitron_search.planning.workload import Costs
from minitron_search.trials.settings import distillation_settings

# Of a large matrix product's speed that distilling SmolLM2 reaches here: 0.45 to 0.6 on two cores.
UTILISATION = 0.5
DEEP = 3  # layers of the deeper student
SMALL_VOCABULARY = 256
CPU_TOKENS = 256  # of a timed step: a layer is as fast a token on 256 as on more (depth.py)
CPU_BYTES = 2 * 2**30  # of memory that measuring may take; a quarter of a GPU's, where that is more
SECONDS = 6.0  # what measuring may take, by the product's speed: a larger model is not measured
REPEAT_SECONDS = 0.05  # a work that is shorter is repeated, and the fastest counts
AT_ONCE = 8  # workers that measure beside each other; more would wait for Python, not for each other
OPTIMIZER_BYTES = 16  # a float32 parameter, its gradient and two moments


class Speed(NamedTuple):
    """The speed of one worker, in FLOP/s as `workload` counts them.

    Of training, of scoring in the run's precision, and of scoring in float32. `stated`: by the user, so that nothing
    comes on top.
    """

    training: float
    scoring: float
    float32: float
    basis: str
    stated: bool = False


class TooSlow(Exception):
    """Measuring takes longer than it may."""


def stated(config: Config) -> Speed | None:
    """Return the speed by `resources.mfu`, None unless it is given."""
    mfu, most = config.resources.mfu, config.resources.flops_per_second
    if mfu is None or most is None:
        return None
    return Speed(mfu * most, mfu * most, mfu * most, f"stated: {mfu:g} of {most:.3g} FLOP/s a worker", True)


def measure(config: Config, costs: Costs, teacher_hidden: int, precision: Precision, at_once: int) -> Speed:
    """Return the speed of one of `at_once` workers of this machine that work beside each other.

    If measuring would take too much memory or time, it is half the speed of a square matrix product; if a trial does
    not fit this machine (`at_once` is 0), that of a product on all of its CPUs. `teacher_hidden`: hidden_size of the
    model that students are distilled from.
    """
    where = torch.device("cuda" if config.resources.gpus_per_worker and torch.cuda.is_available() else "cpu")
    threads = config.resources.cpus_per_worker if at_once else os.cpu_count() or 1
    product, product32 = (product_flops_per_second(kind, where, threads) for kind in (precision, "float32"))
    reason = why_not(config, costs, teacher_hidden, product, where)
    if at_once == 0:
        reason = ("a trial does not fit this machine, which all of it is taken for; resources.mfu and "
                  "resources.flops_per_second say the speed of another")  # fmt: skip
    if not reason:
        try:
            return _measured(config, costs, teacher_hidden, precision, at_once if where.type == "cpu" else 1, where)
        except torch.OutOfMemoryError:  # another process has the GPU's memory
            reason = "measuring ran out of memory"
        except TooSlow:
            reason = f"this machine is so busy that two shallow students took {SECONDS:g} s"
        finally:
            release_memory()
    basis = f"{UTILISATION:g} of a matrix product's {product / 1e9:,.0f} GFLOP/s on this machine's {where.type.upper()}"
    speeds = (product * UTILISATION, product * UTILISATION, product32 * UTILISATION)
    return Speed(*speeds, f"{basis}: {reason}")


def why_not(config: Config, costs: Costs, teacher_hidden: int, product: float, where: torch.device) -> str:
    """Return why no step is timed here; "" if one can be."""
    typical, space = costs.space.typical(), costs.space
    vocabulary = costs.space.config.vocab_size
    one, deep = (_shallow(typical, layers) for layers in (1, DEEP))
    held = {a: parameter_count(space.weights, sizes_of(space.config, a)) for a in (one, deep)}
    table = vocabulary * typical.hidden_size
    needed = max(
        OPTIMIZER_BYTES * held[one] + 4 * vocabulary * teacher_hidden, 8 * (held[deep] - table)  # no optimizer
    )  # fmt: skip
    most = CPU_BYTES
    if where.type == "cuda":
        most = max(most, torch.cuda.get_device_properties(where).total_memory // 4)
    if needed > most:
        return f"a step of a one-layer student would take {needed / 2**30:.1f} GiB"
    tokens = _windows(config, costs, where) * costs.length
    flops = 2 * tokens * (4 * costs.student(one) + 2 * costs.teacher_head)  # twice: the first time does not count
    if flops / (product * UTILISATION) > SECONDS:
        return f"timing steps would take {flops / (product * UTILISATION):.0f} s"
    return ""


def product_flops_per_second(precision: str, where: torch.device, threads: int, size: int = 1024) -> float:
    """Return the FLOP/s of a square matrix product on a worker's threads, or its GPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    left = torch.randn(size, size, device=where, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)
    seconds = fastest(lambda: left @ left, where)
    torch.set_num_threads(before)
    return 2 * size**3 / seconds


def _measured(
    config: Config, costs: Costs, teacher_hidden: int, precision: Precision, at_once: int, where: torch.device
) -> Speed:
    began = time.perf_counter()
    typical, space = costs.space.typical(), costs.space
    settings = replace(distillation_settings(config, precision), intermediate=0.0, embedding=False)
    windows = _windows(config, costs, where)
    small = _small_vocabulary(space.config)

    def timed(teacher: PretrainedConfig, layers: int, *passes: str) -> dict[str, float]:
        student = random_student(teacher, _shallow(typical, layers), 0).to(where)  # type: ignore[arg-type]
        bytes_held = OPTIMIZER_BYTES * sum(p.numel() for p in student.parameters())
        fitting = max(1, min(at_once, AT_ONCE, CPU_BYTES // bytes_held))
        students = [student, *(copy.deepcopy(student) for _ in range(fitting - 1))]
        timings = beside_each_other([
            partial(_times, copied, settings, teacher_hidden, windows, costs.length, passes) for copied in students
        ], config.resources.cpus_per_worker)  # fmt: skip
        return {name: sum(times[name] for times in timings) / len(timings) for name in passes}

    depth, tokens, deepest = typical.num_hidden_layers, windows * costs.length, min(DEEP, typical.num_hidden_layers)
    one, deep = timed(small, 1, "training", "scoring"), timed(small, deepest, "training", "scoring", "float32")
    if time.perf_counter() - began > SECONDS:
        raise TooSlow
    whole = timed(space.config, 1, "training", "scoring", "optimizer")
    layer = {name: _layer(one[name], deep[name], deepest) for name in one}
    training, scoring = (
        (max(0.0, whole[name] - layer[name]) + depth * layer[name]) / tokens for name in ("training", "scoring")
    )
    parameters = [parameter_count(space.weights, sizes_of(space.config, a)) for a in (_shallow(typical, 1), typical)]
    share = batch_tokens(config) / config.resources.workers_per_trial
    training += whole["optimizer"] * parameters[1] / parameters[0] / share
    student = costs.student(typical)
    scored = (student + costs.teacher_head) / scoring
    asked_head = 0 if settings.loss == "ce" else costs.teacher_head
    return Speed(
        training=(3 * student + asked_head) / training,
        scoring=scored,
        float32=scored * deep["scoring"] / deep["float32"],
        basis=f"measured: {training * 1e3:.3g} ms a token of training, {scoring * 1e3:.3g} of scoring; students of "
              f"1 and {deepest} layers, {min(at_once, AT_ONCE)} at once, in {time.perf_counter() - began:.1f} s",
    )  # fmt: skip


def _layer(one: float, deep: float, layers: int) -> float:
    """Return the seconds of one layer, from passes through one layer and through `layers`.

    It is no more than its share of the deeper pass: on a busy machine the difference may be anything.
    """
    if layers == 1:
        return one
    return min(max((deep - one) / (layers - 1), deep / layers / 2), deep / layers)


def beside_each_other(works: list[Callable], threads: int) -> list:
    """Return what each of `works` returns, each run in a thread of its own with `threads` threads of torch."""
    results, failed = [None] * len(works), []

    def run(index: int) -> None:
        torch.set_num_threads(threads)
        try:
            results[index] = works[index]()
        except BaseException as error:
            failed.append(error)

    running = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failed:
        raise failed[0]
    return results


def _times(
    student: PreTrainedModel, settings: LoopSettings, teacher_hidden: int, windows: int, length: int,
    passes: Sequence[str],
) -> dict[str, float]:  # fmt: skip
    """Return the seconds of each of `passes` over random windows."""
    where, vocabulary, own = student.device, student.config.vocab_size, output_head(student)
    head = OutputHead(torch.randn(vocabulary, teacher_hidden, device=where)).frozen(settings.precision)
    said = torch.randn(windows, length, teacher_hidden, device=where)
    ids = torch.randint(vocabulary, (windows, length), device=where)
    objective, optimizer = Objective(student.train(), settings, head), make_optimizer(student, settings)

    def train() -> None:
        loss, _ = objective(ids, TeacherBatch(said) if settings.asks_teacher else None)
        loss.backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(student.parameters(), settings.gradient_clip)
        optimizer.step()

    def score(precision: str) -> None:
        with torch.inference_mode(), autocast(precision, where):
            hidden = final_hidden(student, ids).flatten(0, 1)
            token_losses(hidden, own, next_tokens(ids).flatten(), said.to(hidden.dtype).flatten(0, 1), head)

    works: dict[str, Callable[[], None]] = {
        "training": train,
        "optimizer": update,
        "scoring": partial(score, settings.precision),
        "float32": partial(score, "float32"),
    }
    return {name: fastest(works[name], where) for name in sorted(passes, key=list(works).index)}


def fastest(work: Callable[[], Any], where: torch.device) -> float:
    """Return the fewest seconds of `work`, without the first time: other load can only make it slower."""

    def timed() -> float:
        began = clock()
        work()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        return clock() - began

    # a thread's own clock does not see what it waits for in others
    alone = where.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    timed()
    seconds = [timed()]
    while sum(seconds) < REPEAT_SECONDS:
        seconds.append(timed())
    return min(seconds)


def _shallow(architecture: Architecture, layers: int) -> Architecture:
    return replace(architecture, layers=architecture.layers[:layers])


def _small_vocabulary(config: PretrainedConfig) -> PretrainedConfig:
    small = copy.deepcopy(config)
    small.vocab_size = min(config.vocab_size, SMALL_VOCABULARY)
    small.pad_token_id = None  # the embedding of a token that is not there
    return small


def _windows(config: Config, costs: Costs, where: torch.device) -> int:
    """Return the windows of a timed pass: the run's micro-batch, and on a CPU no more than `CPU_TOKENS`."""
    share = batch_tokens(config) // costs.length // config.resources.workers_per_trial
    micro = distillation_settings(config, "float32").micro_batch_tokens
    return max(1, min(share, (micro if where.type == "cuda" else min(micro, CPU_TOKENS)) // costs.length))
