"""A whole run: plan it, hold it against the store that is there, annotate what is missing."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from ..storage.encoding import DEFAULT_STEP
from ..storage.errors import SettingsError
from ..storage.folder import StoreFolder
from ..storage.manifest import Manifest, Settings
from ..storage.plan import Plan
from ..storage.writer import StoreWriter
from .annotator import DenseAnnotator
from .build import AnnotatorSpec
from .errors import InterruptedRunError, ShardsFailedError
from .ray_run import Quarantined, run_on_ray
from .signals import sigterm_interrupts
from .sources import ImageFolder, ImageSource
from .views import VIEWS, View
from .worker import Precision, Receipt, Run, ShardWorker

__all__ = ["Progress", "Summary", "annotate"]

Progress = Callable[[int, int], None]

_MAX_THREADS = 16  # a worker's; machines with more cores take more workers


@dataclass
class Summary:
    """What a run did.

    Attributes:
        out: the store's folder.
        settings: of the store.
        notes: what a user should know about the annotator.
        samples: planned samples.
        already_done: of them, in shards that were committed before.
        labelled: samples labelled by this run.
        failures: key -> reason, samples of this run that could not be labelled.
        size: bytes of the entries this run wrote.
        seconds: wall time of the annotation, without planning.
        stages: seconds by stage, over all workers; see `Receipt`.
    """

    out: Path
    settings: Settings
    notes: list[str]
    samples: int
    already_done: int
    labelled: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    size: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)

    def add(self, receipt: Receipt) -> None:
        """Count a committed shard."""
        self.labelled += receipt.rows - len(receipt.failures)
        self.failures.update(receipt.failures)
        self.size += receipt.size
        for stage, seconds in receipt.seconds.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds


def annotate(
    source: str | os.PathLike[str] | ImageSource,
    out: str | os.PathLike[str],
    *,
    model: str | DenseAnnotator,
    checkpoint: str | os.PathLike[str] | None = None,
    pretrained: bool = True,
    img_size: int | tuple[int, int] | None = None,
    view: View = "stretch",
    top_k: int = 5,
    batch_size: int = 32,
    shard_size: int = 1024,
    workers: int | None = None,
    device: str = "auto",
    amp: Precision | str = "auto",
    class_names: list[str] | None = None,
    dry_run: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> Summary:
    """Label every image of a source densely; equal to the command `tokenlabel annotate`.

    A store that is there already is continued: committed shards are left as they are.

    Args:
        source: a folder of images, or any `ImageSource`.
        out: the store's folder, new, empty or a store made with the same settings.
        model: a timm model name, `package.module:factory`, or a `DenseAnnotator`.
        checkpoint: local weights of a timm model (safetensors, or torch with weights only).
        pretrained: fetch timm's weights where no checkpoint is given.
        img_size: pixels of the annotator's input: a side, or (height, width).
        view: what the annotator sees of an image: "stretch" (all of it, aspect changed),
            "letterbox" (all of it, padded), "center" (its centre square).
        top_k: classes a cell keeps; at most C - 1.
        batch_size: images the annotator sees together.
        shard_size: images of a shard, the unit of work and of commit.
        workers: Ray workers; 0 runs in this process; None for one a GPU, or one.
        device: "auto", "cpu", "cuda", ...
        amp: precision of the forward pass: "none", "bf16", "fp16"; "auto" is bf16 on CUDA and
            none elsewhere.
        class_names: one name for each class, in place of those the annotator knows.
        dry_run: check the source, the model and an earlier store, write nothing.
        progress: called with (samples done, samples planned) after every shard.

    Raises:
        SettingsError: settings that contradict each other, the source or the store.
        AnnotatorError: an annotator that cannot be built or run densely.
        PublishError: a folder that cannot be written.
        ShardsFailedError: shards that could not be finished; the others are committed.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; what is committed is kept.
    """
    for name, value in (("top_k", top_k), ("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise SettingsError(f"{name} must be at least 1, got {value}")
    if view not in VIEWS:
        raise SettingsError(f"view {view!r} is none of {', '.join(VIEWS)}")
    device = _device(device)
    precision = _precision(amp, device)
    images = ImageFolder(source) if isinstance(source, str | os.PathLike) else source
    plan = Plan.of(images.samples())
    if not len(plan):
        raise SettingsError("the source has no samples")
    folder = StoreFolder(out)
    if not dry_run:
        folder.prepare()
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    weights = Path(checkpoint).absolute() if checkpoint else None
    spec = AnnotatorSpec(model, weights, pretrained, size, class_names)
    annotator = spec.build()
    settings = Settings(
        annotator={**annotator.describe(), "amp": precision},
        num_classes=annotator.num_classes,
        levels=[{"grid": list(annotator.grid)}],
        payload="categorical",
        view=view,
        top_k=min(top_k, annotator.num_classes - 1),
        step=DEFAULT_STEP,
        profile="fast",
        batch_size=min(batch_size, shard_size, len(plan)),  # a batch is always padded to full
        shard_size=min(shard_size, len(plan)),
        rows=len(plan),
        plan_sha256=plan.digest(),
    )
    created_with = {name: version(name) for name in ("tokenlabel", "torch", "timm", "zarr")}
    manifest = Manifest(settings, annotator.class_names, images.describe(), created_with)
    if dry_run:
        StoreWriter.check(folder, manifest, plan)
        return Summary(folder.root, settings, annotator.notes, len(plan), 0)
    pending = StoreWriter.open(folder, manifest, plan).pending()
    missing = sum(len(settings.shard_rows(shard)) for shard in pending)
    summary = Summary(folder.root, settings, annotator.notes, len(plan), len(plan) - missing)
    if workers is None:
        workers = max(1, torch.cuda.device_count()) if device.startswith("cuda") else 1
    threads = max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // max(1, workers)))
    run = Run(folder.root.absolute(), images, spec, settings, view, precision, device, threads)
    if workers and pending:
        results = run_on_ray(run, pending, min(workers, len(pending)))
    else:
        results = _in_process(run, annotator, pending)
    start = time.monotonic()
    try:
        _follow(results, summary, progress)
    finally:
        summary.seconds = time.monotonic() - start
        folder.clean()
    return summary


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).item()  # on the meta device there is nothing to read
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"device {name!r} cannot be used here: {reason}") from error
    return name


def _precision(amp: str, device: str) -> Precision:
    if amp == "auto":
        return "bf16" if device.startswith("cuda") else "none"
    for known in ("none", "bf16", "fp16"):
        if amp == known:
            return known
    raise SettingsError(f"amp {amp!r} is none of auto, none, bf16, fp16")


def _in_process(
    run: Run, annotator: DenseAnnotator, pending: list[int]
) -> Iterator[Receipt | Quarantined]:
    if pending:
        with closing(ShardWorker(run, annotator)) as worker, sigterm_interrupts():
            for shard in pending:
                yield worker.annotate_shard(shard)


def _follow(results: Iterator[Receipt | Quarantined], summary: Summary, progress: Progress) -> None:
    """Count results as they arrive; raises at the end where shards had to be set aside."""
    quarantined: list[Quarantined] = []
    progress(summary.already_done, summary.samples)
    try:
        for result in results:
            if isinstance(result, Quarantined):
                quarantined.append(result)
                continue
            summary.add(result)
            done = summary.already_done + summary.labelled + len(summary.failures)
            progress(done, summary.samples)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"{summary.out}: stopped. The {summary.labelled} images this run labelled are kept; "
            "run the same command again to go on"
        ) from None
    if quarantined:
        first = quarantined[0]
        raise ShardsFailedError(
            f"{summary.out}: {len(quarantined)} of {summary.settings.num_shards} shards failed on "
            f"every attempt, such as shard {first.shard} ({first.reason}). All others are kept; "
            "run the same command again to try them once more"
        )
