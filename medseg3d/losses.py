"""Losses that MONAI lacks. Computed in float32 whatever the network's precision.

Shape legend: logits_BK... are (batch, classes, *spatial axes), labels_B1... hold class numbers, annotated_BK is
boolean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.function import once_differentiable

_TINY = 1e-30  # a probability that counts as nothing
_MOST_WEIGHT = 50.0  # of a voxel in the cross-entropy: a window may hold one voxel of an organ


class PartialDiceCELoss(nn.Module):
    """Dice and cross-entropy for cases in which some organs were never contoured.

    In such a case a background voxel may belong to a missing organ. Its class probabilities are therefore added to the
    background's before both terms (the marginal loss of Shi et al., Medical Image Analysis 70, 2021), and the Dice term
    leaves missing classes out. With every class annotated this is the ordinary sum of soft Dice (over the batch,
    background excluded) and cross-entropy.

    The batch is that of all processes that train together: where the logits carry a gradient the call is a collective
    one, which each process must make. Without, as in validation, or within a transform of torch.func, it is the loss of
    the process's own batch.

    Classes of which the batch has no voxel are left out of the Dice term too. There it could only reward silence, and a
    small organ that few windows show would be silenced for good.

    Args:
        dice_weight: factor of the Dice term; the cross-entropy has factor 1.
        smooth: added to numerator and denominator of each class's Dice.
        organ_share: share of the batch's voxels, 0 to 1, that each organ in it counts for in the cross-entropy, however
            small it is; no voxel counts for more than 50. Where an organ fills a thousandth of a window, a network from
            random weights answers "background" for hundreds of steps, or for good, since Dice has next to no gradient
            there; 0.01 to 0.02 leads it out. With 0 all voxels count alike.
        ignore_index: label of voxels that count for nothing, such as 255.

    Raises:
        ValueError: a share outside 0 to 1.
    """

    def __init__(
        self,
        dice_weight: float = 1.0,
        smooth: float = 1e-5,
        organ_share: float = 0.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= organ_share <= 1:
            raise ValueError(f"organ_share is a share of a batch's voxels, 0 to 1, got {organ_share}")
        self.dice_weight = dice_weight
        self.smooth = smooth
        self.organ_share = organ_share
        self.ignore_index = ignore_index

    def forward(
        self, logits: torch.Tensor, labels: torch.Tensor, annotated: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scalar loss.

        Args:
            logits: (B, K, ...), any float type.
            labels: (B, 1, ...), class numbers 0 to K - 1, 0 for the background, and ``ignore_index``.
            annotated: (B, K) boolean, False where a class was not contoured in that case; None where all were.

        Raises:
            ValueError: on shapes that do not fit, labels that are no classes, or of organs that were not contoured.
        """
        known_BK, labels = _checked(logits, labels, annotated, self.ignore_index)
        # Asked here: within an autograd function no gradient is ever wanted.
        together = torch.is_grad_enabled() and logits.requires_grad and dist.is_available() and dist.is_initialized()
        settings = (self.dice_weight, self.smooth, self.organ_share, self.ignore_index is not None)
        with torch.autocast(logits.device.type, enabled=False):
            if _is_transformed():
                return _partial_dice_ce(logits, labels, known_BK, *settings)[0]
            return _PartialDiceCE.apply(logits, labels, known_BK, *settings, dist.get_world_size() if together else 1)


def _is_transformed() -> bool:
    """Whether a transform of torch.func runs, such as vmap, which does not know our autograd function."""
    return not torch.compiler.is_compiling() and peek_interpreter_stack() is not None


def _is_followed() -> bool:
    """Whether a compiler or a transform runs: tensors have no values then that could be checked."""
    return torch.compiler.is_compiling() or _is_transformed()


