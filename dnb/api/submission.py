"""A run's way to the hub: its objects are pickled, their tensors laid into shared memory, and both handed over."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import msgspec

from dnb.api.runs.run_folders import reserved_folder
from dnb.errors import USER_ERRORS, ArgumentError, SpaceError, is_text
from dnb.job import Data, Job
from dnb.pool.engine_pool import EnginePool
from dnb.progress import long_work
from dnb.protocol.client_messages import Done, Submit
from dnb.protocol.memory import PayloadRef
from dnb.protocol.run import RunSpec
from dnb.transport.pickling.payloads import explain_unpicklable, pickle_payload, sign
from dnb.transport.segments import Segment

# What a run is handed over with before its objects are shipped.
NOTHING = PayloadRef(buffers=(), arrays=(), segment=None)

Upload = Callable[[str, EnginePool, list[Segment]], tuple[bytes, PayloadRef]]  # name, pool, segments that it adds to


def submit(pool: EnginePool, spec: RunSpec, ship_job: Upload, ship_data: Upload) -> tuple[RunSpec, bytes]:
    """Ship everything once; if the hub refuses, folder and shared memory are given back.

    Args:
        pool: where the run goes.
        spec: of the run; its name is only wanted, and may get a number.
        ship_job: see `upload`.
        ship_data: likewise.

    Returns:
        The spec with the run's own name and folder, and the job as it was pickled.
    """
    segments: list[Segment] = []
    try:
        with reserved_folder(spec.name) as folder:
            spec = msgspec.structs.replace(spec, name=folder.name, folder=str(folder))
            job_bytes, job_ref = ship_job(f"{spec.name}-job", pool, segments)
            data_bytes, data_ref = ship_data(f"{spec.name}-data", pool, segments)
            notes = tuple(segment.note for segment in segments if segment.note)
            spec = msgspec.structs.replace(spec, job=job_ref, data=data_ref, notes=notes)
            frames = [_encoded(spec), job_bytes, data_bytes]
            with long_work(f"handing run {spec.name!r} to the hub"):
                pool.hub.ask(Submit(), Done, frames=[*frames, sign(pool.key, frames)], timeout_seconds=120.0)
    except BaseException:
        for segment in segments:
            segment.unlink()
        raise
    return spec, job_bytes


def _encoded(spec: RunSpec) -> bytes:
    try:
        return msgspec.msgpack.encode(spec)
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"{error.object!a} is no text, as a file name in another encoding: a run cannot be sent with it"
        ) from error


def upload(obj: Job | Data, name: str, pool: EnginePool, segments: list[Segment]) -> tuple[bytes, PayloadRef]:
    """Pickle an object, its tensors into shared memory."""
    try:
        pickled, ref, segment = pickle_payload(obj, name=name, folders=pool.segment_folders)
    except (SpaceError, KeyboardInterrupt):
        raise
    except USER_ERRORS as error:
        raise _why_unpicklable(obj) or error from error
    if segment is not None:
        segments.append(segment)
    return pickled, ref


def _why_unpicklable(obj: Job | Data) -> Exception | None:
    if isinstance(obj, Job):
        names = ("model", "loss", "step", "metrics", "optimizer", "scheduler", "after_step", "val_step")
        named = {name: getattr(obj, name) for name in names}
        named["the sampler"] = obj.order
        named["the sampler of val"] = obj.val_order
    else:
        named = {"train": obj.train.samples, "train's collate_fn": obj.train.collate}
        if obj.val is not None:
            named |= {"val": obj.val.samples, "val's collate_fn": obj.val.collate}
    found = (explain_unpicklable(value, name=name) for name, value in named.items())
    return next((error for error in found if error is not None), None)


def own_path() -> tuple[str, ...]:
    """Return this kernel's import path; folders whose names are no text are left out, as they cannot be sent."""
    found = (os.path.abspath(path) for path in ["", *sys.path])
    return tuple(path for path in found if is_text(path))
