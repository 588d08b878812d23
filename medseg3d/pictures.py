"""A model of two-dimensional pictures: a PNG, JPEG or TIFF in, classes, objects or both on its own pixels out.

Shape legend: image_CHW is a picture (channels, rows, columns), image_BCHW goes through the network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from monai.inferers import SimpleInferer
from PIL import Image

from medseg3d.data.pictures import as_loaded
from medseg3d.data.results import as_result, checked_kind
from medseg3d.inference.device import device_name
from medseg3d.inference.memory import keep_freed_memory
from medseg3d.inference.strategy import Strategy, plain
from medseg3d.io import RASTER_SUFFIXES, LabelTable, read_image
from medseg3d.io.formats import split_name
from medseg3d.io.raster import pixels_of
from medseg3d.io.results import Result, write_named_result, write_result_json
from medseg3d.recipe import as_strategy
from medseg3d.report.overlay import plot
from medseg3d.report.picture_statistics import picture_statistics
from medseg3d.report.preview import write_preview
from medseg3d.report.run import Stopwatch
from medseg3d.runner import Runner
from medseg3d.segmenter import WORTH_A_CHOICE
from medseg3d.tasks import Categories, Panoptic, SemanticMap
from medseg3d.trial import windows_of

if TYPE_CHECKING:
    from medseg3d.batch import CaseResult

_COLUMNS = 1  # the spatial axis of a picture from its left side to its right


@dataclass(frozen=True)
class Picture:
    """A picture that was read.

    Attributes:
        pixels: (rows, columns) or (rows, columns, 3), as the file has them.
        path: the file; None for an array.
        seconds: time of each stage so far.
    """

    pixels: np.ndarray
    path: Path | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PictureSegmentation:
    """What a model made of one picture.

    Attributes:
        result: classes, objects, or segments: a value of :mod:`medseg3d.tasks`.
        image: the picture's pixels.
        table: names and colours of the classes.
        model_name: name and version of the model.
        source: the picture's file name.
        warnings: what the user should know, one sentence each.
        seconds: time of each stage.
    """

    result: Result
    image: np.ndarray
    table: LabelTable
    model_name: str
    source: str = "picture"
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    crop: ClassVar[None] = None  # a picture is segmented as a whole

    @property
    def labels(self) -> dict[int, str]:
        """Number of each class -> name."""
        return dict(self.table.names)

    def save(self, path: str | Path) -> Path:
        """Write the numbers of classes or objects as ``.png`` or ``.tif``, COCO's colours of a panoptic segmentation as
        ``.png``, or objects and segments as COCO's ``.json``.

        The names of classes go into `<stem>.labels.json` beside a label image.

        Raises:
            ValueError: another suffix, or JSON of classes alone.
        """
        path = Path(path)
        if path.suffix.lower() == ".json":
            if isinstance(self.result, SemanticMap):
                raise ValueError("COCO's JSON holds objects, and this model gives classes alone: save a .png or .tif")
            return write_result_json(path, self.result, self.source)
        return write_named_result(path, self.result, self.table, self.source)

    def statistics(self) -> dict[str, Any]:
        """Area, place and intensity of each class and object; see
        :func:`medseg3d.report.picture_statistics.picture_statistics`."""
        return picture_statistics(self.result, self.image)

    def plot(self, **options: Any) -> Image.Image:
        """The segmentation drawn on the picture, see :func:`medseg3d.report.overlay.plot` for ``options``."""
        colors = self.table.colors if isinstance(self.result, SemanticMap) else None
        return plot(self.image, self.result, **{"colors": colors, "title": self.source, **options})

    def preview(self, path: str | Path, title: str | None = None) -> Path:
        """Write what :meth:`plot` draws as PNG."""
        return write_preview(path, self.plot(title=title or self.source))


class PictureSegmenter:
    """A network of pictures with its preprocessing, inferer and post-processing.

    Built by :func:`medseg3d.load_model`; the parts are what a bundle's ``inference.json`` names.

    Args:
        runner: the network and how it runs.
        preprocessing: MONAI dictionary transform from {"image": MetaTensor (3, rows, columns)}, as
            ``LoadPictured`` leaves it, to what the network gets.
        inferer: called as ``inferer(image_BCHW, network)``.
        postprocessing: MONAI dictionary transform that makes "pred" what :func:`medseg3d.data.results.as_result` takes.
        kind: "semantic", "instances" or "panoptic".
        categories: what the numbers of classes are.
        name: name and version, for titles and reports.
        record: what a run report says of the model.
        notes: what was adapted when the model was loaded.
        importing: within it the parts run, for modules of their own that they import only then.

    Raises:
        ValueError: mirror images of a network whose inferer is none of medseg3d's strategies.
    """

    def __init__(
        self,
        runner: Runner,
        preprocessing: Callable,
        inferer: Callable,
        postprocessing: Callable,
        kind: str,
        categories: Categories,
        name: str,
        record: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        importing: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.runner = runner
        self.network, self.device = runner.network, runner.device
        self.preprocessing = preprocessing
        self.inferer = inferer
        self.postprocessing = postprocessing
        self.pictures = checked_kind(kind)
        self.categories = categories
        self.table = LabelTable({number: category.name for number, category in categories.items()})
        self.name = name
        self.record = dict(record or {})
        self.notes = tuple(notes)
        self.importing = importing
        if runner.mirror and self._strategy is None:
            raise ValueError(f"mirror images are averaged as logits, which {name} does not give: leave mirror out")

    @property
    def labels(self) -> dict[int, str]:
        """Number of each class -> name."""
        return dict(self.table.names)

    @property
    def precision(self) -> str:
        """In which precision the network runs, and why it was chosen."""
        return self.runner.reason

    def describe_device(self) -> str:
        """Where the network runs, for reports."""
        return device_name(self.device)

    def predict(self, image: Any, progress: Callable[[str], None] | None = None) -> PictureSegmentation:
        """Segment one picture.

        Args:
            image: a path, an array (rows, columns) or (rows, columns, 3), or a Pillow image.
            progress: called with the name of each stage as it begins.

        Raises:
            ValueError: the picture cannot be read or segmented; the message says why and what to do.
            FileNotFoundError: no such file.
        """
        return self.segment(self.read(image, progress=progress), progress)

    def read(self, image: Any, allow_non_hu: bool = False, progress: Callable[[str], None] | None = None) -> Picture:
        """The first half of :meth:`predict`. Pictures have no unit, so that ``allow_non_hu`` changes nothing."""
        stopwatch = Stopwatch(progress)
        with stopwatch.stage("read"):
            path = Path(image) if isinstance(image, str | os.PathLike) else None
            if path is not None and path.exists() and split_name(path)[1] not in RASTER_SUFFIXES:
                raise ValueError(
                    f"{path} is no picture, and {self.name} segments pictures ({', '.join(RASTER_SUFFIXES)}); a scan "
                    "takes another model"
                )
            if path is not None:
                pixels = read_image(path)
            else:  # the palette or transparency of a Pillow image is resolved as that of a file is
                pixels = pixels_of(image) if isinstance(image, Image.Image) else np.asarray(image)
            _check(pixels, str(path or "the picture"))
        return Picture(pixels, path, dict(stopwatch.seconds))

    def segment(self, picture: Picture, progress: Callable[[str], None] | None = None) -> PictureSegmentation:
        """The second half of :meth:`predict`: segment a picture that was read."""
        with self.importing():
            return self._segment(picture, progress)

    def _segment(self, picture: Picture, progress: Callable[[str], None] | None) -> PictureSegmentation:
        stopwatch, warnings = Stopwatch(progress), list[str]()
        source = "picture" if picture.path is None else picture.path.name
        with stopwatch.stage("preprocess"):
            data = self.preprocessing({"image": as_loaded(picture.pixels, picture.path or source)})
        with keep_freed_memory() if self.device.type == "cpu" else nullcontext(), torch.inference_mode():
            data = {**data, "pred": self._prediction(data["image"], warnings, stopwatch)}
            with stopwatch.stage("postprocess"):
                result = as_result(self.postprocessing(data)["pred"], self.pictures, self.categories)
        if result.shape != picture.pixels.shape[:2]:
            raise ValueError(
                f"the post-processing of {self.name} gives {result.shape}, but the picture has "
                f"{picture.pixels.shape[:2]} pixels: its inference.json must bring the prediction back to them"
            )
        if _is_empty(result):
            warnings.append(f"nothing was found: does the picture show what {self.name} is made for?")
        seconds = {**picture.seconds, **stopwatch.seconds}
        return PictureSegmentation(result, picture.pixels, self.table, self.name, source, tuple(warnings), seconds)

    def predict_many(
        self, inputs: Sequence[str | Path] | str | Path, output_dir: str | Path, resume: bool = False, **options: Any
    ) -> Iterator[CaseResult]:
        """Segment every picture among ``inputs`` and write the results; see :func:`medseg3d.batch.predict_many`."""
        from medseg3d.batch import predict_many

        return predict_many(self, inputs, output_dir, resume=resume, **options)

    @property
    def _strategy(self) -> Strategy | None:
        """How the inferer lays windows; None for one that hands the network the whole picture."""
        return None if isinstance(self.inferer, SimpleInferer) else as_strategy(self.inferer)

    def _prediction(self, image_CHW: torch.Tensor, warnings: list[str], stopwatch: Stopwatch) -> Any:
        """What the network returns for the picture, on the CPU: a tensor without batch axis, or a detection."""
        image_BCHW = plain(image_CHW)[None].to(self.device)
        strategy, example = self._strategy, None
        worth = self.runner.wanted != "auto" or (strategy and windows_of(strategy, image_BCHW) >= WORTH_A_CHOICE)
        if strategy is not None and worth:
            example = partial(strategy.example, image_BCHW)
        if self.runner.wanted != "fp32":
            with stopwatch.stage("precision"):
                self.runner.choose(example, warnings)
        with stopwatch.stage("network"):
            outputs = self.runner(partial(self.inferer, image_BCHW), example, warnings, _COLUMNS, strategy)
        if not isinstance(outputs, torch.Tensor | list | tuple) or len(outputs) != 1:
            raise ValueError(
                f"the inferer of {self.name} must return a tensor (1, ...) or a list of one detection for a picture, "
                f"got {type(outputs).__name__}"
            )
        return _on_cpu(outputs[0])


def _check(pixels: np.ndarray, what: str) -> None:
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3) or pixels.dtype.kind not in "biuf":
        raise ValueError(
            f"{what} must be numbers (rows, columns) or (rows, columns, 3), got {pixels.dtype} of the shape "
            f"{pixels.shape}: a scan takes another model"
        )
    if not pixels.size:
        raise ValueError(f"{what} has no pixel: its shape is {pixels.shape}")
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        count = int(np.count_nonzero(~np.isfinite(pixels)))
        raise ValueError(f"{count} values of {what} are NaN or infinite: replace them, with np.nan_to_num for one")


def _on_cpu(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.cpu().float() if output.is_floating_point() else output.cpu()
    return {name: _on_cpu(value) for name, value in output.items()} if isinstance(output, Mapping) else output


def _is_empty(result: Result) -> bool:
    if isinstance(result, SemanticMap):
        return not np.isin(result.classes, list(result.categories)).any()
    return not result.ids.any() if isinstance(result, Panoptic) else not len(result)
