"""One shard's work, the same for a bare process and for a thousand Ray workers.

Batches flow through three stages, each with threads of its own: decode, score, encode. The device
waits for nobody as long as decoding keeps up. On a CPU every batch is scored by one thread and
several batches are scored at once: how a network's sums are split between threads shows in their
last bits, and a store must not depend on how many cores or workers made it.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..images import decode
from ..storage.folder import StoreFolder
from ..storage.layout import read_plan
from ..storage.manifest import Settings
from ..storage.records import FAILED, RowTable
from ..storage.writer import StoreWriter
from .annotator import DenseAnnotator
from .build import AnnotatorSpec
from .errors import AnnotatorError
from .scores import BatchScores, EncodedBatch, encode, score
from .sources import ImageSource
from .views import View, place, render

__all__ = ["Precision", "Receipt", "Run", "ShardWorker"]

Precision = Literal["none", "bf16", "fp16"]

_AUTOCAST: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
_REASON_LENGTH = 300


@dataclass(frozen=True)
class Run:
    """What a worker needs to know; cheap to send.

    Attributes:
        out: the store's folder.
        source: where the images are read.
        annotator: how to build the annotator.
        settings: of the store.
        view: as in the settings.
        precision: autocast type of the forward pass.
        device: torch's name of the device.
        threads: images decoded at once; on a CPU also batches scored at once.
    """

    out: Path
    source: ImageSource
    annotator: AnnotatorSpec
    settings: Settings
    view: View
    precision: Precision
    device: str
    threads: int


@dataclass(frozen=True)
class Receipt:
    """What a worker reports of a shard it committed.

    Attributes:
        shard: its number.
        rows: samples in it.
        failures: key -> reason.
        size: bytes of its entries.
        seconds: time by stage, summed over threads: "decode" (the model waited for images),
            "model" (forward pass and ranking; on a GPU their launch), "encode", "publish".
    """

    shard: int
    rows: int
    failures: dict[str, str]
    size: int
    seconds: dict[str, float]


class ShardWorker:
    """Annotates shards of a run.

    Args:
        run: what to do.
        annotator: already built; by default it is built from the run's specification.

    Raises:
        AnnotatorError: the annotator differs from the one that the store was planned with.
    """

    def __init__(self, run: Run, annotator: DenseAnnotator | None = None) -> None:
        self._run = run
        self._settings = run.settings
        self._annotator = annotator or run.annotator.build()
        identity = {**self._annotator.describe(), "amp": run.precision}
        if identity != run.settings.annotator:
            raise AnnotatorError(
                "this worker built another annotator than the run was planned with (other "
                f"weights or preprocessing): {identity}, planned {run.settings.annotator}; "
                "see that every machine has the same checkpoint and library versions"
            )
        self._device = torch.device(run.device)
        self._annotator.to(self._device)
        folder = StoreFolder(run.out)
        self._plan = read_plan(folder, run.settings)
        self._writer = StoreWriter(folder, run.settings)
        preprocessing = self._annotator.preprocessing
        self._resample = Image.Resampling[preprocessing.interpolation.upper()]
        self._mean = 255 * torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
        self._std = 255 * torch.tensor(preprocessing.std).view(1, 3, 1, 1)
        self._padding = self._mean.round().to(torch.uint8).view(3)
        self._mean, self._std = self._mean.to(self._device), self._std.to(self._device)
        on_gpu = self._device.type == "cuda"
        scorers = 1 if on_gpu else run.threads
        shape = (run.settings.batch_size, *preprocessing.input_size, 3)
        self._buffers = [
            torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(scorers + 1)
        ]
        self._decoders = ThreadPoolExecutor(run.threads, "decode")
        # In each thread: OpenMP keeps the number of threads for each calling thread apart.
        one_thread = None if on_gpu else partial(torch.set_num_threads, 1)
        self._num_threads = torch.get_num_threads()
        self._scorers = ThreadPoolExecutor(scorers, "score", one_thread)
        self._encoder = ThreadPoolExecutor(1, "encode")

    def close(self) -> None:
        """End the threads, and give torch back the number of threads it had."""
        for threads in (self._decoders, self._scorers, self._encoder):
            threads.shutdown()
        # What the scoring threads set for themselves is also what later threads begin with.
        torch.set_num_threads(self._num_threads)

    def annotate_shard(self, shard: int) -> Receipt:
        """Decode, score, encode and commit one shard."""
        rows = self._settings.shard_rows(shard)
        size = self._settings.batch_size
        table = RowTable.empty(len(rows), self._settings.top_k)
        seconds = dict.fromkeys(("decode", "model", "encode", "publish"), 0.0)
        scoring: list[Future[_Scored]] = []
        encoding: list[Future[EncodedBatch]] = []
        try:
            for number, start in enumerate(range(rows.start, rows.stop, size)):
                if number >= len(self._buffers):
                    scoring[number - len(self._buffers)].result().wait_for_upload()
                pixels = self._buffers[number % len(self._buffers)]
                batch = range(start, min(start + size, rows.stop))
                decoding = self._decode_batch(batch, pixels, rows.start, table)
                scoring.append(self._scorers.submit(self._score, decoding, pixels))
                encoding.append(self._encoder.submit(self._encode, scoring[-1], seconds))
            entries = self._collect([future.result() for future in encoding], table)
        finally:
            # After an error too: nothing may still be at work on the buffers.
            wait(scoring)
            wait(encoding)
        clock = time.perf_counter()
        record = self._writer.commit(shard, entries, table)
        seconds["publish"] += time.perf_counter() - clock
        failures = {self._plan.key(int(row)): reason for row, reason in record.failures.items()}
        return Receipt(shard, len(rows), failures, record.entries.size, seconds)

    def _decode_batch(
        self, batch: range, pixels: Tensor, first_row: int, table: RowTable
    ) -> list[Future[None]]:
        """Start filling a buffer; rows beyond the batch stay padding, so every batch is full."""
        pixels[:] = self._padding
        return [
            self._decoders.submit(
                self._decode_row, row, pixels[row - batch.start].numpy(), row - first_row, table
            )
            for row in batch
        ]

    def _decode_row(
        self, row: int, pixels: NDArray[np.uint8], place_in_table: int, table: RowTable
    ) -> None:
        preprocessing = self._annotator.preprocessing
        try:
            image, orientation = decode(self._run.source.read(self._plan.key(row)))
            placement = place(
                self._run.view, image.size, preprocessing.input_size, self._settings.grid
            )
            render(image, placement, self._resample, pixels)
        except Exception as error:  # noqa: BLE001 - decoders raise what they like on damaged files
            table.status[place_in_table] = FAILED
            table.reasons[place_in_table] = _reason(error)
            return
        table.sizes[place_in_table] = image.size
        table.orientations[place_in_table] = orientation
        table.boxes[place_in_table] = placement.box

    def _score(self, decoding: list[Future[None]], buffer: Tensor) -> "_Scored":
        clock = time.perf_counter()
        for image in decoding:
            image.result()
        decoded = time.perf_counter()
        pixels = buffer.to(self._device, non_blocking=True)
        uploaded = torch.cuda.Event() if pixels.is_cuda else None
        if uploaded is not None:
            uploaded.record()
        # [B, 3, height, width] in channels-last order
        images = pixels.permute(0, 3, 1, 2).float().sub_(self._mean).div_(self._std)
        precision = self._run.precision
        with torch.autocast(
            self._device.type, dtype=_AUTOCAST.get(precision), enabled=precision != "none"
        ):
            scores = self._fitting(images)
        host, copied = scores.to_host()
        waited, ran = decoded - clock, time.perf_counter() - decoded
        return _Scored(host, uploaded, copied, {"decode": waited, "model": ran})

    def _fitting(self, images: Tensor) -> BatchScores:
        try:
            return score(self._annotator, images, self._settings.top_k)
        except RuntimeError as error:
            if "out of memory" in str(error) or "allocate memory" in str(error):
                size = "x".join(map(str, images.shape[2:]))
                raise AnnotatorError(
                    f"a batch of {len(images)} images of {size} pixels does not fit into the "
                    f"memory of {self._device}; choose a smaller --batch-size"
                ) from error
            raise

    def _encode(self, scoring: "Future[_Scored]", seconds: dict[str, float]) -> EncodedBatch:
        scored = scoring.result()
        for stage, spent in scored.seconds.items():
            seconds[stage] += spent
        if scored.copied is not None:
            scored.copied.synchronize()
        clock = time.perf_counter()
        batch = encode(scored.scores, self._settings.num_classes, self._settings.step)
        seconds["encode"] += time.perf_counter() - clock
        return batch

    def _collect(self, batches: Sequence[EncodedBatch], table: RowTable) -> NDArray[np.uint32]:
        """Entries [S, K, H, W] of the shard; failed rows become zero, in the table as well."""
        rows = len(table.status)
        columns = {
            name: np.concatenate([getattr(batch, name) for batch in batches])[:rows]
            for name in EncodedBatch.__dataclass_fields__
        }
        for column in columns.values():
            column[table.status == FAILED] = 0
        entries: NDArray[np.uint32] = columns.pop("entries")
        for name, column in columns.items():
            getattr(table, name)[:] = column
        return entries


@dataclass(frozen=True)
class _Scored:
    """Scores on their way to the host, the events to wait for on a GPU, and the time they took."""

    scores: BatchScores
    uploaded: torch.cuda.Event | None
    copied: torch.cuda.Event | None
    seconds: dict[str, float]

    def wait_for_upload(self) -> None:
        """Until the pixel buffer may be written again."""
        if self.uploaded is not None:
            self.uploaded.synchronize()


def _reason(error: Exception) -> str:
    """Why an image failed, in one line that does not depend on machine or process."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be decoded; replace or remove the file"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror.lower()}"
    text = " ".join(str(error).split())
    return f"cannot be decoded: {text or type(error).__name__}"[:_REASON_LENGTH]
