"""Scale of the norms behind a channel: |gamma|, the spread of what the channel puts out.

Formula: s_c = mean over the norms on channel c of |gamma[c]| (over its positions, where it spans several). A group without a norm has
the mean over its layers of sqrt(sum W[c]²): what a norm with gamma_c has on its data, a standard deviation of |gamma_c|, that filter
has on uncorrelated inputs of unit variance, so the two are figures of the same kind. Cost: one pass over the weights, no data.
Source: Liu, Li, Shen, Huang, Yan, Zhang, "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
We differ in: no sparsity is trained in beforehand; groups without norms have the rule above instead of no score; the norms in front of
layers that read a concatenation (DenseNet) count for every channel they scale.
"""

from __future__ import annotations

from edgeprune.criteria.probe import Floats, Probe
from edgeprune.graph import ChannelGraph, ChannelGroup
from edgeprune.plan import Scores

NEEDS = ("weights",)
PAPER = "Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017"


def score(graph: ChannelGraph, probe: Probe) -> Scores:
    """Mean |gamma| of each channel, float64, higher = keep; `facts["without_norm"]` names the groups that have none. (channels,) each."""
    norms = {op.weight for op in graph.ops if op.kind == "norm" and op.weight}
    values, without = {}, []
    for group in graph.groups:
        rows = _scales(group, norms, probe)
        if not rows:
            without.append(group.name)
            rows = [part.double().norm(dim=1).cpu().numpy() for part in probe.slices(group)]
        values[group.name] = probe.reduced(rows)
    return Scores("bn_scale", values, {"without_norm": without})


def _scales(group: ChannelGroup, norms: set[str], probe: Probe) -> list[Floats]:
    gammas = [(m, probe.tensors[m.parameter].detach().double().abs().cpu().numpy()) for m in group.members if m.parameter in norms]
    return [gamma[member.indices].mean(axis=1) for member, gamma in gammas]