def _partial_dice_ce(
    logits: torch.Tensor,
    labels: torch.Tensor,
    known_BK: torch.Tensor,
    weight: float,
    smooth: float,
    organ_share: float,
    ignoring: bool,
    processes: int = 1,
    *,
    exp: Callable[[torch.Tensor], torch.Tensor] = torch.exp,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The loss, and what its gradient is worked out from. With ``torch.exp_`` as ``exp`` it takes less memory, and
    autograd cannot follow it."""
    log_probs_BKN = logits.flatten(2).float().log_softmax(dim=1)
    one_hot_BKN = labels.flatten(2) == torch.arange(logits.shape[1], device=logits.device)[:, None]
    labels_B1N = labels.flatten(2).clamp(min=0)
    target_B1N = log_probs_BKN.gather(1, labels_B1N)
    background_B1N = log_probs_BKN[:, :1].clone()
    counted_B1N = labels.flatten(2) >= 0
    probs_BKN = exp(log_probs_BKN.where(counted_B1N, -torch.inf) if ignoring else log_probs_BKN)
    merged_BK = ~known_BK
    missing_B1N = (merged_BK.float()[:, None] @ probs_BKN).clamp(min=_TINY)
    background_B1N = torch.logaddexp(background_B1N, missing_B1N.log())

    overlap_K = torch.where(one_hot_BKN, probs_BKN, 0.0).sum((0, 2))
    probability_K = (probs_BKN.sum(2) * known_BK).sum(0)
    sums_3K = torch.stack([overlap_K, probability_K, one_hot_BKN.sum((0, 2))])
    if processes > 1:
        dist.all_reduce(sums_3K)
    overlap_K, probability_K, size_K = sums_3K
    voxels = size_K.sum().clamp(min=1)
    organ_K = torch.arange(len(size_K), device=logits.device) > 0
    weight_K = (organ_share * voxels / size_K.clamp(min=1)).clamp(1.0, _MOST_WEIGHT).where(organ_K, 1.0)
    each_B1N = (weight_K * processes / voxels)[labels_B1N] * counted_B1N
    cross_entropy = -(each_B1N * torch.where(labels_B1N > 0, target_B1N, background_B1N)).sum()
    present_K = organ_K & (size_K > 0)
    share_K = weight * present_K / present_K.sum().clamp(min=1)
    total_K = probability_K + size_K + smooth
    dice_K = (2 * overlap_K + smooth) / total_K
    kept = (probs_BKN, labels_B1N, known_BK, background_B1N, each_B1N, share_K / total_K, dice_K)
    return cross_entropy + (share_K * (1 - dice_K)).sum(), kept


class _PartialDiceCE(torch.autograd.Function):
    """The loss with its gradient worked out by hand: half the passes over the largest tensors of a training step.

    With probabilities p, label y of each voxel, N voxels in all and Q = the background's probability and those of what
    is missing: cross-entropy gives the logits (p - [k = y]) / N times the voxel's weight, in background (p - p / Q) / N
    for the classes of Q; Dice gives p (d_k - sum of p d), where d_k is its derivative by p_k.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, known_BK: torch.Tensor, *settings: Any
    ) -> torch.Tensor:
        loss, kept = _partial_dice_ce(logits, labels, known_BK, *settings, exp=torch.exp_)
        ctx.save_for_backward(*kept)
        ctx.logits, ctx.processes = (logits.shape, logits.dtype), settings[-1]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        probs_BKN, labels_B1N, known_BK, background_B1N, each_B1N, factor_K, dice_K = ctx.saved_tensors
        factor_K = factor_K * ctx.processes  # they average their gradients, but each has its own voxels' part alone
        by_any_BK = factor_K * dice_K * known_BK  # derivative of Dice by p_k, and what is added to it where y = k
        by_own_K = -2 * factor_K
        own_B1N = probs_BKN.gather(1, labels_B1N) * by_own_K[labels_B1N]
        with torch.autocast(grad.device.type, enabled=False):
            mean_B1N = by_any_BK[:, None] @ probs_BKN + own_B1N
        merged_BK = (~known_BK).index_fill(1, torch.zeros(1, dtype=torch.long, device=grad.device), True)
        of_background_B1N = (labels_B1N == 0) * each_B1N * torch.exp(-background_B1N).clamp(max=1 / _TINY)
        left_BK3 = torch.stack([by_any_BK, torch.ones_like(by_any_BK), -merged_BK.float()], dim=2)
        right_B3N = torch.cat([torch.ones_like(mean_B1N), each_B1N - mean_B1N, of_background_B1N], dim=1)
        with torch.autocast(grad.device.type, enabled=False):
            result_BKN = (left_BK3 @ right_B3N).mul_(probs_BKN)
        result_BKN.scatter_add_(1, labels_B1N, torch.where(labels_B1N > 0, own_B1N - each_B1N, 0.0))
        shape, dtype = ctx.logits
        return (result_BKN.mul_(grad)).view(shape).to(dtype), *[None] * 7


