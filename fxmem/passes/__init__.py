"""The stages that work on a graph, each an fx pass: use them alone, in a PassManager, or through `fxmem.transform`.

SplitConvolutions   the backward of a convolution as two operators
MergeCopies     no copies of what nobody writes to
NameNodes       names nodes after modules and what they compute
SingleResults   batch norms of inference as operators that can run in place
MatchEager      makes a captured joint graph round as the plain module does
MergeCasts      one cast of a parameter under autocast, as with its cache
WriteViews      writes into views without copies of all around them
RewriteParts    several operators written as others
UpdateBuffers   writes buffers where they change
ShapeProp       fake values and storages of every node
OwnGradients    gradients in storages of their own
Liveness        first and last uses, bytes alive
MarkRegions     where the chain of regions is cut
OfferImplementations   other ways to run operators, for the solver to choose from
MarkInplace     which operators may write over an operand
Costs           seconds and workspace of every node
Reorder         the backward in an order that needs less memory
Rematerialize   solves for a budget and writes the graph anew, in place where the schedule says so
PlaceInArena    memory planned ahead, in one block
"""

from .base import Pass
from .costs import Costs
from .liveness import Liveness
from .mark_inplace import MarkInplace
from .match_eager import MatchEager
from .merge_casts import MergeCasts
from .merge_copies import MergeCopies
from .names import NameNodes
from .offer import OfferImplementations
from .own_gradients import OwnGradients
from .place_in_arena import PlaceInArena
from .regions import MarkRegions
from .rematerialize import Rematerialize
from .reorder import Reorder
from .rewrite import RewriteParts
from .shape_prop import ShapeProp
from .single_results import SingleResults
from .split_convolutions import SplitConvolutions
from .update_buffers import UpdateBuffers
from .write_views import WriteViews

__all__ = [
    "Costs", "Liveness", "MarkInplace", "MarkRegions", "MatchEager", "MergeCasts", "MergeCopies", "NameNodes",
    "OfferImplementations", "OwnGradients", "Pass", "PlaceInArena", "Rematerialize", "Reorder", "RewriteParts", "ShapeProp",
    "SingleResults", "SplitConvolutions", "UpdateBuffers", "WriteViews",
]  # fmt: skip
