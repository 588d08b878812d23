"""The confusion matrix of label maps, and every measure that follows from it: one image, a data set, many processes.

A ratio 0 / 0 is nan, "not defined", and means leave it out. Any number of axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medseg3d.metrics.counting import joint_counts
from medseg3d.metrics.ratios import mean_of_defined
from medseg3d.metrics.regions import as_label_map
from medseg3d.metrics.summing import Summable

USUAL_VOID = 255


@dataclass(frozen=True, eq=False)
class Confusion(Summable):
    """How many voxels of each reference class were given each class. A value; ``+`` adds data sets up.

    ``counts`` is (K, K + 1) int64, reference class by predicted class; its last column holds the voxels to which the
    prediction gave no class (`void`): they are misses of their class. Numbers of classes are 0 to K - 1.

    Over a data set: ``sum((Confusion.of(p, r, classes) for p, r in pairs), Confusion.zeros(classes))``. Over processes
    the counts alone travel: add them up, for instance with an all-reduce (sum), and build ``Confusion(total)``.
    """

    counts: np.ndarray

    def __post_init__(self) -> None:
        counts = np.array(self.counts)
        right_shape = counts.ndim == 2 and counts.shape[1] == counts.shape[0] + 1
        if not right_shape or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
            raise ValueError(
                f"counts are whole numbers of 0 or more, (classes, classes + 1), got {counts.dtype} {counts.shape}"
            )
        counts.flags.writeable = False
        object.__setattr__(self, "counts", counts)

    @classmethod
    def zeros(cls, classes: int) -> Confusion:
        """Nothing counted yet."""
        return cls(np.zeros((classes, classes + 1), np.int64))

    @classmethod
    def of(
        cls, prediction: np.ndarray, reference: np.ndarray, classes: int, void: int | Sequence[int] | None = USUAL_VOID
    ) -> Confusion:
        """The counts of two label maps of one shape with the classes 0 to ``classes`` - 1.

        ``void`` is the number, or numbers, of no class: such voxels of the reference are not counted at all, and in the
        prediction they are misses. None if there is none. It may be below ``classes``, 0 for a background that is not
        to count; that class then has no voxels. 255 alone gives way where there are so many classes that it is one of
        them; ``[255]`` is void there as well.

        Raises:
            ValueError: the shapes differ, a map is not of integers, or it holds a number that is neither a class nor
                void.
        """
        prediction, reference = as_label_map(prediction), as_label_map(reference)
        if prediction.shape != reference.shape:
            raise ValueError(
                f"prediction and reference lie on one grid, got the shapes {prediction.shape} and {reference.shape}"
            )
        is_class = isinstance(void, int) and void == USUAL_VOID < classes
        voids = set() if void is None or is_class else set(np.atleast_1d(void).tolist())
        numbers = [*range(classes), *sorted(voids - set(range(classes)))]
        joint = joint_counts(reference, prediction, numbers, numbers)
        for what, unknown in (("reference", joint[-1].sum()), ("prediction", joint[:, -1].sum())):
            if unknown:
                raise ValueError(
                    f"the {what} has {unknown} voxels that are neither a class (0 to {classes - 1}) nor void "
                    f"({sorted(voids) or 'none'}); name all of them"
                )
        of_no_class = [index for index, number in enumerate(numbers) if number in voids]
        missed = joint[:classes, of_no_class].sum(axis=1)
        joint[of_no_class], joint[:, of_no_class] = 0, 0
        missed[[index for index in of_no_class if index < classes]] = 0
        return cls(np.column_stack([joint[:classes, :classes], missed]))

    def __add__(self, other: Confusion) -> Confusion:
        if self.counts.shape != other.counts.shape:
            raise ValueError(f"both count the same classes, got {len(self.counts)} and {len(other.counts)}")
        return Confusion(self.counts + other.counts)

    @property
    def total(self) -> int:
        """All voxels counted."""
        return int(self.counts.sum())

    @property
    def true_positives(self) -> np.ndarray:
        """(K,) voxels of each class that were given it."""
        return np.diagonal(self.counts)

    @property
    def false_positives(self) -> np.ndarray:
        """(K,) voxels given a class that is not theirs, by the class given."""
        return self.counts[:, :-1].sum(axis=0) - self.true_positives

    @property
    def false_negatives(self) -> np.ndarray:
        """(K,) voxels of each class that were given another, or none."""
        return self.counts.sum(axis=1) - self.true_positives

    @property
    def true_negatives(self) -> np.ndarray:
        """(K,) voxels that neither are of the class nor were given it."""
        return self.total - self.true_positives - self.false_positives - self.false_negatives

    @property
    def precision(self) -> np.ndarray:
        """(K,) TP / (TP + FP), nan where a class was never given."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> np.ndarray:
        """(K,) TP / (TP + FN), the accuracy of each class or sensitivity; nan where the reference has none."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def specificity(self) -> np.ndarray:
        """(K,) TN / (TN + FP)."""
        return _ratio(self.true_negatives, self.true_negatives + self.false_positives)

    @property
    def f1(self) -> np.ndarray:
        """(K,) 2 TP / (2 TP + FP + FN), which is Dice."""
        return _ratio(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.false_negatives)

    @property
    def dice(self) -> np.ndarray:
        """(K,) the same as `f1`."""
        return self.f1

    @property
    def iou(self) -> np.ndarray:
        """(K,) TP / (TP + FP + FN), nan where neither side has the class."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives + self.false_negatives)

    @property
    def accuracy(self) -> float:
        """Share of all voxels that were given their class: pixel accuracy. Of two classes, (TP + TN) / all."""
        return float(_ratio(self.true_positives.sum(), self.total))

    @property
    def mean_accuracy(self) -> float:
        """Mean of `recall` over the classes that the reference has."""
        return mean_of_defined(self.recall)

    @property
    def mean_iou(self) -> float:
        """Mean of `iou` over the classes that either side has: mIoU."""
        return mean_of_defined(self.iou)

    @property
    def mean_dice(self) -> float:
        """Mean of `dice` over the classes that either side has."""
        return mean_of_defined(self.dice)

    @property
    def frequency_weighted_iou(self) -> float:
        """`iou` weighted by how many voxels of each class the reference has."""
        here = self.counts.sum(axis=1)
        return float(_ratio((here * np.nan_to_num(self.iou)).sum(), here.sum()))


def _ratio(part: np.ndarray | int, whole: np.ndarray | int) -> np.ndarray:
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole != 0)