class MarginalLoss(nn.Module):
    """A loss of MONAI (Dice, generalised Dice, DiceCE, Tversky, focal) for cases with organs that were not contoured.

    The classes that a case lacks are merged with its background, whose probability becomes the sum of theirs (the
    marginal loss of Shi et al., Medical Image Analysis 70, 2021), and the loss sees a problem of fewer classes. Cases
    that lack the same ones go through it together; the results are averaged over the cases. It is computed in float32.

    Args:
        loss: called with logits (B, K, ...) and labels (B, 1, ...), such as ``DiceCELoss(to_onehot_y=True,
            softmax=True)``; V-Net's Dice (Milletari et al., 2016, section 3) is ``DiceLoss(to_onehot_y=True,
            softmax=True, squared_pred=True, smooth_nr=0)``. It must turn logits into probabilities by softmax and
            reduce to one number, and have no weights of single classes, which change their places.
        ignore_index: label of voxels that count for nothing, such as 255. Each case then goes through the loss alone,
            as (1, K, voxels that count).
    """

    def __init__(
        self, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ignore_index: int | None = None
    ) -> None:
        super().__init__()
        self.loss = loss
        self.ignore_index = ignore_index

    def forward(
        self, logits: torch.Tensor, labels: torch.Tensor, annotated: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scalar loss.

        Args:
            logits: (B, K, ...), any float type.
            labels: (B, 1, ...), class numbers 0 to K - 1, 0 for the background, and ``ignore_index``.
            annotated: (B, K) boolean, False where a class was not contoured in that case; None where all were.

        Raises:
            ValueError: on shapes that do not fit, labels that are no classes, or of organs that were not contoured.
        """
        known_BK, labels = _checked(logits, labels, annotated, self.ignore_index)
        with torch.autocast(logits.device.type, enabled=False):
            total = logits.new_zeros((), dtype=torch.float32)
            for known_K in known_BK.unique(dim=0):
                cases = (known_BK == known_K).all(dim=1)
                merged, renamed = _merged(logits[cases].float(), labels[cases], known_K)
                # Where nothing was looked for there is nothing to learn; MONAI takes a single channel for a mask's.
                loss = self._sum(merged, renamed) if known_K[1:].any() else 0 * merged.sum()
                total = total + loss / len(logits)
        return total

    def _sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss times the number of cases."""
        if self.ignore_index is None:
            return self.loss(logits, labels) * len(logits)
        parts = [(case[None, :, y[0] >= 0], y[None, :, y[0] >= 0]) for case, y in zip(logits, labels, strict=True)]
        return sum((self.loss(*part) for part in parts if part[1].numel()), 0 * logits.sum())


def _merged(logits: torch.Tensor, labels: torch.Tensor, known_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the known classes alone; what is unknown belongs to the background."""
    if known_K.all():
        return logits, labels
    background = torch.cat([logits[:, :1], logits[:, ~known_K]], dim=1).logsumexp(dim=1, keepdim=True)
    new_number_B1 = (known_K.cumsum(0) - 1)[labels.clamp(min=0)].where(labels >= 0, -1)
    return torch.cat([background, logits[:, known_K][:, 1:]], dim=1), new_number_B1


def _checked(
    logits: torch.Tensor, labels: torch.Tensor, annotated: torch.Tensor | None, ignore_index: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which classes each case knows (B, K), the background always; labels, int64, -1 where ignored; or ValueError."""
    batch, classes = logits.shape[:2]
    if labels.shape != (batch, 1, *logits.shape[2:]):
        raise ValueError(f"labels must be {(batch, 1, *logits.shape[2:])} for these logits, got {tuple(labels.shape)}")
    labels = counted = labels.long()
    if ignore_index is not None:
        counted, labels = (labels.masked_fill(labels == ignore_index, number) for number in (0, -1))
    _check_range(counted, classes, "label voxels that are not to count with ignore_index")
    if annotated is None:
        return torch.ones(batch, classes, dtype=torch.bool, device=logits.device), labels
    if annotated.shape != (batch, classes):
        raise ValueError(
            f"annotated must be {(batch, classes)}, got {tuple(annotated.shape)}: the network must have a class for "
            "each label of the data set and one for the background"
        )
    known_BK = annotated.bool().clone()  # zeros and ones will do as well as booleans
    known_BK[:, 0] = True
    if not _is_followed() and not known_BK.gather(1, counted.flatten(1)).all():
        raise ValueError("labels has voxels of a class that annotated calls not contoured: make them background")
    return known_BK, labels


def _check_range(labels: torch.Tensor, classes: int, advice: str) -> None:
    """ValueError unless all labels are classes. A GPU is waited for, once; it would only tell that something failed."""
    if not labels.numel() or _is_followed():
        return
    lowest, highest = torch.stack(labels.long().aminmax()).tolist()
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"labels must be 0 to {classes - 1} for logits of {classes} channels, got {lowest} to {highest}: the "
            f"network needs a channel for each class and one for the background; {advice}"
        )


class WeightedCrossEntropyLoss(nn.Module):
    """Cross-entropy in which every voxel has its own weight (Ronneberger et al., "U-Net", 2015, equation 1).

    Args:
        reduction: "sum" over all voxels as in the paper; "mean" divides it by the number of voxels, "weighted_mean" by
            the sum of the weights, so that the rate of learning does not depend on either.

    Raises:
        ValueError: on any other reduction.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in ("sum", "mean", "weighted_mean"):
            raise ValueError(f"reduction must be 'sum', 'mean' or 'weighted_mean', got {reduction!r}")
        self.reduction = reduction

    def forward(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Scalar loss.

        Args:
            logits: (B, K, ...), any float type.
            labels: (B, 1, ...), class numbers 0 to K - 1; any number where the weight is 0.
            weights: (B, 1, ...), 0 or more.

        Raises:
            ValueError: labels or weights of another size, or labels that are no classes.
        """
        size = (len(logits), 1, *logits.shape[2:])
        if tuple(labels.shape) != size or tuple(weights.shape) != size:
            raise ValueError(
                f"logits {tuple(logits.shape)} need labels and weights of {size}, "
                f"got {tuple(labels.shape)} and {tuple(weights.shape)}"
            )
        labels = labels.long().masked_fill(weights == 0, 0)
        _check_range(labels, logits.shape[1], "give voxels of no class the weight 0")
        with torch.autocast(logits.device.type, enabled=False):
            losses = nn.functional.cross_entropy(logits.float(), labels[:, 0], reduction="none")
            weights = weights[:, 0].float()
            total = (losses * weights).sum()
            if self.reduction == "sum":
                return total
            if self.reduction == "mean":
                return total / weights.numel()
            return total / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)  # 0 where nothing counts


