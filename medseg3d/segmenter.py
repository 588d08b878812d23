"""One model, loaded once: a scan in, a segmentation on the scan's own grid out.

Shape legend: arrays are (D, H, W); image_BCDHW and logits_BKDHW go through the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medseg3d.data.checks import check_ct, check_voxels
from medseg3d.geometry import Geometry
from medseg3d.inference import CoarseToFine, SubVolumes
from medseg3d.inference.augmentation import side_pairs
from medseg3d.inference.body import crop_record, told
from medseg3d.inference.device import device_name
from medseg3d.inference.memory import keep_freed_memory
from medseg3d.inference.strategy import Strategy, plain
from medseg3d.inference.uncertainty import check_kind
from medseg3d.io import LabelTable, as_volume
from medseg3d.io.labels import unnamed_labels
from medseg3d.planning import Afterwards, Plan, Room, make_plan, what_follows
from medseg3d.recipe import Recipe, as_loaded, as_prediction, as_strategy, cropped_to_body, find_recipe, keeps_axes
from medseg3d.report.run import Stopwatch
from medseg3d.runner import Runner
from medseg3d.segmentation import Scan, Segmentation
from medseg3d.sizes import in_bytes
from medseg3d.trial import peak_memory, windows_of
from medseg3d.volume import Volume

if TYPE_CHECKING:
    from medseg3d.batch import CaseResult


# To choose a precision takes the time of two or three windows.
WORTH_A_CHOICE = 6


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
        max_ram, max_vram: bytes that the process and the device may hold, or text such as "6G"; what has to be given up
            for it, a warning tells.
        uncertainty: "entropy" or "margin": how sure the network is of each voxel, made with the labels, see
            :mod:`medseg3d.inference.uncertainty`.
        crop_body: lay windows over the box of the body only; what is left out, a warning tells.
        importing: within it the parts run, for modules of their own that they import only then.

    Raises:
        ValueError: ``uncertainty`` is unknown, or the bundle is carried out as it stands, so that it has none; a limit
            of memory has no unit; there are no windows, or no Hounsfield units, to crop; or to mirror, the axes of the
            inferer's windows are not known, or two labels are the same side of one name.
    """

    pictures = None  # for scans, see `medseg3d.pictures`

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
        max_ram: int | str | None = None,
        max_vram: int | str | None = None,
        uncertainty: str | None = None,
        crop_body: bool = False,
        importing: Callable[[], AbstractContextManager] = nullcontext,
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
        self.max_ram = None if max_ram is None else in_bytes(max_ram)
        self.max_vram = None if max_vram is None else in_bytes(max_vram)
        self.uncertainty = None if uncertainty is None else check_kind(uncertainty)
        self.room = Room(device, self.max_vram, planned=self.limited)
        if mirror and not keeps_axes(inferer):
            raise ValueError(
                f"mirror needs windows with the axes of the scan, and those of {type(inferer).__name__} are "
                "not known: leave mirror out"
            )
        pairs = side_pairs(table.names) if mirror else ()
        self.runner = Runner(network, device, precision, compile, mirror, pairs)
        self.crop_body = crop_body
        self.importing = importing
        if crop_body and not (expects_hu and isinstance(as_strategy(inferer), SubVolumes)):
            raise ValueError(f"{name} does not lay windows over a CT, so they cannot be cropped to the body")
        recipe = find_recipe(inferer, postprocessing)
        if uncertainty is not None and (recipe is None or isinstance(recipe.strategy, CoarseToFine)):
            raise ValueError(
                f"what {name} does after its network is carried out as it stands, and gives no {uncertainty}: that "
                "takes an inferer that gives logits, and post-processing that begins with softmax, argmax and the way "
                "back to the scan's grid; leave uncertainty out"
            )

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
        with self.importing():
            return self._segment(scan, progress)

    def _segment(self, scan: Scan, progress: Callable[[str], None] | None) -> Segmentation:
        stopwatch = Stopwatch(progress)
        volume, warnings = scan.volume, [*scan.warnings]
        with stopwatch.stage("preprocess"):
            data = self.preprocessing({"image": as_loaded(volume)})
        with keep_freed_memory() if self.device.type == "cpu" else nullcontext(), torch.inference_mode():
            data, rest = self._labels(data, volume, warnings, stopwatch)
            uncertainty, crop = data.pop("uncertainty", None), data.pop("crop", None)
            with stopwatch.stage("postprocess"):
                labels = self._label_map(rest(data)["pred"], volume)
            del data  # what the windows left is given back too
        if not labels.any():
            warnings.append(f"nothing was found: does the scan show the part of the body that {self.name} is made for?")
        seconds = {**scan.seconds, **stopwatch.seconds}
        unsure = None if uncertainty is None else volume.with_array(uncertainty)
        own = volume.with_array(labels)
        return Segmentation(own, volume, self.table, self.name, tuple(warnings), seconds, unsure, crop)

    def plan(self, scan: Scan) -> Plan:
        """How :meth:`segment` will do a scan and what that will take; one window of it is tried.

        Raises:
            ValueError: the bundle does more than the usual at its end, so that it is carried out as it stands.
            OverMemoryLimit: the scan does not fit into ``max_ram`` and ``max_vram``.
        """
        with self.importing():
            return self._whole_plan(scan)

    def _whole_plan(self, scan: Scan) -> Plan:
        stopwatch = Stopwatch()
        with peak_memory(torch.device("cpu")) as before, stopwatch.stage("preprocess"):
            data = self.preprocessing({"image": as_loaded(scan.volume)})
        recipe = self._recipe(self._inferer(data["image"], scan.volume))
        follows = None
        if recipe is not None:
            with suppress(ValueError):  # grids oblique to each other
                follows = what_follows(recipe, data, scan.volume, self.table, self.uncertainty)
        if recipe is None or follows is None:
            raise ValueError(
                f"what {self.name} does after its network is carried out as it stands, and cannot be planned"
            )
        with keep_freed_memory() if self.device.type == "cpu" else nullcontext(), stopwatch.stage("plan"):
            plan = self._plan(recipe, data["image"], scan.volume, [], stopwatch, follows)
        spent = {**scan.seconds, **stopwatch.seconds}
        if not self.limited:  # then nothing is planned in a run
            del spent["plan"]
        return replace(plan.after(spent), ram=max(plan.ram, before.held + before.ram))

    @property
    def limited(self) -> bool:
        """Whether memory has a limit."""
        return (self.max_ram, self.max_vram) != (None, None)

    def _inferer(self, image: torch.Tensor, volume: Volume) -> Callable:
        return cropped_to_body(self.inferer, image, volume) if self.crop_body else self.inferer

    def _recipe(self, inferer: Callable) -> Recipe | None:
        recipe = find_recipe(inferer, self.postprocessing)
        if recipe is None or self.device.type != "cpu":
            return recipe
        strategy = recipe.strategy
        if isinstance(strategy, SubVolumes) and strategy.batch_size > 1:
            # Several windows at once take more memory there and hardly less time.
            return replace(recipe, strategy=strategy.changed(batch_size=1))
        return recipe

    def _example(self, strategy: Strategy | None, image_BCDHW: torch.Tensor) -> Callable[[], torch.Tensor] | None:
        """What gives a window to choose the precision by; None where none is known, or it is not worth its time."""
        if strategy is None or (self.runner.wanted == "auto" and windows_of(strategy, image_BCDHW) < WORTH_A_CHOICE):
            return None
        return partial(strategy.example, image_BCDHW)

    def _plan(
        self,
        recipe: Recipe,
        image: torch.Tensor,
        volume: Volume,
        warnings: list[str],
        stopwatch: Stopwatch,
        follows: Afterwards | None = None,
    ) -> Plan:
        image_BCDHW = self.room.place(plain(image)[None], recipe.strategy)
        example = self._example(recipe.strategy, image_BCDHW)

        # A map of uncertainty is float16 on the network's grid and float32 on the scan's.
        beside = 2 * image_BCDHW[0, 0].numel() + 4 * prod(volume.shape) if self.uncertainty else 0

        def plan(network: Callable) -> Plan:
            limits = self.max_ram, self.max_vram
            arguments = recipe.strategy, recipe.order, image_BCDHW, volume.shape, network
            return make_plan(*arguments, *limits, follows, beside)

        if self.runner.wanted != "fp32":
            with stopwatch.stage("precision"):
                self.runner.choose(example, warnings)
        return self.runner(plan, example, warnings, _laterality_axis(image), recipe.strategy)

    def predict_many(
        self, inputs: Sequence[str | Path] | str | Path, output_dir: str | Path, resume: bool = False, **options: Any
    ) -> Iterator[CaseResult]:
        """Segment every scan among ``inputs`` and write the results; see :func:`medseg3d.batch.predict_many`."""
        from medseg3d.batch import predict_many

        return predict_many(self, inputs, output_dir, resume=resume, **options)

    @property
    def precision(self) -> str:
        """In which precision the network runs, and why it was chosen."""
        return self.runner.reason

    def describe_device(self) -> str:
        """Where the network runs, for reports."""
        return device_name(self.device)

    def _labels(
        self, data: dict[str, Any], volume: Volume, warnings: list[str], stopwatch: Stopwatch
    ) -> tuple[dict[str, Any], Callable]:
        """The scan with its "pred", and the post-processing that is left.

        Where the bundle does the usual, "pred" is a label map on the scan's own grid already, made in slabs, and
        "uncertainty" is there if it was asked for; else "pred" is what the inferer returns.
        """
        image = data["image"]
        inferer = self._inferer(image, volume)
        recipe = self._recipe(inferer)
        maps = None
        if recipe is not None:
            if self.limited:
                with stopwatch.stage("plan"):
                    plan = self._plan(recipe, image, volume, warnings, stopwatch)
                recipe = replace(recipe, strategy=plan.strategy, order=plan.order)
                warnings += [f"to stay within the memory that is allowed: {step}" for step in plan.steps]
            with suppress(ValueError):  # grids oblique to each other: the bundle's own way back is taken
                maps = recipe.maps(image, volume.geometry)
        if self.limited and maps is None:
            warnings.append("the limit of memory is not kept: what the bundle does is carried out as it stands")
        if self.uncertainty is not None and maps is None:
            raise ValueError(
                f"{self.uncertainty} goes onto the scan's grid only where its axes are parallel to those of the "
                "network's grid, and those of this scan are oblique: leave uncertainty out"
            )
        with stopwatch.stage("network"):
            image_BCDHW = self.room.place(plain(image)[None], recipe.strategy if recipe else None)
        strategy = as_strategy(inferer)
        example = self._example(strategy, image_BCDHW)
        if isinstance(strategy, SubVolumes) and strategy.crop is not None:
            box, size = strategy.box(image_BCDHW), image_BCDHW.shape[2:]
            data = {**data, "crop": crop_record(box, size)}
            warnings += [told(box, size)] if data["crop"]["left_out"] else []
        sides = _laterality_axis(image)
        if self.runner.wanted != "fp32":
            with stopwatch.stage("precision"):
                self.runner.choose(example, warnings)
        if recipe is None or maps is None:
            with stopwatch.stage("network"):
                stands = partial(inferer, image[None].to(self.device))
                whole = self.runner(stands, example, warnings, sides, strategy)
            return {**data, "pred": whole[0].float().cpu()}, self.postprocessing
        timed = partial(stopwatch.each, "network")

        def make(network: Callable) -> tuple[np.ndarray, np.ndarray | None]:
            def labels(strategy: Strategy, image_BCDHW: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
                own = replace(recipe, strategy=strategy)
                return own.labels(image_BCDHW, maps, network, timed=timed, uncertainty=self.uncertainty)

            return self.room.run(labels, recipe.strategy, image_BCDHW, network, warnings)

        with stopwatch.stage("labels"):
            labels, uncertainty = self.runner(make, example, warnings, sides, strategy)
        data["pred"] = as_prediction(labels, volume.affine)
        return data if uncertainty is None else {**data, "uncertainty": uncertainty}, recipe.rest

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


def _laterality_axis(image: Any) -> int:
    """The spatial axis of a preprocessed image (C, D, H, W) from one side of the patient to the other."""
    codes = Geometry(tuple(image.shape[1:]), image.affine.cpu().numpy()).orientation
    return next(axis for axis, code in enumerate(codes) if code in "LR")
