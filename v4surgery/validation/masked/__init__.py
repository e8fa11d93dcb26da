"""Grade two of faithfulness: a replica against its parent with the removed units masked out.

The masked parent is a forward of its own, in the parent's shapes, written from the mathematics of
the model; removed units are masked, never cut away, and no code is shared with what cut them.
"""

from v4surgery.validation.masked.check import TOLERANCE, check_masked
from v4surgery.validation.masked.report import MaskedReport, NotGraded, Rule, TapGrade

__all__ = ["TOLERANCE", "MaskedReport", "NotGraded", "Rule", "TapGrade", "check_masked"]
