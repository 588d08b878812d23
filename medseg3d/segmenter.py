"""One model, loaded once: a scan in, a segmentation on the scan's own grid out.

Shape legend: arrays are (D, H, W); image_BCDHW and logits_BKDHW go through the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medseg3d.data.checks import check_ct, check_voxels
from medseg3d.geometry import Geometry
from medseg3d.inference import CoarseToFine, Downsampled, Slices, SubVolumes
from medseg3d.inference.augmentation import side_pairs
from medseg3d.inference.device import device_name
from medseg3d.inference.grid_map import edge_to_edge, through
from medseg3d.inference.memory import keep_freed_memory
from medseg3d.inference.onto_grid import labels_onto
from medseg3d.inference.strategy import plain
from medseg3d.io import LabelTable, as_volume, write_label_map
from medseg3d.io.labels import unnamed_labels
from medseg3d.planning import Plan, make_plan, peak_memory
from medseg3d.recipe import Recipe, as_strategy, find_recipe
from medseg3d.report.preview import preview, write_preview
from medseg3d.report.run import Stopwatch
from medseg3d.report.statistics import statistics
from medseg3d.runner import Runner
from medseg3d.volume import Volume

if TYPE_CHECKING:
    from medseg3d.batch import CaseResult


# To choose a precision takes the time of two or three windows.
WORTH_A_CHOICE = 6


@dataclass(frozen=True)
class Segmentation:
    """What a model made of one scan.

    Attributes:
        segmentation: label map on the scan's own grid, uint8 or uint16.
        image: the scan as it was read.
        table: names and colours of the labels.
        model_name: name and version of the model.
        warnings: what the user should know, one sentence each.
        seconds: time of each stage.
    """

    segmentation: Volume
    image: Volume
    table: LabelTable
    model_name: str
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def labels(self) -> dict[int, str]:
        """Label number -> name."""
        return dict(self.table.names)

    def save(self, path: str | Path) -> Path:
        """Write the label map; the suffix chooses the format (.nii.gz, .nii, .nrrd, .mha). Names travel with it."""
        return write_label_map(self.segmentation, path, self.table)

    def statistics(self) -> dict[str, Any]:
        """Volume, intensities and place of every organ, see :func:`medseg3d.report.statistics.statistics`."""
        return statistics(self.segmentation, self.image, self.labels)

    def preview(self, path: str | Path, title: str | None = None) -> Path:
        """Write a PNG of three planes through the segmentation with a legend."""
        name = title or Path(str(self.image.header.get("path", "scan"))).name
        picture = preview(self.segmentation, self.image, self.labels, self.table.colors, name, self.model_name)
        return write_preview(path, picture)


@dataclass(frozen=True)
class Scan:
    """A scan that was read and found fit for a model.

    Attributes:
        volume: its voxels and grid.
        warnings: what the user should know, one sentence each.
        seconds: time of each stage so far.
    """

    volume: Volume
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


class Segmenter:
    """A network with its preprocessing, strategy and post-processing.

    Built by :func:`medseg3d.load_model`; the parts are what a bundle's ``inference.json`` names.

    Args:
        network: on ``device``, in evaluation mode.
        preprocessing: MONAI dictionary transform from {"image": MetaTensor (D, H, W)} to the network's grid.
        inferer: called as ``inferer(image_BCDHW, network)``.
        postprocessing: MONAI dictionary transform that brings "pred" to a label map on the input's grid.
        table: names and colours of the labels.
        device: where the network runs.
        name: name and version, for titles and reports.
        expects_hu: whether the input must be a CT in Hounsfield units.
        record: what a run report says of the model.
        notes: what was adapted when the model was loaded.
        compile, precision: how the network runs, see :class:`medseg3d.runner.Runner`.
        mirror: average over mirror images, see :class:`medseg3d.runner.Runner`; labels of the left and right side,
            known by their names, change places.
        max_ram, max_vram: bytes that the process and the device may hold; what has to be given up for it, a warning
            tells.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        preprocessing: Callable,
        inferer: Callable,
        postprocessing: Callable,
        table: LabelTable,
        device: torch.device,
        name: str,
        expects_hu: bool = True,
        record: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        compile: bool = False,
        precision: str = "fp32",
        mirror: bool | Sequence[int] = False,
        max_ram: int | None = None,
        max_vram: int | None = None,
    ) -> None:
        self.network = network
        self.preprocessing = preprocessing
        self.inferer = inferer
        self.postprocessing = postprocessing
        self.table = table
        self.device = device
        self.name = name
        self.expects_hu = expects_hu
        self.record = dict(record or {})
        self.notes = tuple(notes)
        self.max_ram, self.max_vram = max_ram, max_vram
        self.runner = Runner(network, device, precision, compile, mirror, side_pairs(table.names))

    @property
    def labels(self) -> dict[int, str]:
        """Label number -> name."""
        return dict(self.table.names)

    def predict(
        self, image: Any, allow_non_hu: bool = False, progress: Callable[[str], None] | None = None
    ) -> Segmentation:
        """Segment one scan.

        Args:
            image: a path, a nibabel or SimpleITK image, a pair (array, affine), a MetaTensor or a Volume; see
                :func:`medseg3d.io.as_volume`.
            allow_non_hu: go on where the intensities cannot be Hounsfield units.
            progress: called with the name of each stage as it begins.

        Raises:
            ValueError: the scan cannot be read or segmented; the message says why and what to do.
            FileNotFoundError: no such file.
        """
        return self.segment(self.read(image, allow_non_hu, progress), progress)

    def read(self, image: Any, allow_non_hu: bool = False, progress: Callable[[str], None] | None = None) -> Scan:
        """The first half of :meth:`predict`: read one scan and check it."""
        stopwatch = Stopwatch(progress)
        with stopwatch.stage("read"):
            volume = as_volume(image)
            warnings = [*volume.header.get("notes", ())]
            if self.expects_hu:
                warnings += check_ct(volume, allow_non_hu)
            else:
                check_voxels(volume)
        return Scan(volume, tuple(warnings), dict(stopwatch.seconds))

    def segment(self, scan: Scan, progress: Callable[[str], None] | None = None) -> Segmentation:
        """The second half of :meth:`predict`: segment a scan that was read."""
        stopwatch = Stopwatch(progress)
        volume, warnings = scan.volume, [*scan.warnings]
        with stopwatch.stage("preprocess"):
            data = self.preprocessing({"image": _meta_tensor(volume)})
        with keep_freed_memory() if self.device.type == "cpu" else nullcontext(), torch.inference_mode():
            data, rest = self._labels(data, volume, warnings, stopwatch)
            with stopwatch.stage("postprocess"):
                labels = self._label_map(rest(data)["pred"], volume)
            del data  # what the windows left is given back too
        if not labels.any():
            warnings.append(f"nothing was found: does the scan show the part of the body that {self.name} is made for?")
        seconds = {**scan.seconds, **stopwatch.seconds}
        return Segmentation(volume.with_array(labels), volume, self.table, self.name, tuple(warnings), seconds)

    def plan(self, scan: Scan) -> Plan:
        """How :meth:`segment` will do a scan and what that will take; one window of it is tried.

        Raises:
            ValueError: the bundle does more than the usual at its end, so that it is carried out as it stands.
            OverMemoryLimit: the scan does not fit into ``max_ram`` and ``max_vram``.
        """
        recipe = self._recipe()
        if recipe is None:
            raise ValueError(
                f"what {self.name} does after its network is carried out as it stands, and cannot be planned"
            )
        with peak_memory(torch.device("cpu")) as before:
            image = self.preprocessing({"image": _meta_tensor(scan.volume)})["image"]
        plan = self._plan(recipe, image, scan.volume, [])
        return replace(plan, ram=max(plan.ram, before.held + before.ram))

    def _recipe(self) -> Recipe | None:
        recipe = find_recipe(self.inferer, self.postprocessing)
        if recipe is None or self.device.type != "cpu":
            return recipe
        strategy = recipe.strategy
        if isinstance(strategy, SubVolumes) and strategy.batch_size > 1:
            # Several windows at once take more memory there and hardly less time.
            return replace(recipe, strategy=strategy.changed(batch_size=1))
        return recipe

    def _plan(self, recipe: Recipe, image: torch.Tensor, volume: Volume, warnings: list[str]) -> Plan:
        image_BCDHW = plain(image)[None].to(self.device)

        def plan(network: Callable) -> Plan:
            limits = self.max_ram, self.max_vram
            return make_plan(recipe.strategy, recipe.order, image_BCDHW, volume.shape, network, *limits)

        return self.runner(plan, partial(recipe.strategy.example, image_BCDHW), warnings)

    def predict_many(
        self, inputs: Sequence[str | Path] | str | Path, output_dir: str | Path, resume: bool = False, **options: Any
    ) -> Iterator[CaseResult]:
        """Segment every scan among ``inputs`` and write the results; see :func:`medseg3d.batch.predict_many`."""
        from medseg3d.batch import predict_many

        return predict_many(self, inputs, output_dir, resume=resume, **options)

    @property
    def precision(self) -> str:
        """In which precision the network runs, and why it was chosen."""
        chosen = self.runner.precision
        wanted = self.runner.wanted
        return chosen.reason if chosen is not None else "float32" if wanted in ("auto", "fp32") else wanted

    def describe_device(self) -> str:
        """Where the network runs, for reports."""
        return device_name(self.device)

    def _labels(
        self, data: dict[str, Any], volume: Volume, warnings: list[str], stopwatch: Stopwatch
    ) -> tuple[dict[str, Any], Callable]:
        """The scan with its "pred", and the post-processing that is left.

        Where the bundle does the usual, "pred" is a label map on the scan's own grid already, made in slabs; else it is
        what the inferer returns.
        """
        image = data["image"]
        recipe = self._recipe()
        limited = (self.max_ram, self.max_vram) != (None, None)
        maps = None
        if recipe is not None:
            if limited:
                with stopwatch.stage("plan"):
                    plan = self._plan(recipe, image, volume, warnings)
                recipe = replace(recipe, strategy=plan.strategy, order=plan.order)
                warnings += [f"to stay within the memory that is allowed: {step}" for step in plan.steps]
            with suppress(ValueError):  # grids oblique to each other: the bundle's own way back is taken
                maps = recipe.maps(image, volume.geometry)
        if limited and maps is None:
            warnings.append("the limit of memory is not kept: what the bundle does is carried out as it stands")
        with stopwatch.stage("network"):
            image_BCDHW = plain(image)[None].to(self.device)
        strategy = as_strategy(self.inferer)
        example = None
        if strategy is not None:
            few = self.runner.wanted == "auto" and strategy.count(image_BCDHW.shape[2:]) < WORTH_A_CHOICE
            example = None if few else partial(strategy.example, image_BCDHW)
        sides = _laterality_axis(image)
        if self.runner.mirror and isinstance(strategy, Slices | CoarseToFine):
            raise ValueError("mirror images are of sub-volumes and whole volumes, not of slices: leave mirror out")
        if self.runner.wanted != "fp32":
            with stopwatch.stage("precision"):
                self.runner.choose(example, warnings)
        if recipe is None or maps is None:
            with stopwatch.stage("network"):
                whole = self.runner(
                    lambda network: self.inferer(image[None].to(self.device), network), example, warnings, sides
                )
            return {**data, "pred": whole[0].float().cpu()}, self.postprocessing

        def label_map(network: Callable) -> np.ndarray:
            strategy = recipe.strategy
            if isinstance(strategy, Downsampled):  # straight from its small grid to the scan's
                with stopwatch.stage("network"):
                    small = strategy.small(image_BCDHW, network)
                own = edge_to_edge(strategy.size, image_BCDHW.shape[2:])
                return labels_onto([small], through(maps, own), recipe.softmax)
            slabs = stopwatch.each("network", strategy.slabs(image_BCDHW, network))
            return labels_onto(slabs, maps, recipe.softmax)

        with stopwatch.stage("labels"):
            labels = self.runner(label_map, example, warnings, sides)
        data["pred"] = _on_grid(labels, volume)
        return data, recipe.rest

    def _label_map(self, prediction: torch.Tensor, volume: Volume) -> np.ndarray:
        """(D, H, W) labels; an error unless the bundle brought its prediction back to the input's own grid."""
        array = np.asarray(prediction.detach().cpu())
        if array.shape[0] > 1:
            if ((array == 0) | (array == 1)).all() and (array.sum(axis=0) != 1).any():
                raise ValueError(
                    "the model's post-processing gives a mask a region, and they overlap or leave voxels out; medseg3d "
                    "needs one label a voxel: its inference.json must take the argmax of the classes"
                )
            array = array.argmax(axis=0)[None]
        if array.shape != (1, *volume.shape):
            raise ValueError(
                f"the model's post-processing gives a volume of {array.shape[1:]}, but the scan has {volume.shape}: "
                "its inference.json must end with Invertd, or another transform back to the input's grid"
            )
        labels = array[0] if array.dtype.kind in "iub" else np.rint(array[0])
        unknown = unnamed_labels(labels, self.table.names)
        if unknown:
            raise ValueError(f"the model gave labels {sorted(unknown)} that its metadata.json does not name")
        return labels.astype(np.uint8 if max(self.table.names, default=0) <= 255 else np.uint16, copy=False)


