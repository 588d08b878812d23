"""Models, or strategies of one network, side by side on the same cases: how good each is, and what each costs."""

from medseg3d.compare.contenders import Contender, contenders_of
from medseg3d.compare.result import Comparison
from medseg3d.compare.running import compare
from medseg3d.compare.summary import Estimate, Pair, Summary, summarise

__all__ = ["Comparison", "Contender", "Estimate", "Pair", "Summary", "compare", "contenders_of", "summarise"]
