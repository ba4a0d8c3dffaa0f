"""Who takes part."""

from typing import NamedTuple

from benchmarks.peers.attempt import Contender
from benchmarks.peers.magic import bergson_magic
from benchmarks.peers.ours import ours, ours_auto, ours_compiled, ours_on_disk, ours_with_graphs
from benchmarks.peers.plain import metric_alone, plain, plain_compiled
from benchmarks.peers.unrolled import higher_unrolled, torchopt_unrolled

PLAIN, METRIC, OURS = "plain", "metric alone", "ours"


class Named(NamedTuple):
    """A contender and its name in the tables; `compiles` if it needs torch.compile, which takes about a minute."""

    name: str
    prepare: Contender
    compiles: bool = False


CONTENDERS = [
    Named(PLAIN, plain),
    Named("plain compiled", plain_compiled, compiles=True),
    Named(METRIC, metric_alone),
    Named(OURS, ours),
    Named("ours on disk", ours_on_disk),
    Named("ours, graphs", ours_with_graphs),
    Named("ours auto", ours_auto),
    Named("ours compiled", ours_compiled, compiles=True),
    Named("bergson", bergson_magic),
    Named("TorchOpt", torchopt_unrolled),
    Named("higher", higher_unrolled),
]
