"""The Ray that a job runs on, joined or started, and what of it one scoring worker gets."""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Self, TypeVar

from batch_scorer import logs
from batch_scorer.backends.device import CPU_ENVIRONMENT
from batch_scorer.config import Config, Device
from batch_scorer.errors import ConfigError, IncompleteError
from batch_scorer.job import AnyJob, Job
from batch_scorer.pipeline.placement import beside_gpus, cluster_layout, give_up_all, reserve

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 5.0
_SPARE_CPUS = 3
"""Logical CPUs beside the scoring workers: Ray Data's source keeps one for the whole run, prepare
and commit need one each."""
_is_private = False
"""Whether Ray was started in here, so that all of its processes have CPU_ENVIRONMENT."""


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Join the cluster that the settings name, or run a private Ray on this machine."""
    if not config.use_ray:
        yield
        return
    import ray

    if ray.is_initialized():
        yield
        return
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        with _importing("ray.data"):
            if address:
                _require_listener(address)
                ray.init(address=address, **quiet)
            else:
                cpus = (os.cpu_count() or 1) + _SPARE_CPUS
                with _environment_for_workers(), _native_log_off():
                    ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    except Exception as error:  # a start that takes Ray too long ends in one without a class
        raise ConfigError(f"cannot join Ray at {address or 'this machine'}: {error}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # ray.init puts its own in place, which aborts
    global _is_private
    _is_private = not address
    try:
        yield
    finally:
        _is_private = False
        ray.shutdown()


@contextmanager
def _importing(module: str) -> Iterator[None]:
    """Import it in a thread while the context lasts, which for Ray mostly waits for processes."""
    thread = threading.Thread(target=import_module, args=[module])
    thread.start()
    try:
        yield
    finally:
        thread.join()


@contextmanager
def _environment_for_workers() -> Iterator[None]:
    """What a private Ray starts in here has CPU_ENVIRONMENT."""
    missing = CPU_ENVIRONMENT.keys() - os.environ.keys()
    os.environ.update({name: CPU_ENVIRONMENT[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


class RaySession:
    """A `ray_session` that begins when it is first needed, and ends with the context."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stack = ExitStack()
        self._has_started = False

    def start(self) -> None:
        """Make sure that Ray is there. Raises ConfigError."""
        if not self._has_started:
            self._stack.enter_context(ray_session(self._config))
            self._has_started = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _require_listener(address: str) -> None:
    """Raise OSError if nothing answers at host:port; Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()


@contextmanager
def _native_log_off() -> Iterator[None]:
    """Keep Ray's native log off a person's terminal.

    It greets every Ray Data actor with an error-level line (ray-project/ray#53727), and the
    switch that turns it off announces itself: so stderr is held back while Ray starts, and shown
    if that fails. Ray's log files are not affected by the latter.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(terminal, 2)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def has_gpus(config: Config) -> bool:
    """Whether the cluster, or without Ray this machine, has a CUDA device."""
    if config.use_ray:
        import ray

        return bool(ray.cluster_resources().get("GPU", 0) > 0)
    from batch_scorer.backends.device import cuda_is_available

    return cuda_is_available()


@dataclass(frozen=True, slots=True)
class Pool:
    """How many models score at the same time: `first` when a run starts, as the cluster is now, and
    never fewer than `least` or more than `most`, which are equal unless the setting is a range."""

    least: int
    first: int
    most: int

    @property
    def is_elastic(self) -> bool:
        """Whether the number may change during a run."""
        return self.least < self.most


def pool_of(bounds: tuple[int, int] | None, fit: int) -> Pool:
    """The pool of a job whose settings ask for so many workers, where `fit` have room."""
    least, most = bounds or (fit, fit)
    return Pool(least, first=min(max(fit, least), most), most=most)


def worker_pool(job: AnyJob) -> Pool:
    """The job's workers on the cluster that there is, for each stage of it: one per GPU, or one per
    machine on CPU. A served judge is asked by one worker, so that the limits of its requests are
    those of the job."""
    if not job.config.use_ray or job.is_served:
        return Pool(1, 1, 1)
    bounds = job.config.worker_bounds
    if job.device is Device.CUDA:
        if not has_gpus(job.config) and bounds is None:
            raise ConfigError(
                "device is cuda, but the cluster has no GPU; where an autoscaler brings them, set "
                "`workers` to how many it should bring"
            )
        return pool_of(bounds, _share(job, cluster_layout(job.config).workers))
    return pool_of(bounds, len(_machine_cpus()))


def _share(job: AnyJob, workers: int) -> int:
    """The workers of one stage, of so many that fit. Raises ConfigError where there are fewer than
    stages, and the settings do not say that more will come."""
    stages = len(job.stages)
    if workers < stages and job.config.workers is None:
        raise ConfigError(
            f"model_workers: {stages} models with workers of their own, and the cluster's GPUs are "
            f"enough for {workers}; where an autoscaler brings more, set `workers`"
        )
    return workers // stages


def on_worker(job: Job, work: Callable[[Job], T]) -> T:
    """The result of `work` on a machine like the scoring workers', in a process of its own; `work`
    gets the job as it is there.

    Raises what `work` raises, and IncompleteError if its process dies.
    """
    if not job.config.use_ray:
        return work(job)
    import ray

    remote = ray.remote(max_calls=1, max_retries=0, **worker_resources(job, workers=1))
    over_nodes = is_over_nodes(job)
    try:
        result: T = ray.get(remote(_call).remote(logs.carry(), job, over_nodes, work))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # as it was raised there, without Ray's frames around it
    except ray.exceptions.RayError as error:
        raise IncompleteError(f"a worker died: {str(error).splitlines()[0]}") from error
    finally:
        if over_nodes:
            give_up_all()
    return result


def _call(carried: logs.Carried, job: Job, over_nodes: bool, work: Callable[[Job], T]) -> T:
    logs.resume(carried)
    job = job.on_this_node()
    return work(replace(job, placement_group=reserve(job.config)) if over_nodes else job)


def is_over_nodes(job: AnyJob) -> bool:
    """Whether the devices of a scoring worker are on several nodes."""
    return job.device is Device.CUDA and cluster_layout(job.config).over_nodes


def _machine_cpus() -> list[float]:
    """Logical CPUs of each machine of the cluster that has any."""
    import ray

    cpus = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return [count for count in cpus if count >= 1]


def worker_resources(job: AnyJob, workers: int) -> dict[str, Any]:
    """What one worker asks of Ray: its GPUs, or its part of what a machine can spare where each
    stage has so many workers."""
    if job.device is Device.CUDA:
        # Any environment will do: Ray then never takes a process that has read shards.
        environment = {"runtime_env": {"env_vars": {"BATCH_SCORER_WORKER": "scores"}}}
        if is_over_nodes(job):
            return {"num_cpus": 1, **beside_gpus(), **environment}
        # All of one machine, as Ray gives them.
        return {"num_gpus": job.config.devices_per_worker, **environment}
    # For an environment Ray starts a process, and that twice, where it has an idle one without. An
    # empty one is none, and yet Ray Data does not take the stage for one that asks for the same as
    # that before it: it would join them, and the worker would read while it could score.
    return {
        "num_cpus": cpus_per_worker(_machine_cpus(), workers * len(job.stages)),
        "runtime_env": {} if _is_private else {"env_vars": CPU_ENVIRONMENT},
    }


def cpus_per_worker(machines: Sequence[float], workers: int) -> float:
    """Logical CPUs, and so threads, of each of `workers` on machines with so many."""
    per_machine = -(-workers // len(machines))
    return max(1, (min(machines) - _SPARE_CPUS) // per_machine)
