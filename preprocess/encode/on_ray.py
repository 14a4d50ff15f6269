"""`preprocess work --on ray`: make the units of a plan on the machines of a Ray cluster.

encode_on_ray(Path("/shared/bank"), tower=None, roots=(), workers=None, address="auto")

Each worker is an actor that does what `preprocess work` does, under the same leases, so that features
never pass through Ray's object store. Ray restarts a lost actor elsewhere; another worker continues its
unit. All machines must share the bank and have framebank installed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from preprocess.encode.unit import Summary
from shards.errors import UserError
from shards.format.beside import banks_of
from shards.format.commits import committed
from shards.format.plan import planned

RESTARTS = 5
"""Restarts of a worker, and of its task."""
SECONDS = 1.0
"""Seconds between two counts of the finished units."""


class Worker:
    """An actor: makes units of a bank until none is left to take."""

    def work(
        self,
        bank: str,
        tower: str | None,
        roots: Sequence[str],
        gpu: bool,
        decoders: int | None,
        start: float,
    ) -> Summary:
        """Return what was done. UserError and OSError, of one line, as of `preprocess work`."""
        import os

        # before torch is imported: OpenMP reads it once
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from preprocess.encode.run import work

        device = "cuda" if gpu else "cpu"
        return work(Path(bank), tower, roots, device, decoders=decoders, start=start)


def encode_on_ray(
    bank: Path,
    tower: str | None = None,
    roots: Sequence[str] = (),
    workers: int | None = None,
    address: str | None = None,
    decoders: int | None = None,
) -> None:
    """Encode what is left of a plan on a Ray cluster.

    workers: how many actors; None is one for each GPU, or for each machine where there is none. address:
    of the cluster; None is the one that Ray finds, or else this machine. decoders: processes of each
    worker, None for as many as its machine has cores. Raises UserError, a line for each reason, where
    units are left and every worker has ended.
    """
    ray = _ray()
    units = [(one, unit) for one in banks_of(bank) for unit in range(len(planned(one).units))]
    ray.init(address=address, log_to_driver=False, configure_logging=False)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = workers or gpus or len(nodes)
        resources = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        actor = ray.remote(
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            # one worker on each machine rather than all on one: each brings its cores for decoding
            scheduling_strategy="SPREAD",
            **resources,
        )(Worker)
        # absolute: workers run in other folders, on other machines
        words = str(bank.absolute()), tower, list(roots), bool(gpus), decoders
        actors = [actor.remote() for _ in range(count)]
        running = [one.work.remote(*words, k / count) for k, one in enumerate(actors)]
        problems: list[str] = []
        with tqdm(total=len(units), unit="unit", desc="encode") as bar:
            while running:
                done, running = ray.wait(running, timeout=SECONDS)
                problems += [problem for ref in done if (problem := _problem(ray, ref))]
                # counted on the disk: units that a lost worker had finished are there all the same
                bar.update(sum(committed(*unit) for unit in units) - bar.n)
        # a worker that was lost is a problem only if no other one has made its units
        if problems and not all(committed(*unit) for unit in units):
            raise UserError.of(dict.fromkeys(problems))
        for problem in dict.fromkeys(problems):  # others have made its units
            tqdm.write(f"note: {problem}", file=sys.stderr)
    finally:
        ray.shutdown()


def _problem(ray: Any, ref: Any) -> str:
    """Return why a worker ended early, "" if it did not; a bug is raised with its traceback."""
    try:
        ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | OSError):
            return str(error.cause)
        raise
    except ray.exceptions.RayActorError as error:
        return f"a worker was lost {RESTARTS + 1} times: {str(error).splitlines()[0]}"
    return ""


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("--on ray needs Ray", fix="pip install 'framebank[ray]'") from None
    return ray
