"""From one kind of segmentation to the others. What a kind cannot hold is lost, and each function says what.

| from \\ to | semantic map | instances | panoptic |
| --- | --- | --- | --- |
| semantic map | | pieces that touch become one object | the same, and stuff |
| instances | hidden parts, scores, objects | | hidden parts |
| panoptic | objects, scores | stuff | |
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from medseg3d.tasks.categories import Categories
from medseg3d.tasks.instances import Instances
from medseg3d.tasks.panoptic import VOID, Panoptic, Segment
from medseg3d.tasks.regions import Region, regions_of
from medseg3d.tasks.semantic import SemanticMap


def instances_from_semantic(semantic: SemanticMap, connectivity: int = 1, smallest: int = 1) -> Instances:
    """The connected pieces of every thing class, of ``smallest`` pixels or more: the way to count objects that do not
    touch. ``connectivity`` 1 joins pixels that share a face, 2 an edge as well (in 2D a corner), 3 in 3D a corner."""
    if not 1 <= connectivity <= semantic.classes.ndim:
        raise ValueError(f"connectivity is 1 to {semantic.classes.ndim} in this map, got {connectivity}")
    structure = ndimage.generate_binary_structure(semantic.classes.ndim, connectivity)
    regions, classes = [], []
    for number in (number for number, category in semantic.categories.items() if category.is_thing):
        whole = Region.of(semantic.classes == number)
        pieces, _ = ndimage.label(whole.inside, structure)
        for piece in regions_of(pieces).values():
            if piece.area >= smallest:
                corner = tuple(a + b for a, b in zip(whole.corner, piece.corner, strict=True))
                regions.append(Region(corner, piece.inside))
                classes.append(number)
    return Instances(semantic.shape, regions, classes, categories=semantic.categories)


def instances_from_panoptic(panoptic: Panoptic) -> Instances:
    """The segments of thing classes that have a pixel, in the order of their ids; stuff is left out."""
    found = {n: region for n, region in regions_of(panoptic.ids).items() if panoptic.is_thing(n)}
    segments = [panoptic.segments[number] for number in found]
    return Instances(
        panoptic.shape,
        found.values(),
        classes=[segment.category for segment in segments],
        scores=[segment.score for segment in segments],
        crowd=[segment.crowd for segment in segments],
        categories=panoptic.categories,
    )


def semantic_from_instances(instances: Instances, void: int = 0) -> SemanticMap:
    """The class of the object seen at each pixel, the highest score on top; ``void`` where there is none."""
    return SemanticMap(
        _looked_up(instances.label_map(), dict(enumerate(instances.classes.tolist(), 1)), void, instances.categories),
        instances.categories,
    )


def semantic_from_panoptic(panoptic: Panoptic, void: int = 0) -> SemanticMap:
    """The class of each pixel's segment; ``void`` where there is no segment."""
    classes = {number: segment.category for number, segment in panoptic.segments.items()}
    return SemanticMap(_looked_up(panoptic.ids, classes, void, panoptic.categories), panoptic.categories)


def panoptic_from_semantic(semantic: SemanticMap, connectivity: int = 1, smallest: int = 1) -> Panoptic:
    """Things as `instances_from_semantic` finds them, and one segment for each stuff class."""
    return panoptic_from_instances(instances_from_semantic(semantic, connectivity, smallest), semantic)


def panoptic_from_instances(
    instances: Instances,
    semantic: SemanticMap | None = None,
    least_score: float = 0.0,
    least_free: float = 0.5,
    least_stuff: int = 1,
) -> Panoptic:
    """Objects of ``least_score`` or more, and the stuff of a semantic map in what they leave free.

    The heuristic of Kirillov et al., "Panoptic segmentation", CVPR 2019: from the highest score down an object takes
    those of its pixels that are still free, and is dropped if that is not at least ``least_free`` of it, or nothing;
    stuff of fewer than ``least_stuff`` pixels is dropped. Ids are 1, 2, ...; the categories are those of both.

    Raises:
        ValueError: the shapes differ.
    """
    if semantic is not None and semantic.shape != instances.shape:
        raise ValueError(f"both lie on one image, got the shapes {instances.shape} and {semantic.shape}")
    ids = np.zeros(instances.shape, np.int32)
    segments: dict[int, Segment] = {}
    for i in instances.front_to_back():
        region, score = instances.regions[i], float(instances.scores[i])
        free = region.inside & (ids[region.slices] == VOID)
        seen = int(np.count_nonzero(free))
        if score >= least_score and seen and seen >= least_free * region.area:
            number = len(segments) + 1
            ids[region.slices][free] = number
            segments[number] = Segment(int(instances.classes[i]), score, bool(instances.crowd[i]))
    stuff = semantic.categories if semantic is not None else {}
    for category in (number for number, category in stuff.items() if not category.is_thing):
        assert semantic is not None
        free = (semantic.classes == category) & (ids == VOID)
        if np.count_nonzero(free) >= max(1, least_stuff):
            number = len(segments) + 1
            ids[free] = number
            segments[number] = Segment(category)
    return Panoptic(ids, segments, {**stuff, **instances.categories})


def _looked_up(numbers: np.ndarray, classes: dict[int, int], void: int, categories: Categories) -> np.ndarray:
    """The class of each number, ``void`` for 0, in the smallest type that holds them."""
    if void in categories:
        raise ValueError(f"void is {void}, which is the category {categories[void].name!r}; choose another number")
    keys = np.array([VOID, *sorted(classes)])
    values = np.array([void, *(classes[key] for key in sorted(classes))])
    smallest = np.min_scalar_type(int(values.max())) if values.min() >= 0 else np.int32
    return values.astype(smallest)[np.searchsorted(keys, numbers)]
