"""What `info` and `inspect` show in a terminal, as rich renderables.

Colour helps but is never needed: every class also has a letter, so a pipe or a terminal without
colour shows the same map.
"""

import string

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from .storage import LabelMap, LabelStore, SampleInfo
from .storage.errors import SettingsError
from .storage.manifest import Manifest

__all__ = ["PALETTE", "cell_view", "map_view", "printable", "sample_view", "store_view"]

# Okabe and Ito's palette, distinguishable with any common colour blindness, with the text
# colour that reads on each.
PALETTE = (
    ("#e69f00", "black"),
    ("#56b4e9", "black"),
    ("#009e73", "white"),
    ("#f0e442", "black"),
    ("#0072b2", "white"),
    ("#d55e00", "white"),
    ("#cc79a7", "black"),
    ("#5a5a5a", "white"),
)
_OTHER = Style(color="#9a9a9a")
_BAR = 30
_FAILURES_SHOWN = 10


def printable(text: str) -> str:
    """The text with what could upset a terminal or a line spelled out; file names may hold it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def store_view(store: LabelStore) -> RenderableType:
    """A table of what a store is, what is in it and what it costs."""
    manifest, settings = store.manifest, store.manifest.settings
    annotator = settings.annotator
    figures = store.statistics
    height, width = annotator["preprocessing"]["input_size"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    name = annotator.get("model") or annotator["name"]
    table.add_row("annotator", f"{name} at {height}x{width}, precision {annotator['amp']}")
    table.add_row("weights", f"sha256 {annotator.get('weights_sha256', 'not hashed')[:16]}")
    rows, columns = settings.grid
    table.add_row(
        "map",
        f"{rows}x{columns} cells, top {settings.top_k} of "
        f"{settings.num_classes} classes, view {settings.view}",
    )
    source = manifest.source
    classes = f", {len(source['classes'])} class folders" if source["classes"] else ""
    table.add_row("source", f"{source['kind']} {source['name']}{classes}")
    table.add_row(
        "shards",
        f"{store.committed_shards} of {settings.num_shards} committed, "
        f"{settings.shard_size} images each",
    )
    table.add_row(
        "images", f"{len(store)} labelled, {len(store.failures)} failed, {settings.rows} planned"
    )
    table.add_row(
        "size",
        f"{figures.entry_bytes / max(len(store), 1):,.0f} bytes an image, "
        f"{figures.entry_bytes / 1e6:,.2f} MB in all (profile {settings.profile})",
    )
    table.add_row(
        "lost to rounding", f"{figures.kl_quantization:.1e} nats a cell (step {settings.step:g})"
    )
    table.add_row(
        "lost to the annotator's full distribution",
        f"{figures.kl_full:.3f} nats a cell "
        f"(k = {settings.top_k} and an even rest, rounding included)",
    )
    created = ", ".join(f"{name} {number}" for name, number in manifest.created_with.items())
    table.add_row("created with", created)
    failed = [
        Text(printable(f"failed: {key}: {why}"))
        for key, why in list(store.failures.items())[:_FAILURES_SHOWN]
    ]
    if len(store.failures) > len(failed):
        failed.append(Text(f"... and {len(store.failures) - len(failed)} more"))
    return Group(table, *failed)


def sample_view(info: SampleInfo, manifest: Manifest) -> RenderableType:
    """One paragraph on a sample: size, folder class, the annotator's pooled answer."""
    pooled = ", ".join(f"{manifest.class_name(c)} {p:.0%}" for c, p in info.pooled)
    lines = [f"{printable(info.key)}  {info.size[0]}x{info.size[1]} pixels"]
    if info.orientation != 1:
        lines[0] += f", stored with EXIF orientation {info.orientation}"
    if info.target is not None:
        lines.append(f"class in the source: {info.target}")
    lines.append(f"whole image: {pooled}")
    return Text("\n".join(lines))


def map_view(label_map: LabelMap, manifest: Manifest) -> RenderableType:
    """The grid of top classes and a legend with each class's share of the cells."""
    top: NDArray[np.int32] = label_map.class_ids[0]
    classes, counts = np.unique(top, return_counts=True)
    order = np.lexsort((classes, -counts))
    ranked: list[int] = classes[order].tolist()
    letters = string.ascii_lowercase + string.ascii_uppercase
    symbols = dict(zip(ranked, letters, strict=False))
    styles = {
        class_id: Style(bgcolor=back, color=front)
        for class_id, (back, front) in zip(ranked, PALETTE, strict=False)
    }
    grid = Text()
    for row in top.tolist():
        for class_id in row:
            grid.append(f"{symbols.get(class_id, '.')} ", styles.get(class_id, _OTHER))
        grid.append("\n")
    confidence = label_map.top_probabilities()
    legend = Table(box=None, pad_edge=False)
    for column in ("", "class", "id", "cells", "mean probability"):
        legend.add_column(column, justify="left" if column in {"", "class"} else "right")
    shown = ranked[: len(PALETTE) + 4]
    for class_id in shown:
        here = top == class_id
        legend.add_row(
            Text(f"{symbols[class_id]} ", styles.get(class_id, _OTHER)),
            manifest.class_name(class_id),
            str(class_id),
            f"{here.mean():.0%}",
            f"{confidence[here].mean():.2f}",
        )
    if len(ranked) > len(shown):
        rest = np.isin(top, ranked[len(shown) :]).mean()
        legend.add_row("", f"{len(ranked) - len(shown)} more classes", "", f"{rest:.0%}", "")
    layout = Table.grid(padding=(0, 3))
    layout.add_row(grid, legend)
    return layout


def cell_view(label_map: LabelMap, manifest: Manifest, row: int, column: int) -> RenderableType:
    """The ranked classes of one cell, as bars.

    Raises:
        SettingsError: the cell is outside the grid.
    """
    rows, columns = label_map.grid
    if not (0 <= row < rows and 0 <= column < columns):
        raise SettingsError(
            f"cell {row},{column} is outside the {rows}x{columns} grid; "
            f"rows are 0 to {rows - 1}, columns 0 to {columns - 1}"
        )
    probabilities = label_map.probabilities()[:, row, column]
    ids = label_map.class_ids[:, row, column]
    listed = [int(c) for c in ids[label_map.logits[:, row, column] > 0]]
    table = Table(box=None, pad_edge=False)
    for name in ("class", "id", "probability", ""):
        table.add_column(name, justify="right" if name in {"id", "probability"} else "left")
    for class_id in listed:
        p = float(probabilities[class_id])
        bar = "█" * max(1, round(p * _BAR))
        table.add_row(manifest.class_name(class_id), str(class_id), f"{p:.3f}", bar)
    others = label_map.num_classes - len(listed)
    rest = 1 - float(probabilities[listed].sum())
    table.add_row(f"each of the other {others}", "", f"{rest / others:.1e}", "")
    return Group(Text(f"cell {row},{column} (row, column from the top left)"), table)
