"""How a network is run: in which precision, as it is or compiled, on windows alone or on their mirror images too."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from medseg3d.errors import in_words
from medseg3d.inference import CoarseToFine, Slices
from medseg3d.inference.augmentation import Flips, mirrored_slices
from medseg3d.inference.ensemble import Ensemble
from medseg3d.inference.precision import Precision, choose_precision, in_precision

T = TypeVar("T")


class Runner:
    """A network, made ready when the first scan is there to try it on.

    Args:
        network: on ``device``, in evaluation mode; it is not changed.
        device: where it runs.
        precision: "fp32", "bf16", "fp16" or "auto", see :func:`medseg3d.inference.precision.choose_precision`.
        compile: run it through ``torch.compile``. That takes minutes at the first window. Those after it are faster
            with most networks; medseg3d's own may be slower, since they choose how to compute by what runs. Where it
            fails, the network runs as it is and a warning tells why.
        mirror: average over windows and their mirror images: along the axis between the patient's sides if True, or
            along these spatial axes of the network's grid. A network answers well only what it was trained on: few
            were on patients upside down.
        pairs: numbers of labels that are each other's mirror image.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        device: torch.device,
        precision: str = "fp32",
        compile: bool = False,
        mirror: bool | Sequence[int] = False,
        pairs: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.network = network
        self.device = device
        self.wanted = precision
        self.compiles = compile
        self.mirror = mirror
        self.pairs = tuple(pairs)
        self.precision: Precision | None = None
        self._precise: Callable = network
        self._compiled: Any = None

    def __call__(
        self,
        infer: Callable[[Callable], T],
        example: Callable[[], torch.Tensor] | None,
        warnings: list[str],
        laterality_axis: int = 0,
        strategy: Any = None,
    ) -> T:
        """``infer`` with the network as it is to be run.

        Args:
            infer: called with the network.
            example: gives a window for the choice of precision; None if no window is known, or the choice is not worth
                its time yet: float32 then.
            warnings: what the user should know is added.
            laterality_axis: the spatial axis that runs from one side of the patient to the other.
            strategy: what ``infer`` gives the network to, where that is known: mirror images of slices differ.
        """
        self.choose(example, warnings)
        failure = ""
        if self.compiles:
            if self._compiled is None:
                self._compiled = torch.compile(self._precise)
            try:
                return infer(self._mirrored(self._compiled, laterality_axis, strategy))
            except Exception as error:  # of the tracer, of a compiler, or the bundle's own, which comes again below
                failure = textwrap.shorten(in_words(error), 200, placeholder=" ...")
        result = infer(self._mirrored(self._precise, laterality_axis, strategy))
        if failure:
            self.compiles = False
            warnings.append(f"the network could not be compiled and ran as it is, which is slower: {failure}")
        return result

    def choose(self, example: Callable[[], torch.Tensor] | None, warnings: list[str]) -> None:
        """The precision, decided once; float32 where there is no window to try another on, or several networks."""
        if self.precision is not None or self.wanted == "fp32" or (example is None and self.wanted == "auto"):
            return
        if example is None or isinstance(self.network, torch.nn.ModuleDict | torch.nn.ModuleList):
            lacking = "the windows of this inferer are not known" if example is None else "there are several networks"
            self.precision = Precision(torch.float32, f"float32: {lacking}, so no other precision can be tried")
            if self.wanted != "auto":
                warnings.append(f"{self.wanted} was asked for, but the network runs in {self.precision.reason}")
            return
        self.precision = choose_precision(self.network, example(), self.device, self.wanted)
        change = partial(in_precision, dtype=self.precision.dtype, autocast=self.precision.autocast)
        network = self.network
        # One by one, so that each still shows its last layer.
        self._precise = network.each(change) if isinstance(network, Ensemble) else change(network)
        self._compiled = None  # what was made of the network in float32 is not it any more

    @property
    def reason(self) -> str:
        """In which precision the network runs, and why that was chosen."""
        if self.precision is not None:
            return self.precision.reason
        return "float32" if self.wanted in ("auto", "fp32") else self.wanted

    def _mirrored(self, network: Callable, laterality_axis: int, strategy: Any) -> Callable:
        if not self.mirror:
            return network
        axes = (laterality_axis,) if self.mirror is True else tuple(self.mirror)
        if isinstance(strategy, CoarseToFine):
            raise ValueError("one organ has no mirror image on the patient's other side: leave mirror out")
        if isinstance(strategy, Slices):
            return mirrored_slices(network, strategy, axes, laterality_axis=laterality_axis, pairs=self.pairs)
        return Flips(network, axes, self.pairs, laterality_axis)
