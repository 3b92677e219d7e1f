"""The `tokenlabel` command: parses, calls, prints.

Heavy libraries are imported by the commands that need them, so that `--help` is instant. Exit
status: 0 done; 1 an error, or faults found by `verify`; 2 wrong usage; 3 done, but some images
could not be labelled; 130 interrupted.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import RenderableType

    from .storage import LabelMap
    from .storage.manifest import Manifest

__all__ = ["main"]

EXIT_FAILED_IMAGES = 3
EXIT_INTERRUPTED = 130
_FAILURES_SHOWN = 10


class _Commands(click.Group):
    """Prints the errors that tokenlabel raises on purpose as one line."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's own signature
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Stopped before any work was begun.", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except Exception as error:
            if isinstance(error, click.ClickException | click.exceptions.Exit | click.Abort):
                raise
            from .inspection import printable
            from .storage.errors import TokenLabelError

            if not isinstance(error, TokenLabelError):
                raise
            click.echo(f"Error: {printable(' '.join(str(error).split()))}", err=True)
            ctx.exit(error.exit_status)


def _image_size(value: str) -> tuple[int, int]:
    sides = value.lower().split("x")
    if len(sides) not in {1, 2} or not all(side.isdigit() and int(side) for side in sides):
        raise click.BadParameter(f"{value!r} is not a side such as 288, or HEIGHTxWIDTH")
    return int(sides[0]), int(sides[-1])


def _cell(value: str) -> tuple[int, int]:
    row, _, column = value.partition(",")
    if not (row.strip().isdigit() and column.strip().isdigit()):
        raise click.BadParameter(f"{value!r} is not a cell such as 4,7 (row,column)")
    return int(row), int(column)


