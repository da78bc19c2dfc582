"""One rule for each common kind of layer; a new one is a class here and a line in `RULES`."""

from torch import nn

from infl_cache.maths.capture.rules.convolution import Convolution
from infl_cache.maths.capture.rules.embedding import Embedding, EmbeddingBag
from infl_cache.maths.capture.rules.linear import Linear
from infl_cache.maths.capture.rules.rule import Rule
from infl_cache.maths.capture.rules.scaling import ChannelNorm, ElementNorm, Slope

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (Linear(), Convolution(), Embedding(), EmbeddingBag(), ElementNorm(), ChannelNorm(), Slope())
}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule that a module follows."""
    return next((rule for rule in RULES.values() if rule.follows(module)), None)


__all__ = ["RULES", "Rule", "rule_for"]
