"""Methods of pretraining, by the names that ``--method`` takes."""

from train.methods.base import Method
from train.methods.dense import Dense
from train.methods.extended_sr_ste import ExtendedSrSte
from train.methods.fst import Fst
from train.methods.half import Half
from train.methods.slope import Slope
from train.methods.sr_ste import SrSte
from train.methods.wanda import Wanda

METHODS: dict[str, type[Method]] = {
    "slope": Slope,
    "dense": Dense,
    "half": Half,
    "sr-ste": SrSte,
    "extended-sr-ste": ExtendedSrSte,
    "fst": Fst,
    "wanda": Wanda,
}
FIELDS = frozenset().union(*(method.fields for method in METHODS.values()))

__all__ = ["FIELDS", "METHODS", "Method"]