def _box(value: str) -> tuple[float, float, float, float]:
    try:
        x0, y0, x1, y1 = (float(part) for part in value.split(","))
        if not all(map(math.isfinite, (x0, y0, x1, y1))):
            raise ValueError(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a box such as 0.2,0.1,0.7,0.9") from None
    return x0, y0, x1, y1


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tokenlabel")
def main() -> None:
    """Dense labels: annotate every image once, train students on the maps.

    \b
    Examples:
      tokenlabel annotate photos labels --model resnet50
      tokenlabel info labels
      tokenlabel inspect labels cats/tom.jpg
      tokenlabel verify labels --source photos
    """


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--model",
    required=True,
    metavar="NAME",
    help="A timm classifier, or package.module:factory returning a DenseAnnotator.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Local weights for a timm model: safetensors, or torch (weights only).",
)
@click.option(
    "--pretrained/--no-pretrained", default=True, help="Fetch timm's weights.  [default: yes]"
)
@click.option(
    "--img-size",
    type=_image_size,
    metavar="N|HxW",
    help="Input size in pixels.  [default: the model's own]",
)
@click.option(
    "--view",
    type=click.Choice(["stretch", "letterbox", "center"]),
    default="stretch",
    show_default=True,
    help="What the annotator sees: the whole image stretched, padded, or its centre square.",
)
@click.option(
    "--top-k", type=click.IntRange(1), default=5, show_default=True, help="Classes a cell keeps."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Images the annotator sees together.",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Images of a shard, the unit of work and of commit.",
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Ray workers; 0 runs in this process.  [default: one a GPU, or one]",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...")
@click.option(
    "--amp",
    type=click.Choice(["auto", "none", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Precision of the forward pass; auto is bf16 on CUDA, none elsewhere.",
)
@click.option(
    "--classes",
    type=click.Path(path_type=Path),
    help="A text file with one class name a line, in the annotator's order.",
)
@click.option(
    "--dry-run", is_flag=True, help="Check source, model and an earlier store; write nothing."
)
def annotate(
    source: Path,
    out: Path,
    classes: Path | None,
    *,
    dry_run: bool,
    **options: Any,  # noqa: ANN401 - handed on under the names that `annotate` has for them
) -> None:
    """Label every image below SOURCE densely, into a label store OUT.

    Run the same command again to continue a run that was stopped: what is committed stays.

    \b
    Examples:
      tokenlabel annotate photos labels --model resnet50
      tokenlabel annotate photos labels --model convnext_base --img-size 384 --top-k 10
      tokenlabel annotate photos labels --model resnet50 --checkpoint mine.safetensors
      tokenlabel annotate photos labels --model my_package.clip:annotator --workers 0
    """
    from . import annotate as annotation
    from .inspection import printable
    from .storage import open_store

    with _progress("images") as progress:
        done = annotation.annotate(
            source,
            out,
            class_names=_class_names(classes) if classes else None,
            dry_run=dry_run,
            progress=progress,
            **options,
        )
    for note in done.notes:
        click.secho(f"Note: {note}", fg="yellow", err=True)
    settings = done.settings
    rows, columns = settings.grid
    maps = f"{rows}x{columns} cells, top {settings.top_k} of {settings.num_classes} classes"
    if dry_run:
        click.echo(f"{done.samples} images in {settings.num_shards} shards: {maps}.")
        click.echo("Dry run: nothing was written.")
        return
    if done.already_done:
        click.echo(f"{done.already_done} of {done.samples} images were done before.")
    if done.labelled:
        click.echo(
            f"{done.labelled} images labelled in {done.seconds:.1f} s "
            f"({done.labelled / done.seconds:.1f} images/s): "
            f"{maps}, {done.size / done.labelled:,.0f} bytes an image."
        )
    click.echo(f"The store is {out}; look into it with: tokenlabel info {out}")
    failures = open_store(out).failures
    for key, reason in list(failures.items())[:_FAILURES_SHOWN]:
        click.echo(printable(f"Failed: {source / key}: {reason}"), err=True)
    if failures:
        click.echo(f"{len(failures)} of {done.samples} images have no label.", err=True)
        sys.exit(EXIT_FAILED_IMAGES)


@main.command()
@click.argument("store", type=click.Path(path_type=Path))
def info(store: Path) -> None:
    """Say what a STORE is, what is in it and what it costs.

    \b
    Example:
      tokenlabel info labels
    """
    from .inspection import store_view
    from .storage import open_store

    _show(store_view(open_store(store, allow_partial=True)))


@main.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("key")
@click.option("--cell", type=_cell, metavar="R,C", help="Show one cell's ranked classes.")
@click.option("--png", type=click.Path(path_type=Path), help="Draw a picture into this file.")
@click.option(
    "--image",
    type=click.Path(path_type=Path),
    help="The image to draw on: its file, or the folder that was annotated.",
)
@click.option(
    "--crop",
    type=_box,
    metavar="X0,Y0,X1,Y1",
    help="Draw this crop with its replayed token targets; shares of the image, 0 to 1.",
)
@click.option("--flip", is_flag=True, help="Mirror the crop left to right.")
def inspect(
    store: Path,
    key: str,
    *,
    cell: tuple[int, int] | None,
    png: Path | None,
    image: Path | None,
    crop: tuple[float, float, float, float] | None,
    flip: bool,
) -> None:
    """Show the label map of the image KEY in the terminal, or in a picture.

    \b
    Examples:
      tokenlabel inspect labels cats/tom.jpg
      tokenlabel inspect labels cats/tom.jpg --cell 4,7
      tokenlabel inspect labels cats/tom.jpg --image photos --png tom.png
      tokenlabel inspect labels tom.jpg --image tom.jpg --png c.png --crop 0.2,0.1,0.7,0.9 --flip
    """
    if (png is None) != (image is None) or ((crop or flip) and png is None):
        raise click.UsageError("a picture needs --png and --image; --crop and --flip are for them")
    if png is not None and cell is not None:
        raise click.UsageError("--cell is shown in the terminal; leave it out for a picture")
    from .inspection import cell_view, map_view, sample_view
    from .storage import open_store

    labels = open_store(store, allow_partial=True)
    label_map = labels[key]
    if png is not None and image is not None:
        photo = _photo(image / key if image.is_dir() else image)
        box = (0.0, 0.0, 1.0, 1.0) if crop is None and flip else crop
        _draw(png, photo, label_map, labels.manifest, title=key, crop=box, flip=flip)
        return
    if cell is not None:
        _show(cell_view(label_map, labels.manifest, *cell))
        return
    _show(sample_view(labels.info(key), labels.manifest))
    _show(map_view(label_map, labels.manifest))


@main.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    help="Also hold the store's keys against this folder of images.",
)
def verify(store: Path, source: Path | None) -> None:
    """Check every byte and value of a STORE; one line a fault, exit status 1 if there is any.

    \b
    Example:
      tokenlabel verify labels --source photos
    """
    from . import storage
    from .inspection import printable

    keys = None
    if source is not None:
        from .images import image_keys

        keys = list(image_keys(source))
    faults = 0
    with _progress("shards") as progress:
        for fault in storage.verify(store, keys, progress):
            faults += 1
            click.echo(printable(fault))
    if faults:
        click.echo(f"{faults} faults in {store}.", err=True)
        sys.exit(1)
    labels = storage.open_store(store)
    failed = f", {len(labels.failures)} images failed" if labels.failures else ""
    click.echo(f"{store} is sound: {len(labels)} maps in {labels.committed_shards} shards{failed}.")


def _photo(path: Path) -> "Image":
    from .images import decode, read_image

    try:
        return decode(read_image(path))[0]
    except OSError as error:
        raise click.BadParameter(f"{path}: {error}", param_hint="--image") from error


def _draw(
    png: Path,
    photo: "Image",
    label_map: "LabelMap",
    manifest: "Manifest",
    *,
    title: str,
    crop: tuple[float, float, float, float] | None,
    flip: bool,
) -> None:
    try:
        from . import pictures
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise click.ClickException(
            "pictures are drawn with matplotlib: pip install 'tokenlabel[pictures]'"
        ) from error

    if crop is None:
        figure = pictures.draw_map(photo, label_map, manifest, title)
    else:
        figure = pictures.draw_crop(photo, label_map, manifest, title, crop, flip=flip)
    try:
        figure.savefig(png, format="png", bbox_inches="tight")
    except OSError as error:
        raise click.BadParameter(f"{png}: {error}", param_hint="--png") from error
    click.echo(f"Picture: {png}")


def _show(view: "RenderableType") -> None:
    from rich.console import Console

    Console(highlight=False).print(view)


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error: share, rate, time left; silent in a pipe."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} {unit}/s" if task.speed else "")

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), unit, Rate(), TimeRemainingColumn())
    # Progress comes shard by shard, so the rate must be taken over more than one.
    period, silent = 3600, not console.is_terminal
    with Progress(*columns, console=console, disable=silent, speed_estimate_period=period) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _class_names(path: Path) -> list[str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path}: {error}", param_hint="--classes") from error
    return [line.strip() for line in lines if line.strip()]


if __name__ == "__main__":
    main()