class PretrainingLoss(nn.Module):
    """The three tasks of Swin UNETR's self-supervised training (Tang et al., CVPR 2022, section 3.2): where a
    sub-volume was turned to, which two views are of one sub-volume, and what was cut out of them.

    Args:
        rotation, contrastive, reconstruction: factors of cross-entropy, ``contrastive_loss`` and mean absolute error.
        temperature: of the contrast.
    """

    def __init__(
        self,
        rotation: float = 1.0,
        contrastive: float = 1.0,
        reconstruction: float = 1.0,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        self.weights = {"rotation": rotation, "contrastive": contrastive, "reconstruction": reconstruction}
        self.temperature = temperature

    def forward(
        self,
        output: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        turns: torch.Tensor,
        images: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The three weighted terms by name; the objective is their sum.

        Args:
            output: what ``SSLHead`` gives for 2 B views, all first ones before all second ones: logits (2 B, 4) of the
                rotation, embeddings (2 B, E), reconstructions (2 B, C, ...).
            turns: (2 B,) quarter turns of the views, 0 to 3.
            images: (2 B, C, ...), the turned sub-volumes before anything was cut out.

        Raises:
            ValueError: the reconstructions have another shape than the images, or the batch is odd or below 4.
        """
        logits, embeddings, reconstructions = output
        if reconstructions.shape != images.shape:
            raise ValueError(
                f"reconstructions must be {tuple(images.shape)} as the images, got {tuple(reconstructions.shape)}"
            )
        with torch.autocast(images.device.type, enabled=False):
            terms = {
                "rotation": nn.functional.cross_entropy(logits.float(), turns.long()),
                "contrastive": contrastive_loss(embeddings, self.temperature),
                "reconstruction": nn.functional.l1_loss(reconstructions.float(), images.float()),
            }
        return {name: self.weights[name] * term for name, term in terms.items()}


def contrastive_loss(embeddings: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """How badly each view finds its partner among all other views, by cosine similarity (NT-Xent: Chen et al., "A
    simple framework for contrastive learning of visual representations", ICML 2020, equation 1).

    Args:
        embeddings: (2 B, E), all first views before all second ones.
        temperature: above 0; the lower, the more the most similar of the others count.

    Raises:
        ValueError: the number of views is odd or below 4, which leaves nothing to tell a view from.
    """
    views = len(embeddings)
    if views % 2 or views < 4:
        raise ValueError(
            f"the contrast needs two views of at least two sub-volumes, got {views} embeddings: use a batch of 2 or "
            "more"
        )
    directions = nn.functional.normalize(embeddings.float(), dim=1)
    similarity_NN = directions @ directions.T / temperature
    itself = torch.eye(views, dtype=torch.bool, device=embeddings.device)
    partners = torch.arange(views, device=embeddings.device).roll(views // 2)
    return nn.functional.cross_entropy(similarity_NN.masked_fill(itself, -torch.inf), partners)