def _meta_tensor(volume: Volume) -> Any:
    """What MONAI's ``LoadImaged`` would have given for the same file, read by medseg3d's own readers."""
    from monai.data import MetaTensor

    affine = torch.from_numpy(volume.affine.copy())
    meta = {
        "original_affine": affine.clone(),
        "spatial_shape": np.array(volume.shape),
        "original_channel_dim": "no_channel",
        "filename_or_obj": str(volume.header.get("path", "")),
        "space": "RAS",
    }
    return MetaTensor(torch.from_numpy(np.array(volume.array, np.float32, order="C")), affine=affine, meta=meta)


def _on_grid(labels: np.ndarray, volume: Volume) -> Any:
    """A label map (D, H, W) on the grid of the scan as the (1, D, H, W) that post-processing takes."""
    from monai.data import MetaTensor

    tensor = torch.from_numpy(np.ascontiguousarray(labels))[None]
    return MetaTensor(tensor, affine=torch.from_numpy(volume.affine.copy()))


def _laterality_axis(image: Any) -> int:
    """The spatial axis of a preprocessed image (C, D, H, W) from one side of the patient to the other."""
    codes = Geometry(tuple(image.shape[1:]), image.affine.cpu().numpy()).orientation
    return next(axis for axis, code in enumerate(codes) if code in "LR")
